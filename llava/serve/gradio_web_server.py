"""The web page: talk with the models that a controller knows, in a browser (spec/serve.md §8).

python -m llava.serve.gradio_web_server --controller http://localhost:10000 --model-list-mode reload

The page listens on this machine only, unless visitors have to log in (--auth-file) or --insecure is given.
Set LLAVA_TOKEN (or --token-file) to what the controller and the workers have.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from llava.constants import LOGDIR
from llava.errors import ConfigError
from llava.utils import build_logger, guarded, require

if TYPE_CHECKING:
    from llava.serve.web.site import Site

logger = logging.getLogger(__name__)
FIRST_PORT: Final = 7860
LOGINS_VARIABLE: Final = "LLAVA_WEB_LOGINS"
_PORTS_TRIED: Final = 100
_MAX_UPLOAD: Final = "64mb"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--host", default="127.0.0.1")
    add("--port", type=int, help=f"default: the first free one from {FIRST_PORT} up; 0: any")
    add("--controller-url", "--controller", default="http://localhost:21001")
    add("--concurrency-count", type=int, default=10, help="answers in progress at a time (default %(default)s)")
    add("--model-list-mode", choices=("once", "reload"), default="once", help="keep the first list, or keep it current")
    add("--default-model", help="the model a new page begins with")
    add("--share", action="store_true", help="also a public address through Gradio's tunnel; needs --auth-file")
    add("--moderate", action="store_true", help="ask OpenAI's moderation endpoint first (OPENAI_API_KEY)")
    add("--embed", action="store_true", help="leave out title and terms")
    add("--auth-file", type=Path, help=f"visitors' logins, USER:PASSWORD a line (or {LOGINS_VARIABLE}, with commas)")
    add("--insecure", action="store_true", help="let other machines connect without a login")
    add("--token-file", type=Path, help="file with the token shared with controller and workers")
    add("--log-conversations", action="store_true", help="record answers, pictures and visitors' addresses in LOGDIR")
    add("--log-days", type=int, default=30, help="delete records that are older (default %(default)s)")
    add("--idle-timeout", type=float, default=120.0, help="seconds of a worker's silence that end an answer")
    return parser


def check(args: argparse.Namespace, logins: Sequence[tuple[str, str]]) -> None:
    """Refuse what cannot work before anything starts."""
    if args.concurrency_count < 1 or args.log_days < 1:
        raise ConfigError("--concurrency-count and --log-days must be at least 1.")
    if not args.idle_timeout > 0:
        raise ConfigError(f"--idle-timeout is {args.idle_timeout}; it must be greater than 0.")
    if args.share and not (logins or args.insecure):
        raise ConfigError("--share opens the page to everyone; add --auth-file, or --insecure if that is meant.")


def read_logins(file: Path | None) -> list[tuple[str, str]]:
    """(user, password) of everyone who may see the page; none: no login is asked for."""
    from llava.serve.common.security import read_secrets

    logins = []
    for line in read_secrets(file, LOGINS_VARIABLE):
        user, colon, password = line.partition(":")
        if not (user and colon and password):
            raise ConfigError("A login is not USER:PASSWORD; write one a line in --auth-file.")
        logins.append((user, password))
    return logins


def build_site(args: argparse.Namespace) -> Site:
    from llava.serve.common.security import cluster_token
    from llava.serve.web.client import ServiceClient
    from llava.serve.web.log import ConversationLog
    from llava.serve.web.models import ModelCatalog
    from llava.serve.web.moderation import Moderator
    from llava.serve.web.site import Site

    token = cluster_token(args.token_file)
    client = ServiceClient(args.controller_url, token=token, idle_timeout=args.idle_timeout)
    catalog = ModelCatalog(client, mode=args.model_list_mode, default_model=args.default_model)
    folder = Path(os.environ.get("LOGDIR", LOGDIR))
    log = ConversationLog(folder, chats=args.log_conversations, keep_days=args.log_days)
    return Site(client, catalog, log, Moderator() if args.moderate else None)


def build_app(
    site: Site, *, embed: bool = False, concurrency: int = 10, logins: Sequence[tuple[str, str]] = (), port: int = 0
) -> Any:
    """The web application: the page, and `/health`, `/ready` and `/metrics` beside it."""
    import fastapi
    import gradio

    from llava.serve.web.page import CSS, build_page, theme

    closed: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app = fastapi.FastAPI(**closed)
    add_probes(app, site)
    page = build_page(site, embed=embed)
    page.queue(default_concurrency_limit=concurrency, max_size=16 * concurrency, api_open=False)
    return gradio.mount_gradio_app(
        app,
        page,
        path="/",
        server_port=port,
        auth=list(logins) or None,
        max_file_size=_MAX_UPLOAD,
        show_error=False,
        footer_links=[],
        app_kwargs=closed,
        ssr_mode=False,
        enable_monitoring=False,
        theme=theme(),
        css=CSS,
    )


def add_probes(app: Any, site: Site) -> None:
    from fastapi import Response
    from fastapi.responses import JSONResponse

    async def health() -> dict[str, str]:
        return {"status": "ok"}

    async def ready() -> JSONResponse:
        listing = await site.catalog.listing()
        return JSONResponse({"models": list(listing.models)}, 200 if listing.models else 503)

    async def metrics() -> Response:
        return Response(site.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    for probe in (health, ready, metrics):
        app.add_api_route(f"/{probe.__name__}", probe, methods=["GET"])


def listen(host: str, port: int | None) -> socket.socket:
    """A socket bound to `port`, or to the first free port from 7860 up; raises `ConfigError` when it is taken."""
    from llava.serve.common.server import bind_socket

    if port is not None:
        return bind_socket(host, port)
    for candidate in range(FIRST_PORT, FIRST_PORT + _PORTS_TRIED):
        with contextlib.suppress(ConfigError):
            return bind_socket(host, candidate)
    return bind_socket(host, 0)


def share(port: int) -> None:
    """Open Gradio's public tunnel to the page and log its address."""
    import secrets

    from gradio import networking

    try:
        address = networking.setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(32), None, None)
    except Exception as error:  # whatever the tunnel's programs raise, the page itself is up
        logger.error("No public address: %s", error)
    else:
        logger.warning("Public address: %s", address)


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    # Servers that share Gradio's own folder delete each other's pictures when one of them ends.
    with tempfile.TemporaryDirectory(prefix="llava-page-", ignore_cleanup_errors=True) as folder:
        os.environ.setdefault("GRADIO_TEMP_DIR", folder)
        return run(args)


def run(args: argparse.Namespace) -> int:
    require("gradio", "serve")
    from llava.serve.common.security import bind_host
    from llava.serve.common.server import port_of, serve

    build_logger("llava.serve")
    logins = read_logins(args.auth_file)
    check(args, logins)
    how = f"--auth-file (or {LOGINS_VARIABLE})"
    host = bind_host(args.host, protected=bool(logins), insecure=args.insecure, key="login", how=how)
    bound = listen(host, args.port)
    site = build_site(args)
    app = build_app(site, embed=args.embed, concurrency=args.concurrency_count, logins=logins, port=port_of(bound))
    if args.share:
        share(port_of(bound))
    return serve(app, bound, site.close)


if __name__ == "__main__":
    sys.exit(main())
