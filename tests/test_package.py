"""Rules for the whole tree: public names, cheap imports, sizes, types, language, repetition, the file tree."""

from __future__ import annotations

import ast
import collections
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import llava

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "llava").rglob("*.py"))
SOURCES = MODULES + sorted(p for d in ("scripts", "playground", "benchmarks") for p in (ROOT / d).rglob("*.py"))
# Files run by path put their folder first on sys.path: a sibling with one of these names would be imported instead.
DEPENDENCIES = {"accelerate", "datasets", "deepspeed", "evaluate", "fastapi", "gradio", "matplotlib", "numpy", "peft"}
DEPENDENCIES |= {"pydantic", "requests", "safetensors", "tokenizers", "torch", "tqdm", "transformers", "uvicorn"}
WINDOW = 8
MAX_MODULES = 274
MAX_MODULE_LINES = 500
MAX_PACKAGE_LINES = 43_050
TINY, MAX_TINY_MODULES = 25, 12
MAX_FILES_IN = {"serve": 14, "eval": 34}
MAX_ANY = 450
# Entry programs under their published names, which may be a few lines.
PUBLISHED_PROGRAMS = {
    "eval": "eval_gpt_review eval_gpt_review_bench eval_gpt_review_visual eval_gqa eval_mmbench eval_mme eval_pope "
    "eval_science_qa eval_science_qa_gpt4 eval_science_qa_gpt4_requery eval_textvqa eval_vqa m4c_evaluator model_qa "
    "model_vqa model_vqa_loader model_vqa_mmbench model_vqa_science qa_baseline_gpt35 run_llava summarize_gpt_review",
    "train": "llama_flash_attn_monkey_patch train_custom train_mem train_mem_custom",
}
CITATION = re.compile(r"spec/[a-z]+\.md|\u00a7|users\.md|anchors\.md")
PHRASES = re.compile(
    r"that is no name|cannot be looked into|see to the rights|that is no frame|broke off|is told the share"
    r"|which parameters learn|beginnings of prompts|listening and leaving|stopping and going on"
    r"|is never replaced in silence|ports that cannot be|said at once",
    re.IGNORECASE,
)


def plain_environment() -> dict[str, str]:
    """The environment without coverage's hooks, for tests that measure a fresh interpreter."""
    return {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE")}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in SOURCES:
        yield name_of(path), ast.parse(path.read_text(encoding="utf-8"))


def test_public_names_are_sorted_complete_and_importable() -> None:
    assert llava.__all__ == sorted(llava.__all__)
    assert set(llava._MODULES) | {"__version__"} == set(llava.__all__)
    assert set(llava.__all__) <= set(dir(llava))
    for name in llava.__all__:
        assert getattr(llava, name) is not None


def test_an_unknown_name_is_an_attribute_error_that_lists_the_others() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'.*load_pretrained_model"):
        llava.nonsense  # noqa: B018


def fresh(program: str, *path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**plain_environment(), "PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT]))}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)


def test_importing_the_package_imports_nothing_heavy() -> None:
    done = fresh("import sys, llava, llava.errors, llava.constants, llava.conversation; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert not {"torch", "transformers", "numpy", "PIL"} & set(done.stdout.split())


def test_a_broken_flash_attn_does_not_break_imports_and_keeps_its_error(tmp_path: Path) -> None:
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c104cuda')\n", encoding="utf-8")
    done = fresh("import llava, llava.model.builder, llava.train.train; print('imported')", tmp_path)
    assert done.stdout.endswith("imported\n"), done.stderr
    done = fresh("from llava.utils import require; require('flash_attn', 'flash')", tmp_path)
    assert "DependencyError" in done.stderr
    assert "undefined symbol: _ZN3c104cuda" in done.stderr


def test_no_optional_package_is_needed_to_import_training_or_chat() -> None:
    """The base installation has none of these; None in `sys.modules` simulates their absence."""
    blocked = ["deepspeed", "bitsandbytes", "peft", "gradio", "fastapi", "flash_attn", "matplotlib", "wandb"]
    program = (
        "import sys\n"
        f"for name in {blocked}: sys.modules[name] = None\n"
        "import llava.model.builder, llava.train.train, llava.serve.cli, llava.engine, llava.doctor\n"
        "print('imported')\n"
    )
    done = fresh(program)
    assert done.stdout.endswith("imported\n"), done.stderr


def test_no_module_hides_the_standard_library_or_a_dependency() -> None:
    taken = sys.stdlib_module_names | DEPENDENCIES
    rooms = [path for path in MODULES if path.parent.name in ("train", "eval", "serve")]
    assert rooms
    assert [name_of(path) for path in rooms if path.stem in taken] == []


def test_no_bare_except_no_star_import_no_cuda_call() -> None:
    found = []
    for name, tree in trees():
        for node in ast.walk(tree):
            bare = isinstance(node, ast.ExceptHandler) and node.type is None
            star = isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
            cuda = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda"
            if bare or star or cuda:
                found.append(f"{name}:{node.lineno}")
    assert found == []


def test_every_module_has_a_docstring() -> None:
    silent = [name for name, tree in trees() if tree.body and not ast.get_docstring(tree)]
    assert silent == []


def lines_of(paths: Iterable[Path]) -> dict[str, int]:
    return {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}


def test_modules_are_short() -> None:
    lengths = lines_of(SOURCES)
    assert {name: length for name, length in lengths.items() if length > MAX_MODULE_LINES} == {}
    bodies = [length for name, length in lengths.items() if length and not name.endswith("__init__.py")]
    assert statistics.median(bodies) <= 150


def test_the_package_is_small() -> None:
    assert len(MODULES) <= MAX_MODULES
    assert sum(lines_of(MODULES).values()) <= MAX_PACKAGE_LINES


def test_few_modules_are_tiny() -> None:
    faces = {"__init__", "__main__"}
    published = {f"llava/{room}/{name}.py" for room, names in PUBLISHED_PROGRAMS.items() for name in names.split()}
    tiny = [name for name, length in lines_of(MODULES).items() if length < TINY and Path(name).stem not in faces]
    assert len(set(tiny) - published) <= MAX_TINY_MODULES, tiny


@pytest.mark.parametrize(("room", "most"), MAX_FILES_IN.items())
def test_rooms_have_few_files(room: str, most: int) -> None:
    files = [path.name for path in MODULES if path.parent == ROOT / "llava" / room]
    assert len(files) <= most, files


def test_types_are_concrete() -> None:
    """`Any` is for the borders of untyped libraries."""
    uses = {name_of(path): len(re.findall(r"\bAny\b", path.read_text(encoding="utf-8"))) for path in MODULES}
    assert sum(uses.values()) <= MAX_ANY, collections.Counter(uses).most_common(10)


def texts() -> Iterator[tuple[str, str]]:
    for folder in ("llava", "scripts", "scripts_internvl", "tests", "docs"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".sh", ".md", ".cpp", ".json", ".js", ".html") and path.is_file():
                yield name_of(path), path.read_text(encoding="utf-8")
    yield "README.md", (ROOT / "README.md").read_text(encoding="utf-8")


def one_line(text: str) -> str:
    """Text without line breaks, comment marks, and the quotes between adjacent string literals."""
    text = re.sub(r"""["']\s*\n\s*f?["']""", "", text)
    return " ".join(re.sub(r"\n\s*(#|//)", "\n", text).split())


def test_nothing_cites_a_document_outside_the_project() -> None:
    assert [(name, found[0]) for name, text in texts() if (found := CITATION.search(text))] == []


def test_plain_english() -> None:
    mine = name_of(Path(__file__))
    found = [(name, hit[0]) for name, text in texts() if name != mine for hit in PHRASES.finditer(one_line(text))]
    assert found == []


def test_images_are_called_images() -> None:
    python = [path for folder in ("llava", "scripts", "playground") for path in (ROOT / folder).rglob("*.py")]
    words = re.compile(r"pictures?(?![a-z])(?!\": len)", re.IGNORECASE)  # not the key of the request log
    assert [name_of(path) for path in python if words.search(path.read_text(encoding="utf-8"))] == []


def test_the_measures_of_language_see_what_they_forbid() -> None:
    assert all(CITATION.search(text) for text in ("see \u00a7 3", "(spec/" + "train.md)", "users" + ".md SEC-3"))
    text = 'raise Error(\n    "The worker broke "\n    f"off")  # and\n    # is told\n    # the share'
    assert [hit[0] for hit in PHRASES.finditer(one_line(text))] == ["broke off", "is told the share"]
    assert not PHRASES.search("the worker closed the connection")


def test_functions_are_short() -> None:
    lengths = {
        f"{name}:{node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for name, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    long = {name: length for name, length in lengths.items() if length > 50}
    assert len(long) <= 0.03 * len(lengths), long
    assert {name: length for name, length in long.items() if length > 90} == {}


def repeated_share(texts: dict[str, str]) -> tuple[float, list[str]]:
    """Fraction of non-blank lines in windows of 8 lines that occur more than once, and the starts of these windows."""
    lines = {name: [line.strip() for line in text.splitlines() if line.strip()] for name, text in texts.items()}
    places = collections.defaultdict(list)
    for name, rows in lines.items():
        for start in range(len(rows) - WINDOW + 1):
            places[tuple(rows[start : start + WINDOW])].append((name, start))
    again = [place for group in places.values() if len(group) > 1 for place in group]
    covered = {(name, start + k) for name, start in again for k in range(WINDOW)}
    total = sum(map(len, lines.values()))
    return len(covered) / total, sorted({f"{name} (non-blank line {start + 1})" for name, start in again})


def test_little_is_written_twice() -> None:
    python = {name_of(path): path.read_text(encoding="utf-8") for path in SOURCES}
    share, where = repeated_share(python)
    assert share <= 0.05, where


def test_the_repetition_measure_sees_a_copy() -> None:
    block = "\n".join(f"line_{k} = {k}" for k in range(10))
    assert repeated_share({"a": block, "b": "x = 1\n" + block})[0] > 0.9
    assert repeated_share({"a": block, "b": "y = 2"})[0] == 0


def test_the_file_tree_is_up_to_date() -> None:
    command = [sys.executable, "scripts/file_tree.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_tree_lists_every_module_of_the_package_and_nothing_else() -> None:
    """Parse the tree of docs/ARCHITECTURE.md independently: indentation to paths, compared with the files."""
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    block = text.split("<!-- tree:")[1].split("```")[1]
    listed, stack = set(), [""]
    for line in block.strip("\n").splitlines():
        name, _, gloss = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        stack[depth + 1 :] = [stack[depth] + name]
        assert gloss.strip(), f"{stack[-1]} has no gloss"
        listed.add(stack[-1])
    assert {entry for entry in listed if not (ROOT / entry).exists()} == set()
    modules = {name_of(path) for path in MODULES if path.name != "__init__.py"}
    assert modules == {entry for entry in listed if entry.startswith("llava/") and entry.endswith(".py")}
