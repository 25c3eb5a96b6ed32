"""Small helpers of every program: error exits, optional packages, logging, faster building (spec/model.md §14)."""

from __future__ import annotations

import asyncio
import functools
import importlib
import logging
import logging.handlers
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Final

from llava.constants import LOGDIR
from llava.errors import DependencyError, LlavaError
from llava.files import write_errors

LOG_FORMAT: Final = "%(asctime)s | %(levelname)s | %(name)s | %(message)s"
LOG_DATE_FORMAT: Final = "%Y-%m-%d %H:%M:%S"
MODERATION_URL: Final = "https://api.openai.com/v1/moderations"


def guarded(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Wrap an entry point: a `LlavaError` becomes one line on stderr and exit status 2, Ctrl-C exit status 130.

    So does a reader of the output that has left (`| head`), without a word: 141, as the shell has it. Any other
    exception is a defect and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapper(argv: Sequence[str] | None = None) -> int:
        try:
            status = main(argv)
            sys.stdout.flush()
            return status
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left of the output, at exit
            return 141
        except LlavaError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201 - the one place that reports
            return 2
        except KeyboardInterrupt:
            return 130

    return wrapper


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package, or raise `DependencyError` naming the extra of this package that brings it.

    A package that is present but broken keeps its own error text in the message.
    """
    # Which peft imports too; on some CPUs it advises a package that fetches code from the hub.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        return importlib.import_module(module)
    except Exception as error:
        package = module.partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and error.name in (package, module):
            message = f"The package {package} is needed for this and is not installed: pip install 'llava[{extra}]'"
        else:
            message = (
                f"The package {package} is installed but cannot be imported ({type(error).__name__}: {error}); "
                f"reinstall it with: pip install --force-reinstall 'llava[{extra}]'"
            )
        raise DependencyError(message) from error


def disable_torch_init() -> None:
    """Make the default initialisation of `nn.Linear` and `nn.LayerNorm` a no-op in this process.

    Models whose weights are about to be loaded build faster; never call it before training from scratch.
    """
    import torch

    for layer in (torch.nn.Linear, torch.nn.LayerNorm):
        layer.reset_parameters = lambda self: None  # type: ignore[method-assign]


def build_logger(name: str, file: str | None = None) -> logging.Logger:
    """Return the logger of a program, with the line format shared by all of them.

    With `file`, every record is also written to a file of that name in `LOGDIR` (environment, else
    `constants.LOGDIR`) that rolls over daily at midnight UTC; thirty days are kept. Standard output and error stay
    what they are.
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
    # Loggers that keep their records to themselves (transformers, uvicorn) would be missing from the file.
    for other in list(root.manager.loggerDict.values()):
        if isinstance(other, logging.Logger) and not other.propagate:
            other.addHandler(handler)


def violates_moderation(text: str) -> bool:
    """Ask OpenAI's moderation endpoint about `text` (`OPENAI_API_KEY`); false, with a warning, if it cannot say."""
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
        logging.getLogger(__name__).warning("Moderation gave no answer (%s); the text is let through.", error)
        return False


def pretty_print_semaphore(semaphore: asyncio.Semaphore | None) -> str:
    """Describe a semaphore for a log line: how many slots are free, and whether the next caller would wait."""
    if semaphore is None:
        return "None"
    return f"Semaphore(value={semaphore._value}, locked={semaphore.locked()})"
