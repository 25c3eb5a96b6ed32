"""Rules that hold for the whole tree: public names, cheap imports, sizes, repetition, and the README's tree."""

from __future__ import annotations

import ast
import collections
import importlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llava

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "llava").rglob("*.py"))
SOURCES = MODULES + sorted(p for d in ("scripts", "playground", "benchmarks") for p in (ROOT / d).glob("*.py"))
# Files run by path put their folder first on sys.path: a sibling with one of these names would be imported instead.
DEPENDENCIES = {"accelerate", "datasets", "deepspeed", "evaluate", "fastapi", "gradio", "matplotlib", "numpy", "peft"}
DEPENDENCIES |= {"pydantic", "requests", "safetensors", "tokenizers", "torch", "tqdm", "transformers", "uvicorn"}
WINDOW = 8


def plain_environment() -> dict[str, str]:
    """This process's environment without coverage's hooks, for tests that measure a fresh interpreter."""
    return {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE")}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in SOURCES:
        yield name_of(path), ast.parse(path.read_text(encoding="utf-8"))


def test_public_names_are_sorted_complete_and_importable() -> None:
    assert llava.__all__ == sorted(llava.__all__)
    assert set(llava._HOME) | {"__version__"} == set(llava.__all__)
    assert set(llava.__all__) <= set(dir(llava))
    for name in llava.__all__:
        assert getattr(llava, name) is not None


def test_an_unknown_name_is_an_attribute_error_that_lists_the_others() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'.*load_pretrained_model"):
        llava.nonsense  # noqa: B018


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("llava.constants", "IGNORE_INDEX IMAGE_TOKEN_INDEX DEFAULT_IMAGE_TOKEN DEFAULT_IM_START_TOKEN LOGDIR"),
        ("llava.conversation", "SeparatorStyle Conversation conv_templates default_conversation"),
        (
            "llava.mm_utils",
            "tokenizer_image_token process_images expand2square load_image_from_base64 get_model_name_from_path "
            "KeywordsStoppingCriteria",
        ),
        ("llava.utils", "build_logger disable_torch_init violates_moderation pretty_print_semaphore"),
        ("llava.model.builder", "load_pretrained_model"),
        ("llava.train.llava_trainer", "LLaVATrainer LengthGroupedSampler get_modality_length_grouped_indices"),
        (
            "llava.train.train",
            "ModelArguments DataArguments TrainingArguments LazySupervisedDataset DataCollatorForSupervisedDataset "
            "preprocess preprocess_multimodal make_supervised_data_module train main",
        ),
    ],
)
def test_published_names_stay_importable(module: str, names: str) -> None:
    loaded = importlib.import_module(module)
    assert [name for name in names.split() if not hasattr(loaded, name)] == []


def fresh(program: str, *path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**plain_environment(), "PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT]))}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)


def test_importing_the_package_imports_nothing_heavy() -> None:
    done = fresh("import sys, llava, llava.errors, llava.constants, llava.conversation; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert not {"torch", "transformers", "numpy", "PIL"} & set(done.stdout.split())


def test_a_broken_flash_attn_does_not_break_the_import_and_keeps_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c104cuda')\n", encoding="utf-8")
    done = fresh("import llava, llava.model.builder, llava.train.train; print('imported')", tmp_path)
    assert done.stdout.endswith("imported\n"), done.stderr
    done = fresh("from llava.utils import require; require('flash_attn', 'flash')", tmp_path)
    assert "DependencyError" in done.stderr
    assert "undefined symbol: _ZN3c104cuda" in done.stderr


def test_no_optional_package_is_needed_to_import_training_or_chat() -> None:
    """The base install has none of these; a finder that refuses them stands for their absence."""
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


def test_every_module_says_what_it_is_for() -> None:
    silent = [name for name, tree in trees() if tree.body and not ast.get_docstring(tree)]
    assert silent == []


def test_modules_are_short() -> None:
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > 500} == {}
    bodies = [length for name, length in lengths.items() if length and not name.endswith("__init__.py")]
    assert statistics.median(bodies) <= 150


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
    """The share of non-blank lines inside windows of 8 lines that occur more than once, and where they start."""
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
