"""ScienceQA prompt formats, and the benchmark's question file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.eval import scienceqa_prompts as prompts

PROBLEM = {"question": "Q?", "choices": ["x", "y"], "answer": 1, "hint": "", "lecture": "L", "solution": "S"}


def test_published_examples() -> None:
    assert prompts.model_input(PROBLEM, "QCM") == "Q?\nContext: N/A\nOptions: (A) x (B) y"
    assert prompts.model_input(PROBLEM, "CQM") == "Context: N/A\nQuestion: Q?\nOptions: (A) x (B) y"
    assert prompts.model_input(PROBLEM, "QCLEM").splitlines()[2:] == ["BECAUSE: L S", "Options: (A) x (B) y"]
    outputs = {code: prompts.model_output(PROBLEM, code) for code in prompts.OUTPUTS}
    assert outputs == {
        "A": "The answer is B.",
        "AL": "The answer is B. BECAUSE: S",
        "AE": "The answer is B. BECAUSE: L",
        "ALE": "The answer is B. BECAUSE: L S",
        "AEL": "The answer is B. BECAUSE: S L",
        "LA": "L The answer is B.",
        "EA": "S The answer is B.",
        "LEA": "L S The answer is B.",
        "ELA": "S L The answer is B.",
        "LEPA": "LECTURE: L\nSOLUTION: S\n###\nANSWER: B.",
    }
    bare = {**PROBLEM, "lecture": "", "solution": ""}
    assert prompts.model_output(bare, "ALE") == "The answer is B."
    assert prompts.model_output(bare, "LEA") == "The answer is B."
    assert prompts.model_input(bare, "QCML").endswith("(B) y")


@pytest.fixture
def base_dir(tmp_path: Path) -> Path:
    problems = {"1": {**PROBLEM, "image": "image.png", "hint": "H"}, "2": {**PROBLEM, "image": None}}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": ["1", "2"]}))
    return tmp_path


def test_the_question_file(base_dir: Path) -> None:
    path = Path(prompts.convert("convert_to_questions", base_dir, "test", None))
    assert path.name == "llava_test_CQM-A.json"
    first, second = json.loads(path.read_text())
    assert first["image"] == "1/image.png" and "image" not in second
    assert first["conversations"][0]["value"] == "<image>\nContext: H\nQ?\nA. x\nB. y"
    assert second["conversations"] == [{"from": "human", "value": "Q?\nA. x\nB. y"}, {"from": "gpt", "value": "B"}]


def test_jsonl_has_an_image_only_where_there_is_one(base_dir: Path) -> None:
    path = Path(prompts.convert("convert_to_jsonl", base_dir, "test", None))
    first, second = [json.loads(line) for line in path.read_text().splitlines()]
    assert first["instruction"].endswith("\n<image>") and "<image>" not in second["instruction"]
    assert set(second) == {"id", "instruction", "output"}
