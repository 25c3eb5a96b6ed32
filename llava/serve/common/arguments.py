"""Flags that every serving program has: where to listen, the shared token, how long a stop may take, the log."""

from __future__ import annotations

import argparse
import logging
import math
import socket
from pathlib import Path

from llava.serve.common.middleware import Keys, Limits
from llava.serve.common.protocol import TOKEN_VARIABLE
from llava.serve.common.security import ApiKeys, bind_host, cluster_token
from llava.serve.common.server import bind_socket
from llava.utils import build_logger


def positive(text: str) -> float:
    """The type of a flag that is a number greater than 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number greater than 0")
    return value


def add_listen_flags(parser: argparse.ArgumentParser, port: int) -> None:
    add = parser.add_argument
    add("--host", default="localhost", help="address to listen on; beyond this machine only with a token or --insecure")
    add("--port", type=int, default=port, help="0 takes any free one (default %(default)s)")
    add("--token-file", type=Path, help=f"file with the token shared by all parts (default: {TOKEN_VARIABLE})")
    add("--insecure", action="store_true", help="listen on --host even without a token")
    add("--max-body-mb", type=positive, default=32, help="largest request body (default %(default)s)")
    add("--grace-seconds", type=float, default=30, help="time for running answers when stopped (default %(default)s)")
    add("--log-file", help="also write the log to this file in LOGDIR, rolled over daily")


def open_socket(args: argparse.Namespace) -> tuple[socket.socket, str | None]:
    """The bound socket, and the token if there is one. Sets up the log, too."""
    build_logger("llava.serve", args.log_file)
    for chatty in ("httpx", "httpcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    token = cluster_token(args.token_file)
    host = bind_host(args.host, protected=token is not None, insecure=args.insecure)
    return bind_socket(host, args.port), token


def keys_of(token: str | None, api_keys: list[str] | None = None) -> Keys:
    return Keys(ApiKeys([token] if token else []), ApiKeys(api_keys or []))


def limits_of(args: argparse.Namespace) -> Limits:
    return Limits(max_body=int(args.max_body_mb * 2**20))
