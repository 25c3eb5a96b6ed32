"""The packages that every serving program needs: their absence is told before anything imports them."""

from __future__ import annotations

from llava.utils import require


def require_server() -> None:
    """Raises `DependencyError`, naming the extra to install."""
    for package in ("fastapi", "uvicorn", "httpx", "prometheus_client"):
        require(package, "serve")
