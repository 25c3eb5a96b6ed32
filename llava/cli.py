"""Console command `llava COMMAND ...`; each command's module is imported when it runs."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import Final, NamedTuple

from llava import __version__
from llava.errors import ConfigError
from llava.utils import guarded


class Command(NamedTuple):
    """A subcommand: the module whose `main(argv) -> int` runs it, and its line of help."""

    module: str
    help: str


COMMANDS: Final = {
    "train": Command("llava.train.train", "train a projector (stage 1) or the whole model (stage 2)"),
    "estimate": Command("llava.train.estimate", "estimate the memory and hours a training recipe needs"),
    "eval": Command("llava.eval.main", "answer a benchmark's questions and score the answers"),
    "report": Command("llava.eval.report", "compare scores of evaluated models with each other and the published ones"),
    "serve": Command("llava.serve.main", "serve models: web page, OpenAI-compatible API, workers"),
    "chat": Command("llava.serve.cli", "chat with a model about images, in the terminal"),
    "check": Command("llava.check", "validate weights or an annotation file, or search training data for benchmarks"),
    "inspect-data": Command("llava.train.inspect_data", "show token ids, labels, images and truncation of records"),
    "export": Command("llava.model.export", "convert a checkpoint to the format of another program"),
    "extract-projector": Command("llava.model.extract_projector", "save the projector of a trained model"),
    "doctor": Command("llava.doctor", "report installed versions, devices and supported features"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = (f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items())
    return "\n".join(
        (
            "usage: llava COMMAND [ARGUMENT ...]",
            "",
            "Train, evaluate and serve InternVL-Chat and LLaVA models.",
            "",
            *lines,
            "",
            "Run llava COMMAND --help for a command's arguments, llava --version for the version.",
        )
    )


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status; 2 for an invalid command line."""
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if name in ("", "-h", "--help"):
        print(usage(), file=sys.stdout if name else sys.stderr)
        return 0 if name else 2
    if name in ("-V", "--version"):
        print(f"llava {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(COMMANDS)}."
        raise ConfigError(f"Unknown command {name!r}; {hint}")
    if name != "doctor":
        from llava.doctor import check_versions

        check_versions()
    sys.argv[0] = f"llava {name}"  # the program name in the command's --help
    status: int = importlib.import_module(COMMANDS[name].module).main(rest)
    return status


if __name__ == "__main__":
    sys.exit(main())
