"""Serve the web page, a chat in the browser with the models of a controller.

python -m llava.serve.gradio_web_server --controller http://localhost:10000 --model-list-mode reload

The page accepts connections from this machine only, unless visitors must log in (--auth-file) or --insecure is given.
Set LLAVA_TOKEN (or --token-file) to the token of the controller and the workers.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from llava.constants import LOGDIR
from llava.errors import ConfigError
from llava.serve.common.arguments import CONTROLLER_URL, LOGINS_VARIABLE, TOKEN_VARIABLE
from llava.utils import CliArgs, build_logger, flag, guarded, require

if TYPE_CHECKING:
    import gradio
    from fastapi import FastAPI

    from llava.serve.web.services import AppServices

logger = logging.getLogger(__name__)
FIRST_PORT: Final = 7860
_MAX_UPLOAD: Final = "64mb"


@dataclass(frozen=True)
class WebArgs(CliArgs):
    """Settings of the web server."""

    host: str = flag("127.0.0.1", "address to bind (default %(default)s)")
    port: int | None = flag(
        None, f"port to bind, 0 for any free one (default: the first free one from {FIRST_PORT})", type=int
    )
    controller_url: str = flag(CONTROLLER_URL, "controller URL (default %(default)s)", "--controller")
    concurrency_count: int = flag(10, "concurrent answers (default %(default)s)")
    model_list_mode: str = flag("once", "keep the first list of models, or update it", choices=("once", "reload"))
    default_model: str | None = flag(None, "model selected on a new page")
    share: bool = flag(False, "create a public URL through Gradio's tunnel; requires --auth-file")
    moderate: bool = flag(False, "check messages with OpenAI's moderation endpoint (OPENAI_API_KEY)")
    embed: bool = flag(False, "hide title and terms")
    auth_file: Path | None = flag(
        None, f"logins, USER:PASSWORD per line (default: {LOGINS_VARIABLE}, comma-separated)", type=Path
    )
    insecure: bool = flag(False, "bind a public --host without logins")
    token_file: Path | None = flag(None, f"file with the shared token (default: {TOKEN_VARIABLE})", type=Path)
    log_conversations: bool = flag(False, "record answers, images and visitors' addresses in LOGDIR")
    log_days: int = flag(30, "days after which records are deleted (default %(default)s)")
    grace_seconds: float = flag(30, "shutdown timeout of running answers (default %(default)s)", type=float)
    idle_timeout: float = flag(120.0, "timeout of a silent worker in seconds (default %(default)s)")

    def __post_init__(self) -> None:
        self.check_at_least(1, "concurrency_count", "log_days")
        if not self.idle_timeout > 0:
            raise ConfigError(f"--idle-timeout must be greater than 0, got {self.idle_timeout}.")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    WebArgs.add_cli_args(parser)
    return parser


def read_logins(file: Path | None) -> list[tuple[str, str]]:
    """(user, password) pairs of the visitors; without any, no login is required."""
    from llava.serve.common.security import read_secrets

    logins = []
    for line in read_secrets(file, LOGINS_VARIABLE):
        user, colon, password = line.partition(":")
        if not (user and colon and password):
            raise ConfigError("Every line of --auth-file must have the form USER:PASSWORD.")
        logins.append((user, password))
    return logins


def build_services(args: WebArgs) -> AppServices:
    """Create the services behind the page; nothing is contacted yet."""
    from llava.serve.common.security import cluster_token
    from llava.serve.web.client import ServiceClient
    from llava.serve.web.log import ConversationLog
    from llava.serve.web.models import ModelCatalog
    from llava.serve.web.services import AppServices, Moderator

    token = cluster_token(args.token_file)
    client = ServiceClient(args.controller_url, token=token, idle_timeout=args.idle_timeout)
    catalog = ModelCatalog(client, mode=args.model_list_mode, default_model=args.default_model)
    folder = Path(os.environ.get("LOGDIR", LOGDIR))
    log = ConversationLog(folder, chats=args.log_conversations, keep_days=args.log_days)
    return AppServices(client, catalog, log, Moderator() if args.moderate else None)


def build_demo(embed_mode: bool = False, controller_url: str = CONTROLLER_URL) -> gradio.Blocks:
    """Create the page, not yet served; `embed_mode` hides title and terms."""
    require("gradio", "serve")
    from llava.serve.web.page import build_page

    return build_page(build_services(WebArgs(controller_url=controller_url)), embed=embed_mode)


def get_model_list(controller_url: str = CONTROLLER_URL) -> list[str]:
    """Refresh the workers of a controller; returns the sorted names of their models."""
    require("httpx", "serve")
    from llava.serve.common.client import Client

    with Client() as client:
        client.post(controller_url, "/refresh_all_workers")
        return sorted(client.post(controller_url, "/list_models")["models"])


def build_app(
    services: AppServices,
    *,
    embed: bool = False,
    concurrency: int = 10,
    logins: Sequence[tuple[str, str]] = (),
    port: int = 0,
) -> FastAPI:
    """Create the web application: the page, and `/health`, `/ready` and `/metrics`."""
    import fastapi
    import gradio

    from llava.serve.web.page import CSS, HEAD, PageGuard, build_page, theme

    no_docs = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    add_probes(app, services)
    page = build_page(services, embed=embed)
    page.queue(default_concurrency_limit=concurrency, max_size=16 * concurrency, api_open=False)
    mounted: FastAPI = gradio.mount_gradio_app(
        app,
        page,
        path="/",
        server_port=port,
        auth=list(logins) or None,
        max_file_size=_MAX_UPLOAD,
        show_error=False,
        footer_links=[],
        app_kwargs=no_docs,
        ssr_mode=False,
        enable_monitoring=False,
        theme=theme(),
        css=CSS,
        head=HEAD,
    )
    page.has_launched = True  # otherwise Gradio accepts any path as that of an uploaded file
    mounted.add_middleware(PageGuard)
    return mounted


def add_probes(app: FastAPI, services: AppServices) -> None:
    """Add `/health`, `/ready` and `/metrics`."""
    from fastapi import Response
    from fastapi.responses import JSONResponse

    async def health() -> dict[str, str]:
        return {"status": "ok"}

    async def ready() -> JSONResponse:
        models = [] if services.draining else list((await services.catalog.listing()).models)
        return JSONResponse({"models": models}, 200 if models else 503)

    async def metrics() -> Response:
        return Response(services.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    for probe in (health, ready, metrics):
        app.add_api_route(f"/{probe.__name__}", probe, methods=["GET", "HEAD"])


def listen(host: str, port: int | None) -> socket.socket:
    """Bind `port`, by default the first free port from 7860; raises `ConfigError` when it is in use."""
    from llava.serve.common.server import bind_free, bind_socket

    return bind_free(host, FIRST_PORT) if port is None else bind_socket(host, port)


def share(port: int) -> None:
    """Open Gradio's public tunnel to the page and log its URL."""
    import secrets

    from gradio import networking

    try:
        address = networking.setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(32), None, None)
    except Exception as error:  # the page works without the tunnel
        logger.error("Cannot create a public URL: %s", error)
    else:
        logger.warning("Public URL: %s", address)


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = WebArgs.from_cli_args(build_parser().parse_args(argv))
    # Servers that share Gradio's temporary folder delete each other's images when one of them ends.
    with tempfile.TemporaryDirectory(prefix="llava-page-", ignore_cleanup_errors=True) as folder:
        os.environ.setdefault("GRADIO_TEMP_DIR", folder)
        return run(args)


def run(args: WebArgs) -> int:
    require("gradio", "serve")
    from llava.serve.common.security import bind_host
    from llava.serve.common.server import port_of, serve

    build_logger("llava.serve")
    logins = read_logins(args.auth_file)
    check_share(args, logins)
    remedy = f"--auth-file (or {LOGINS_VARIABLE})"
    host = bind_host(args.host, protected=bool(logins), insecure=args.insecure, key="login", how=remedy)
    sock = listen(host, args.port)
    services = build_services(args)
    app = build_app(services, embed=args.embed, concurrency=args.concurrency_count, logins=logins, port=port_of(sock))
    if args.share:
        share(port_of(sock))

    async def drain() -> None:
        await services.drain(args.grace_seconds)

    return serve(app, sock, drain)


def check_share(args: WebArgs, logins: Sequence[tuple[str, str]]) -> None:
    """Raise `ConfigError` when a public URL would be open to everyone without --insecure."""
    if args.share and not (logins or args.insecure):
        raise ConfigError("--share opens the page to everyone; add --auth-file, or --insecure to allow it.")


if __name__ == "__main__":
    sys.exit(main())
