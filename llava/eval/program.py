"""Command lines of scorers and converters: flags in, text on stdout, exit status 2 with one line on an error."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from llava.utils import guarded

Flag = tuple[tuple[str, ...], dict[str, object]]  # arguments and keywords of `ArgumentParser.add_argument`


def flag(*names: str, **options: object) -> Flag:
    """An option."""
    return names, options


def file_flag(*names: str, **options: object) -> Flag:
    """An option for a file or folder with `~` expanded, required unless it has a default or `required=False`."""
    options.setdefault("required", "default" not in options)
    return names, {"type": lambda text: Path(text).expanduser(), "metavar": "PATH", **options}


def program(doc: str | None, action: Callable[..., str], *flags: Flag) -> Callable[..., int]:
    """Return a `main(argv)` that calls `action` with the flags as keywords and prints the text it returns."""

    @guarded
    def main(argv: Sequence[str] | None = None) -> int:
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        for names, options in flags:
            parser.add_argument(*names, **options)  # type: ignore[arg-type]
        text = action(**vars(parser.parse_args(argv)))
        if text:
            print(text)
        return 0

    return main
