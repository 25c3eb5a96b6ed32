"""Start one part of the service, or all of it: `llava serve {all,controller,worker,web}` with the part's own flags."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Final

from llava.errors import ConfigError
from llava.utils import guarded

PARTS: Final = {
    "all": ("llava.serve.launcher.serve_all", "controller, one worker and the web page, in one command"),
    "controller": ("llava.serve.controller", "the list of workers, and the OpenAI-compatible API"),
    "worker": ("llava.serve.model_worker", "one model"),
    "web": ("llava.serve.gradio_web_server", "the web page"),
}


def usage() -> str:
    lines = (f"  {name:<10}  {gloss}" for name, (_, gloss) in PARTS.items())
    return "\n".join(("usage: llava serve PART [ARGUMENT ...]", "", *lines, "", "PART --help lists its arguments."))


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    part, *rest = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if part in ("", "-h", "--help"):
        print(usage(), file=sys.stdout if part else sys.stderr)
        return 0 if part else 2
    if part not in PARTS:
        raise ConfigError(f"llava serve has no part {part!r}; it has {', '.join(PARTS)}.")
    sys.argv[0] = f"llava serve {part}"
    status: int = importlib.import_module(PARTS[part][0]).main(rest)
    return status


if __name__ == "__main__":
    sys.exit(main())
