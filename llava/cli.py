"""The console command: `llava COMMAND …` hands its arguments to the module that does the work, imported only then."""

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
    """A subcommand: the module whose `main(argv) -> int` runs it, and one line of help."""

    module: str
    gloss: str


COMMANDS: Final = {
    "train": Command("llava.train.train", "train a projector (stage 1) or the whole model (stage 2)"),
    "estimate": Command("llava.train.estimate", "say what memory and how many hours a training recipe needs"),
    "eval": Command("llava.eval.main", "answer a benchmark's questions and score the answers"),
    "report": Command("llava.eval.report", "compare evaluated models with the published scores, and with each other"),
    "serve": Command("llava.serve.main", "serve models: web page, OpenAI-compatible API, workers"),
    "chat": Command("llava.serve.cli", "talk with a model about an image, in the terminal"),
    "check": Command("llava.check", "say what a directory of weights or an annotation file is, and if it is whole"),
    "inspect-data": Command(
        "llava.train.inspect_data", "show what training sees of a record: ids, masks, images, cuts"
    ),
    "export": Command("llava.model.export", "write a checkpoint in the layout of another program"),
    "extract-projector": Command("llava.model.extract_projector", "take the projector out of a trained model"),
    "doctor": Command("llava.doctor", "say which versions and devices are here and what they allow"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = (f"  {name:<{width}}  {command.gloss}" for name, command in COMMANDS.items())
    return "\n".join(
        (
            "usage: llava COMMAND [ARGUMENT ...]",
            "",
            "InternVL-Chat: train, evaluate and talk with an InternViT + Vicuna model.",
            "",
            *lines,
            "",
            "llava COMMAND --help lists a command's arguments; llava --version prints the version.",
        )
    )


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status; 2 for a command line that cannot be understood."""
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if name in ("", "-h", "--help"):
        print(usage(), file=sys.stdout if name else sys.stderr)
        return 0 if name else 2
    if name in ("-V", "--version"):
        print(f"llava {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(COMMANDS)}."
        raise ConfigError(f"llava has no command {name!r}; {hint}")
    if name != "doctor":
        from llava.doctor import check_versions

        check_versions()
    sys.argv[0] = f"llava {name}"  # the name that the command's own --help shows
    status: int = importlib.import_module(COMMANDS[name].module).main(rest)
    return status


if __name__ == "__main__":
    sys.exit(main())
