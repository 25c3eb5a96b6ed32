"""Local tasks of lmms-eval: the data of `llava eval` in the columns that lmms-eval reads."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from llava.eval import main as evaluate
from llava.eval.benchmarks.lmms_tasks import TASKS, VISUALS, documents
from llava.eval.benchmarks.registry import make_task
from tests.eval.benchdata import BENCHMARKS, make_everything
from tests.eval.conftest import read_jsonl


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_everything(tmp_path_factory.mktemp("data") / "eval")


@pytest.fixture
def interpreter(tmp_path: Path) -> str:
    """A program in the place of the Python of an environment with lmms-eval."""
    folder = tmp_path / "lmms eval" / "lmms_eval"
    for config, _ in TASKS.values():
        path = folder / "tasks" / config
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("task: x\n")
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho '{folder}'\n")
    program.chmod(0o755)
    return str(program)


def first(name: str, data: Path, split: str | None = None) -> dict[str, Any]:
    task = make_task(name, data / BENCHMARKS[name][0], split)
    rows = documents(task, task.questions())
    images = [row.pop("image") for row in rows]
    assert all(image is None or Path(image).is_file() for image in images)
    return rows[0]


def test_rows_have_the_columns_of_lmms_eval(data: Path) -> None:
    assert first("pope", data) == {
        "question_id": 0, "question": "Is there a cat in the image?", "answer": "yes", "category": "adversarial",
    }  # fmt: skip
    assert first("gqa", data) == {"question_id": "0", "question": "Q0?", "answer": "yes"}
    assert first("vqav2", data, "val")["answers"] == [{"answer": "yes", "answer_id": n} for n in range(10)]
    found = first("vizwiz", data, "val")
    assert found["answers"] == ["yes"] * 10 and found["question"] == "What?"
    found = first("textvqa", data)
    assert (found["question"], found["answers"], found["ocr_tokens"]) == ("Q0?", ["stop"] * 10, [])
    found = first("science_qa", data)
    assert {key: found[key] for key in ("question", "choices", "answer", "hint")} == {
        "question": "Q?", "choices": ["x", "y"], "answer": 1, "hint": "",
    }  # fmt: skip
    found = first("mme", data)
    assert found["question"] == "Is it? Please answer yes or no." and found["answer"] == "Yes"
    assert found["category"] == found["question_id"].split("/")[0]


def test_prepare_writes_tasks_that_include_those_of_lmms_eval(
    data: Path, interpreter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tasks"
    flags = ["prepare", "pope,gqa", "--eval-data", str(data), "--lmms-eval", interpreter, "--output-dir", str(output)]
    assert evaluate.main(flags) == 0
    assert capsys.readouterr().out == f"lmms-eval --include_path {output} --tasks local_pope,local_gqa\n"
    config = tmp_path / "lmms eval" / "lmms_eval" / "tasks" / "pope" / "pope.yaml"
    lines = (output / "local_pope.yaml").read_text().splitlines()
    assert f'include: "{config}"' in lines and "task: local_pope" in lines
    assert f'dataset_kwargs: {{data_files: {{test: "{output / "pope.jsonl"}"}}}}' in lines
    rows = read_jsonl(output / "pope.jsonl")
    assert len(rows) == 6 and rows[0]["image"] == str(data / "pope" / "val2014" / "1.jpg")
    assert evaluate.main([*flags, "--limit", "3"]) == 0
    asked = make_task("pope", data / "pope").questions(3)
    assert [row["question_id"] for row in read_jsonl(output / "pope.jsonl")] == [each.question_id for each in asked]
    space: dict[str, Any] = {}
    exec(VISUALS, space)
    (image,) = space["image"](rows[0])
    assert (image.mode, image.size) == ("RGB", (40, 30)) and space["image"]({"image": None}) == []


def test_impossible_tasks_are_refused_with_the_remedy(
    data: Path, interpreter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str) -> str:
        flags = ["prepare", *words, "--eval-data", str(data), "--output-dir", str(tmp_path / "tasks")]
        assert evaluate.main(flags) == 2
        return capsys.readouterr().err

    assert "no local task for mmbench; choose from vqav2, gqa" in refused("mmbench", "--lmms-eval", interpreter)
    assert "use --split val" in refused("vqav2", "--lmms-eval", interpreter)
    assert "give the python of the environment" in refused("gqa", "--lmms-eval", str(tmp_path / "none"))
    assert "give the python of the environment" in refused("gqa", "--lmms-eval", sys.executable)
    Path(interpreter).write_text(f"#!/bin/sh\necho '{tmp_path}'\n")
    assert "are tested with version 0.7.3" in refused("gqa", "--lmms-eval", interpreter)


def test_a_task_file_is_yaml(data: Path, interpreter: str, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    flags = ["prepare", "gqa", "--eval-data", str(data), "--lmms-eval", interpreter, "--output-dir", str(tmp_path)]
    assert evaluate.main(flags) == 0
    found = yaml.load((tmp_path / "local_gqa.yaml").read_text(), Loader)
    assert found["dataset_kwargs"] == {"data_files": {"test": str(tmp_path / "gqa.jsonl")}}
    assert found["doc_to_visual"] == "visuals.image" and found["dataset_name"] is None
    assert json.loads(json.dumps(found))["process_docs"] is None
