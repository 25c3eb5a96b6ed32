"""Rewrite the tree in README.md from the files: `python scripts/readme_tree.py` (`--check` only compares).

A gloss is the first sentence of what a file says about itself: a module's docstring, a script's first comment, a
page's first heading. Files that cannot speak, and folders shown as one line, have theirs in `GLOSSES`.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- tree: python scripts/readme_tree.py -->", "<!-- end of tree -->"
WIDTH = 90
TOP = (
    "llava/",
    "scripts_internvl/",
    "scripts/",
    "playground/",
    "pretrained/",
    "docs/",
    "images/",
    "benchmarks/",
    "tests/",
)
FOLDED = ("images/", "tests/")
GLOSSES = {
    ".ci/run": "what CI runs: scripts/test.sh",
    ".dockerignore": "what stays out of the container image",
    ".gitignore": "weights, data and caches stay out of git",
    "CHANGELOG.md": "what changes for users",
    "CONTRIBUTING.md": "the commands and the rules of the house",
    "Dockerfile": "an image for serving, on CUDA or the CPU",
    "LICENSE": "Apache-2.0",
    "SECURITY.md": "what is guarded, and how to report a hole",
    "benchmarks/": "speed and memory, as ratios within one run",
    "benchmarks/README.md": "what is measured, and the last table",
    "compose.yaml": "controller, worker and web page as containers",
    "constraints.txt": "the versions that are tested together",
    "docs/": "longer answers",
    "docs/INSTALLATION.md": "CUDA, FlashAttention, CPU, macOS, tested versions, where data go",
    "docs/Troubleshooting.md": "the error codes, one by one",
    "images/": "pictures of the pages",
    "llava/": "the package",
    "llava/data/": "from annotation files and images to batches",
    "llava/engine/": "batched, streaming, cancellable generation",
    "llava/eval/": "benchmarks: ask, write down, score",
    "llava/eval/scorers/": "one pure file a benchmark: answers to scores",
    "llava/eval/table/": "what the judge of reviews is told",
    "llava/eval/table/rule.json": "how to grade two answers, by category",
    "llava/eval/tasks/": "one short file a benchmark: question to prompt",
    "llava/model/": "towers, projectors, language models, and how they are loaded",
    "llava/model/language_model/": "language models that take image features among their words",
    "llava/model/multimodal_encoder/": "vision towers",
    "llava/model/multimodal_encoder/intern_vit/": "the one InternViT",
    "llava/model/multimodal_projector/": "from image features to word embeddings",
    "llava/py.typed": "marks the package as typed",
    "llava/self_test/": "the checks of llava doctor --self-test",
    "llava/serve/": "talking with a model: terminal, controller, workers, web page, OpenAI-compatible server",
    "llava/serve/examples/": "pictures to try, drawn when the page starts",
    "llava/train/": "both stages of training",
    "playground/": "data, and how the quickstart makes its own",
    "playground/README.md": "what the quickstart's parts do",
    "playground/data/": "annotations and pictures",
    "playground/data/README.md": "what belongs here",
    "pretrained/": "weights you download",
    "pretrained/README.md": "what belongs here",
    "pyproject.toml": "dependencies, extras, and the settings of ruff, mypy, pytest and coverage",
    "scripts/": "recipes of the original LLaVA, checks and DeepSpeed settings",
    "scripts/v1_5/": "recipes of LLaVA-1.5",
    "scripts/v1_5/eval/": "one benchmark a file, for LLaVA-1.5",
    "scripts/zero1.json": "DeepSpeed: optimizer states are shared out",
    "scripts/zero2.json": "DeepSpeed: gradients too (stage 1 of training)",
    "scripts/zero3.json": "DeepSpeed: parameters too (stage 2 of training)",
    "scripts/zero3_offload.json": "DeepSpeed: and kept in main memory",
    "scripts_internvl/": "training and evaluation recipes, as published",
    "scripts_internvl/eval/": "one benchmark a file: sh scripts_internvl/eval/NAME.sh CHECKPOINT",
    "scripts_internvl/meta/": "mixtures of data sets",
    "scripts_internvl/meta/custom_data.json": "an example to replace by your own",
    "tests/": "mirrors llava/; tiny models, golden numbers, attacks",
}


def tracked() -> list[str]:
    """Paths of every file that belongs to the project, in a checkout or in an unpacked archive."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode == 0:
        names = listing.stdout.splitlines()
    else:
        skip = re.compile(r"(^|/)(\.venv|\.git|__pycache__|\.[a-z]+_cache|[^/]*\.egg-info|work_dirs)/")
        names = [name for path in ROOT.rglob("*") if not skip.search(name := path.relative_to(ROOT).as_posix())]
    return sorted(name for name in names if (ROOT / name).is_file())


def sentence(text: str) -> str:
    """The first sentence, without references and full stop; cut at a clause, else at a word, if it is long."""
    line = re.split(r"(?<=[^.].)\.(?=\s|$)", " ".join(text.split("\n\n")[0].split()), maxsplit=1)[0]
    line = re.sub(r" \((spec/|users|paper|arXiv)[^)]*\)?", "", line)
    while len(line) > WIDTH and (clause := re.match(r"(.{20,})(?:[;:]| \(| —) ", line)):
        line = clause[1]
    return line.rstrip(".") if len(line) <= WIDTH else line[: line.rindex(" ", 0, WIDTH - 2)].rstrip(",;") + " …"


def gloss(name: str) -> str:
    """What `name` (a path from the root; folders end in `/`) says it is for. LookupError if it says nothing."""
    path = ROOT / name / ("__init__.py" if name.endswith("/") else "")
    text = path.read_text(encoding="utf-8") if path.suffix in (".py", ".md", ".sh", ".cpp") and path.is_file() else ""
    if path.suffix == ".py":
        found = ast.get_docstring(ast.parse(text)) if text else None
    else:
        mark = {".md": "# ", ".cpp": "// "}.get(path.suffix, "# (?!shellcheck)")
        found = next((line.lstrip("#/ ") for line in text.splitlines() if re.match(mark, line)), None)
    if name in GLOSSES or found is None:
        found = GLOSSES.get(name)
    if not found:
        raise LookupError(f"{name} does not say what it is for: give it a first comment, or a line in GLOSSES")
    return sentence(found)


def room(names: Sequence[str], folder: str, depth: int = 0) -> Iterator[tuple[str, str]]:
    """(indented name, gloss) of a folder and, unless it is folded, of its files and then its folders."""
    yield f"{'  ' * depth}{Path(folder).name}/", gloss(folder)
    if folder in FOLDED:
        return
    inside = [name[len(folder) :] for name in names if name.startswith(folder)]
    for name in inside:
        if "/" not in name and name != "__init__.py":
            yield f"{'  ' * (depth + 1)}{name}", gloss(folder + name)
    for name in dict.fromkeys(name.split("/")[0] for name in inside if "/" in name):
        yield from room(names, f"{folder}{name}/", depth + 1)


def tree() -> str:
    """The tree as README.md shows it."""
    names = tracked()
    rooms = [list(room(names, top)) for top in TOP if any(name.startswith(top) for name in names)]
    rooms.append(
        [(name, gloss(name)) for name in names if ("/" not in name and name != "README.md") or name == ".ci/run"]
    )
    lines = [f"{name:<{max(len(row[0]) for row in rows) + 2}}{text}" for rows in rooms for name, text in rows]
    return "\n".join(("```", *lines, "```"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rewrite the tree in README.md from the files.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if the tree is out of date")
    args = parser.parse_args(argv)
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    try:
        updated = f"{before}{BEGIN}\n{tree()}\n{END}{after}"
    except LookupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.check and updated != text:
        print("The tree in README.md is out of date: run python scripts/readme_tree.py", file=sys.stderr)
        return 1
    if not args.check:
        readme.write_text(updated, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
