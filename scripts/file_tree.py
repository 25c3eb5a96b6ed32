"""Write the file tree of docs/ARCHITECTURE.md: `python scripts/file_tree.py` (`--check` only compares).

The description of a file is its own first sentence: of a module's docstring, a script's first comment, or the first
paragraph of a page. Folders and files that have none are described in `GLOSSES`.
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
PAGE = "docs/ARCHITECTURE.md"
BEGIN, END = "<!-- tree: python scripts/file_tree.py -->", "<!-- end of tree -->"
WIDTH = 100
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
FOLDED = ("images/", "llava/eval/reporting/templates/", "tests/")
GLOSSES = {
    ".ci/run": "CI entry point: runs scripts/test.sh",
    ".dockerignore": "files left out of the container image",
    ".gitignore": "files left out of git: weights, data, caches",
    "CHANGELOG.md": "user-visible changes by version",
    "CONTRIBUTING.md": "development commands and conventions",
    "Dockerfile": "container image for serving, on CUDA or CPU",
    "LICENSE": "Apache-2.0",
    "SECURITY.md": "threat model, and how to report a vulnerability",
    "benchmarks/": "speed and memory benchmarks against the reference implementation's method",
    "compose.yaml": "controller, worker and web page as containers",
    "constraints.txt": "tested versions of all dependencies",
    "docs/": "documentation pages",
    "docs/deployment/": "configuration files for docs/Deployment.md",
    "docs/deployment/grafana.json": "Grafana dashboard",
    "docs/deployment/kubernetes/": "Kubernetes manifests: kubectl apply -k docs/deployment/kubernetes",
    "docs/deployment/systemd/": "systemd units",
    "docs/reference/": "API reference, generated from docstrings",
    "images/": "images of the documentation; images/README.md names the scripts that make them",
    "llava/": "the Python package",
    "llava/data/": "annotation files and images to training batches",
    "llava/engine/": "inference engine: continuous batching, prefix cache, streaming",
    "llava/engine/native/": "C++ decoding kernel for the CPU, compiled at first use",
    "llava/eval/": "benchmark evaluation",
    "llava/eval/benchmarks/": "one file per benchmark: prompt, scorer and preparation",
    "llava/eval/judging/": "LLM-as-a-judge reviews",
    "llava/eval/judging/page.html": "web page of reviews: styles, controls and script",
    "llava/eval/reporting/": "score tables, charts and comparisons of runs",
    "llava/eval/reporting/templates/": "pages of reports: Jinja templates and styles",
    "llava/serve/web/page.css": "styles of the web page",
    "llava/serve/web/page.js": "history of conversations in the browser, and copies of messages",
    "llava/eval/run/": "answering questions: runner, answer files, manifests, sharding",
    "llava/eval/table/": "judge prompts",
    "llava/eval/table/rule.json": "grading instructions per category",
    "llava/model/": "model definition, loading, saving, merging and export",
    "llava/model/language_model/": "language models that accept image features",
    "llava/model/multimodal_encoder/": "vision towers",
    "llava/model/multimodal_projector/": "projectors from image features to token embeddings",
    "llava/py.typed": "PEP 561 marker: the package is typed",
    "llava/self_test/": "checks of `llava doctor --self-test`",
    "llava/serve/": "terminal chat, controller, workers, web page, OpenAI-compatible API",
    "llava/serve/common/": "protocol, security, middleware and metrics shared by all servers",
    "llava/serve/control/": "controller: worker registry, request routing, OpenAI-compatible API",
    "llava/serve/web/": "Gradio web page",
    "llava/serve/worker/": "model worker: scheduling, preprocessing, local and OpenAI backends",
    "llava/train/inspect_data.html": "page of records as training sees them",
    "llava/train/model_card.jinja": "template of the model card",
    "llava/train/": "training: setup, Trainer, checkpoints, estimates",
    "mkdocs.yml": "settings of the documentation site",
    "playground/": "training data, and the scripts that make the quickstart's data and weights",
    "playground/data/": "annotation files and images",
    "pretrained/": "downloaded weights",
    "pyproject.toml": "package metadata, dependencies, and settings of ruff, mypy, pytest and coverage",
    "scripts/": "LLaVA recipes, converters, DeepSpeed configurations and development scripts",
    "scripts/images/": "scripts that make the images of the documentation",
    "scripts/v1_5/": "LLaVA-1.5 recipes",
    "scripts/v1_5/eval/": "one script per benchmark, for LLaVA-1.5-13B",
    "scripts/zero1.json": "DeepSpeed ZeRO stage 1: partitions optimizer states",
    "scripts/zero2.json": "DeepSpeed ZeRO stage 2: also partitions gradients (default of stage 1 of training)",
    "scripts/zero3.json": "DeepSpeed ZeRO stage 3: also partitions parameters (default of stage 2 of training)",
    "scripts/zero3_offload.json": "DeepSpeed ZeRO stage 3 with offload to CPU memory",
    "scripts_internvl/": "InternVL-Chat training recipes",
    "scripts_internvl/eval/": "one script per benchmark: sh scripts_internvl/eval/NAME.sh CHECKPOINT",
    "scripts_internvl/meta/": "data mixtures for --meta_path",
    "scripts_internvl/meta/custom_data.json": "example mixture",
    "tests/": "unit, property, golden-value, attack and end-to-end tests, laid out like llava/",
}


DESCRIBED = (".py", ".md", ".sh", ".cpp", ".h", ".conf", ".service", ".yml", ".yaml")  # files that describe themselves


def tracked() -> list[str]:
    """Paths of every file that belongs to the project, in a checkout or in an unpacked archive."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode == 0:
        names = listing.stdout.splitlines()
    else:
        skip = re.compile(r"(^|/)(\.venv|\.git|__pycache__|\.[a-z]+_cache|[^/]*\.egg-info|work_dirs|site)/")
        names = [name for path in ROOT.rglob("*") if not skip.search(name := path.relative_to(ROOT).as_posix())]
    return sorted(name for name in names if (ROOT / name).is_file())


def sentence(text: str) -> str:
    """The first sentence without its full stop; a long one is cut at a clause, otherwise at a word."""
    line = re.split(r"(?<=[^.].)\.(?=\s|$)", " ".join(text.split("\n\n")[0].split()), maxsplit=1)[0]
    line = re.sub(r" \((paper|arXiv)[^)]*\)?|\[([^]]*)\]\([^)]*\)", r"\2", line)
    while len(line) > WIDTH and (clause := re.match(r"(.{20,})(?:[;:]| \(| —) ", line)):
        line = clause[1]
    return line.rstrip(".") if len(line) <= WIDTH else line[: line.rindex(" ", 0, WIDTH - 2)].rstrip(",;") + " …"


def first_words(path: Path) -> str | None:
    """A file's description of itself, or None: docstring, first comment, or first paragraph below a page's title."""
    if path.suffix not in DESCRIBED or not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return ast.get_docstring(ast.parse(text))
    if path.suffix == ".md":
        prose = re.compile(r"[A-Z0-9*`\[]")
        return next((block for block in text.split("\n\n")[1:] if prose.match(block) and block[:3] != "```"), None)
    mark = "// " if path.suffix in (".cpp", ".h") else "# (?!shellcheck)"
    return next((line.lstrip("#/ ") for line in text.splitlines() if re.match(mark, line)), None)


def gloss(name: str) -> str:
    """Description of `name`, a path from the root; folders end in `/`. Raises LookupError if there is none."""
    path = ROOT / name / ("__init__.py" if name.endswith("/") else "")
    found = GLOSSES.get(name) or first_words(path)
    if not found:
        raise LookupError(
            f"{name} has no description: write a first docstring, comment or paragraph, or add to GLOSSES"
        )
    return sentence(found)


def room(names: Sequence[str], folder: str, depth: int = 0) -> Iterator[tuple[str, str]]:
    """(indented name, description) of a folder and, unless it is folded, of its files and then its folders."""
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
    """The tree in a code block. Raises LookupError for a file without description, or a description without file."""
    names = tracked()
    if gone := sorted(name for name in GLOSSES if not (ROOT / name).exists()):
        raise LookupError(f"GLOSSES describes {', '.join(gone)}, which does not exist; remove or rename the entry")
    rooms = [list(room(names, top)) for top in TOP if any(name.startswith(top) for name in names)]
    rooms.append([(name, gloss(name)) for name in names if "/" not in name or name == ".ci/run"])
    lines = [f"{name:<{max(len(row[0]) for row in rows) + 2}}{text}" for rows in rooms for name, text in rows]
    return "\n".join(("```", *lines, "```"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=f"Write the file tree of {PAGE}.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if the tree is out of date")
    args = parser.parse_args(argv)
    page = ROOT / PAGE
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    try:
        updated = f"{before}{BEGIN}\n{tree()}\n{END}{after}"
    except LookupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.check and updated != text:
        print(f"The tree in {PAGE} is out of date: run python scripts/file_tree.py", file=sys.stderr)
        return 1
    if not args.check:
        page.write_text(updated, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
