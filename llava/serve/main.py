"""Start a service, or all of them: `llava serve {all,controller,worker,web}` with the flags of the service."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Final

from llava.errors import ConfigError
from llava.utils import guarded

SERVICES: Final = {
    "all": ("llava.serve.serve_all", "controller, workers and web page in one command"),
    "controller": ("llava.serve.controller", "registry of workers and OpenAI-compatible API"),
    "worker": ("llava.serve.model_worker", "one model"),
    "web": ("llava.serve.gradio_web_server", "web page"),
}


def usage() -> str:
    lines = (f"  {name:<10}  {summary}" for name, (_, summary) in SERVICES.items())
    return "\n".join(
        ("usage: llava serve SERVICE [ARGUMENT ...]", "", *lines, "", "SERVICE --help lists its arguments.")
    )


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    service, *rest = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if service in ("", "-h", "--help"):
        print(usage(), file=sys.stdout if service else sys.stderr)
        return 0 if service else 2
    if service not in SERVICES:
        raise ConfigError(f"SERVICE must be one of {', '.join(SERVICES)}, got {service!r}.")
    sys.argv[0] = f"llava serve {service}"
    status: int = importlib.import_module(SERVICES[service][0]).main(rest)
    return status


if __name__ == "__main__":
    sys.exit(main())
