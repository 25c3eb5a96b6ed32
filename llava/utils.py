"""Helpers of all programs: exit statuses, optional packages, flags, logging, moderation, faster model construction."""

from __future__ import annotations

import functools
import importlib
import logging
import logging.handlers
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Final, TypeVar

from llava.constants import LOGDIR
from llava.errors import ConfigError, DependencyError, LlavaError
from llava.files import write_errors

if TYPE_CHECKING:
    import argparse
    import asyncio
    from typing import Self

T = TypeVar("T")

LOG_FORMAT: Final = "%(asctime)s | %(levelname)s | %(name)s | %(message)s"
LOG_DATE_FORMAT: Final = "%Y-%m-%d %H:%M:%S"
MODERATION_URL: Final = "https://api.openai.com/v1/moderations"
# Texts that web pages show in place of an answer.
server_error_msg: Final = "**The server is busy or cannot be reached. Please regenerate or refresh this page.**"
moderation_msg: Final = "This message violates the content moderation guidelines. Please try another one."


def guarded(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Turn exceptions of an entry point into exit statuses: 2 for `LlavaError`, 130 for Ctrl-C, 141 for a closed pipe.

    A `LlavaError` is printed as one line on stderr. Other exceptions are defects and keep their traceback.
    """

    @functools.wraps(main)
    def wrapper(argv: Sequence[str] | None = None) -> int:
        try:
            status = main(argv)
            sys.stdout.flush()
            return status
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # discards output buffered until exit
            return 141
        except LlavaError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
            return 2
        except KeyboardInterrupt:
            return 130

    return wrapper


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module. Raises `DependencyError`, naming the `extra` that installs it, if that fails."""
    # bitsandbytes, imported by peft too, recommends on some CPUs a package that downloads code from the hub.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        return importlib.import_module(module)
    except Exception as error:
        package = module.partition(".")[0]
        if "socksio" in str(error):  # httpx, which packages use when they are imported
            message = "A SOCKS proxy in ALL_PROXY (or HTTP_PROXY, HTTPS_PROXY) requires socksio"
            message += "; run pip install 'httpx[socks]', or unset the variable"
        elif "Unknown scheme for proxy" in str(error):
            message = (
                "The proxy in ALL_PROXY (or HTTP_PROXY, HTTPS_PROXY) must begin with http://, https:// or socks5://"
            )
            message += "; change or unset the variable"
        elif isinstance(error, ModuleNotFoundError) and error.name in (package, module):
            message = f"The package {package} is required and not installed; run pip install 'llava[{extra}]'"
        else:
            message = (
                f"The package {package} is installed but cannot be imported ({type(error).__name__}: {error}); "
                f"run pip install --force-reinstall 'llava[{extra}]'"
            )
        raise DependencyError(message) from error


def flag(default: T, text: str, *aliases: str, **options: object) -> T:
    """Field of a `CliArgs` class: its default, help text, further flag names, and options of `add_argument`."""
    return field(default=default, metadata={"help": text, "aliases": aliases, **options})


@dataclass(frozen=True)
class CliArgs:
    """Base of the settings of a program: fields that are defined by `flag` are its flags."""

    @classmethod
    def add_cli_args(cls, parser: argparse.ArgumentParser) -> None:
        """Add the flags of the fields. A False default makes a switch; other defaults determine the type."""
        for item in fields(cls):
            options = dict(item.metadata)
            if not options:
                continue
            names = (f"--{item.name.replace('_', '-')}", *options.pop("aliases"))
            if item.default is False:
                options["action"] = "store_true"
            elif item.default is not None:
                options = {"type": type(item.default), **options}
            parser.add_argument(*names, dest=item.name, default=item.default, **options)

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace, **values: object) -> Self:
        """Settings from the parsed flags of `add_cli_args` and further `values`; absent flags keep their defaults."""
        given = {item.name: getattr(args, item.name) for item in fields(cls) if hasattr(args, item.name)}
        return cls(**{**given, **values})

    def check_at_least(self, minimum: int, *names: str) -> None:
        """Raise `ConfigError` when one of the numeric fields `names` is below `minimum`; None is accepted."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least {minimum}, got {value}.")


def disable_torch_init() -> None:
    """Disable the default initialization of `nn.Linear` and `nn.LayerNorm` in this process.

    It speeds up the construction of models whose weights are then loaded. Not for training from scratch.
    """
    import torch

    for layer in (torch.nn.Linear, torch.nn.LayerNorm):
        layer.reset_parameters = lambda self: None  # type: ignore[method-assign]


def build_logger(name: str, file: str | None = None) -> logging.Logger:
    """Return the logger of a program, in the common line format.

    With `file`, all records also go to that file in the directory `LOGDIR` (environment variable, else
    `constants.LOGDIR`), rotated at midnight UTC and kept for 30 days. Standard output and error are not redirected.
    """
    formatter = logging.Formatter(LOG_FORMAT, LOG_DATE_FORMAT)
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(logging.StreamHandler())
    for handler in root.handlers:
        handler.setFormatter(formatter)
    if file is not None:
        _copy_to_file(Path(os.environ.get("LOGDIR", LOGDIR)) / file, formatter)
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    return logger


def _copy_to_file(path: Path, formatter: logging.Formatter) -> None:
    root = logging.getLogger()
    if any(isinstance(h, logging.FileHandler) and Path(h.baseFilename) == path.absolute() for h in root.handlers):
        return
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.handlers.TimedRotatingFileHandler(
            path, "midnight", backupCount=30, encoding="utf-8", utc=True
        )
    handler.setFormatter(formatter)
    root.addHandler(handler)
    # Loggers that do not propagate, such as those of transformers and uvicorn.
    for other in list(root.manager.loggerDict.values()):
        if isinstance(other, logging.Logger) and not other.propagate:
            other.addHandler(handler)


def violates_moderation(text: str) -> bool:
    """Whether OpenAI's moderation endpoint flags `text`; false, with a warning, when it cannot be asked.

    The environment variable `OPENAI_API_KEY` is the key.
    """
    import requests

    key = os.environ.get("OPENAI_API_KEY", "")
    try:
        reply = requests.post(
            MODERATION_URL,
            json={"input": text.replace("\n", "")},
            headers={"Authorization": f"Bearer {key}"},
            timeout=5,
        )
        return bool(reply.json()["results"][0]["flagged"])
    except (requests.RequestException, ValueError, KeyError, IndexError, TypeError) as error:
        logging.getLogger(__name__).warning("The moderation request failed (%s); the text is accepted.", error)
        return False


def pretty_print_semaphore(semaphore: asyncio.Semaphore | None) -> str:
    """Describe a semaphore for a log line: its free slots and whether the next caller waits."""
    if semaphore is None:
        return "None"
    return f"Semaphore(value={semaphore._value}, locked={semaphore.locked()})"


def usable_cores() -> int:
    """Number of CPU cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_SIGNATURES: Final = (
    (b"version https://git-lfs", "a Git LFS pointer; run git lfs pull"),
    (b"\x1f\x8b", "gzip; decompress it"),
    (b"\x28\xb5\x2f\xfd", "zstd; decompress it"),
    (b"PK\x03\x04", "a zip archive; extract it"),
    (b"PAR1", "Parquet; name it *.parquet"),
    (b"\xff\xfe", "UTF-16 text; save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text; save it as UTF-8"),
    (b"II*\0", "an unsupported TIFF; convert it to PNG"),
    (b"MM\0*", "an unsupported TIFF; convert it to PNG"),
    (b"%PDF", "a PDF document; convert its pages to PNG"),
    (b"8BPS", "a Photoshop file; convert it to PNG"),
    (b"\0\0\1\0", "an icon (ICO); convert it to PNG"),
    (b"\xff\x0a", "JPEG XL; convert it to JPEG"),
    (b"\0\0\0\x0cJXL ", "JPEG XL; convert it to JPEG"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000; convert it to JPEG"),
    (b"<!doctype html", "an HTML page; download it again"),
    (b"<html", "an HTML page; download it again"),
    (b"<svg", "SVG; convert it to PNG"),
)
_BRANDS: Final = {b"avif": "AVIF; convert it to JPEG", b"heic": "HEIC; convert it to JPEG"}  # of ISO media files
_BRANDS_HEIC: Final = (b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


def describe_content(data: bytes) -> str:
    """What the first bytes of a file that cannot be read show it to be, and what to do; "" if they show nothing."""
    head = data[:1024].lstrip().lower()
    if not data:
        return "an empty file"
    if data[4:8] == b"ftyp":
        brand = b"heic" if data[8:12] in _BRANDS_HEIC else data[8:12]
        return _BRANDS.get(brand, "a video (MP4)")
    for start, text in _SIGNATURES:
        if data.startswith(start) or (start.startswith(b"<") and head.startswith(start)):
            return text
    return "SVG; convert it to PNG" if head.startswith(b"<?xml") and b"<svg" in head else ""
