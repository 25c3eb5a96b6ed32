"""The command line of a scorer or converter: flags in, text on stdout, exit status 2 and one line on an error."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.utils import guarded


@dataclass(frozen=True)
class Flag:
    """Names of an option and what `ArgumentParser.add_argument` takes beside them."""

    names: tuple[str, ...]
    options: dict[str, Any]


def flag(*names: str, **options: Any) -> Flag:
    """Any option."""
    return Flag(names, options)


def file_flag(*names: str, **options: Any) -> Flag:
    """A file or folder, required unless `required=False` or a default says otherwise; `~` is the user's home."""
    options.setdefault("required", "default" not in options)
    return Flag(names, {"type": lambda text: Path(text).expanduser(), "metavar": "PATH", **options})


def program(doc: str | None, action: Callable[..., str], *flags: Flag) -> Callable[..., int]:
    """`main(argv) -> int` that calls `action` with the flags as keywords and prints what it returns."""

    @guarded
    def main(argv: Sequence[str] | None = None) -> int:
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        for each in flags:
            parser.add_argument(*each.names, **each.options)
        text = action(**vars(parser.parse_args(argv)))
        if text:
            print(text)
        return 0

    return main
