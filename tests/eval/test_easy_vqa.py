"""easy-VQA: scores, the question-only baseline, and `llava eval` on synthetic data."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from llava.errors import ConfigError, DataError
from llava.eval import main as evaluate
from llava.eval.benchmarks.easy_vqa import (
    EasyVQA,
    Prediction,
    normalize,
    question_only_baseline,
    read_items,
    score_predictions,
)
from llava.eval.benchmarks.registry import make_task
from tests.eval.conftest import read_jsonl

TRAINING = [("is it red?", "yes"), ("is it red?", "no"), ("is it red?", "no"), ("what shape?", "circle")]
needs_package = pytest.mark.skipif(importlib.util.find_spec("easy_vqa") is None, reason="easy-vqa is not installed")


@pytest.mark.parametrize(
    ("text", "plain"), [(" Yes. ", "yes"), ("RED", "red"), ("no", "no"), ("no..", "no."), ("", "")]
)
def test_normalize(text: str, plain: str) -> None:
    assert normalize(text) == plain


def test_score_by_group() -> None:
    items = [
        Prediction("is it red?", "yes", "Yes."),
        Prediction("is it red?", "no", "yes"),
        Prediction("what shape?", "circle", "Circle"),
        Prediction("what shape?", "triangle", "a triangle"),
        Prediction("what color?", "teal", "teal"),
    ]
    result = score_predictions(items, TRAINING)
    assert result["overall"] == {"n": 5, "correct": 3, "accuracy": 60.0}
    assert result["yes_no"]["accuracy"] == 50.0 and result["open"]["correct"] == 2
    assert result["question_only"]["overall"]["correct"] == 2  # "no" and "circle"; unseen questions count as wrong
    assert result["per_answer"]["triangle"] == {"n": 1, "correct": 0, "accuracy": 0.0}
    assert "60.00 %" in EasyVQA.table(result) and "40.00 %" in EasyVQA.table(result)


def test_groups_without_questions_have_no_accuracy() -> None:
    result = score_predictions([Prediction("is it red?", "yes", "yes")], TRAINING)
    assert result["open"] == {"n": 0, "correct": 0, "accuracy": None} and "–" in EasyVQA.table(result)
    with pytest.raises(DataError, match="no answers"):
        score_predictions([], TRAINING)


def test_ties_of_the_baseline_are_deterministic() -> None:
    assert (
        question_only_baseline([("q", "b"), ("q", "a")])
        == question_only_baseline([("q", "a"), ("q", "b")])
        == {"q": "a"}
    )


@needs_package
def test_official_split_and_baseline() -> None:
    task = make_task("easy_vqa")
    assert isinstance(task, EasyVQA) and len(task.questions()) == 9673
    assert (task.image_folder / task.questions()[0].images[0]).is_file()
    training = [(question, answer) for question, answer, _ in read_items(task.root / "train/questions.json")]
    items = [Prediction(question, answer, answer) for question, answer, _ in read_items(task.question_path)]
    result = score_predictions(items, training)
    assert result["overall"]["accuracy"] == 100.0
    assert result["question_only"]["overall"]["accuracy"] == pytest.approx(67.0, abs=0.1)
    assert len(result["per_answer"]) == 13 and len(task.questions(1000)) == 1000


def test_scorer_needs_no_torch() -> None:
    code = "import sys, llava.eval.benchmarks.easy_vqa; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    for split, count in (("train", 4), ("test", 6)):
        (tmp_path / split / "images").mkdir(parents=True)
        rows = []
        for image in range(count):
            Image.new("RGB", (64, 64), ("red", "blue")[image % 2]).save(tmp_path / split / "images" / f"{image}.png")
            rows += [["what color is the shape?", ("red", "blue")[image % 2], image], ["is it red?", "yes", image]]
        (tmp_path / split / "questions.json").write_text(json.dumps(rows))
    return tmp_path


def command(tiny_dirs: dict[str, Path], root: Path, *more: str) -> list[str]:
    base = ["--tasks", "easy_vqa", "--model-path", str(tiny_dirs["chat"]), "--device", "cpu", "--max-new-tokens", "3"]
    return [*base, "--data-root", str(root), "--output-dir", str(root / "out"), *more]


def test_command_answers_and_scores(
    tiny_dirs: dict[str, Path], data_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(command(tiny_dirs, data_root)) == 0
    shown = capsys.readouterr()
    assert "easy_vqa, test split\n" in shown.out and "question only" in shown.out and "12 answered" in shown.err
    result = json.loads((data_root / "out/easy_vqa/score.json").read_text())
    assert result["overall"]["n"] == 12 and result["model_id"] == "internvl-chat-tiny"
    rows = read_jsonl(data_root / "out/easy_vqa/answers.jsonl")
    assert [row["question_id"] for row in rows] == list(range(12))
    assert rows[0]["prompt"] == "what color is the shape?"
    assert evaluate.main(command(tiny_dirs, data_root)) == 0
    assert "12 reused" in capsys.readouterr().err


def test_limit_is_evenly_spaced_and_printed(
    tiny_dirs: dict[str, Path], data_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(command(tiny_dirs, data_root, "--limit", "4")) == 0
    assert "test split, 4 evenly spaced questions" in capsys.readouterr().out
    rows = read_jsonl(data_root / "out/easy_vqa/answers.jsonl")
    assert [row["question_id"] for row in rows] == [0, 3, 6, 9]


def test_a_missing_image_prevents_scoring(
    tiny_dirs: dict[str, Path], data_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data_root / "test/images/3.png").unlink()
    assert evaluate.main(command(tiny_dirs, data_root)) == 1
    assert not (data_root / "out/easy_vqa/score.json").exists()
    assert "2 question(s) failed" in capsys.readouterr().err
    with pytest.raises(DataError, match="not scored"):
        EasyVQA(data_root, "test").score(data_root / "out/easy_vqa/answers.jsonl")


def test_unknown_names_and_missing_data_are_reported_in_one_line(
    tiny_dirs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate.main(["--tasks", "pope2", "--model-path", "x"]) == 2
    assert "Unknown task 'pope2'; choose from vqav2" in capsys.readouterr().err
    assert evaluate.main(command(tiny_dirs, tmp_path)) == 2
    assert "questions.json" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no split 'dev'"):
        make_task("easy_vqa", None, "dev")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install easy-vqa"):
        make_task("easy_vqa").questions()
