"""Error analysis: kinds of answers, groups, confusion, yes-bias, and their panel."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

import pytest

from llava.eval import report
from llava.eval.benchmarks.base import Reading
from llava.eval.benchmarks.registry import make_task
from llava.eval.reporting.errors import KINDS, NOT_RECORDED, Analysis, Answer, YesBias, analyse, confusion_matrix
from llava.eval.reporting.page import render_page
from llava.eval.reporting.sides import load_side
from tests.eval.benchdata import BENCHMARKS, make_everything
from tests.eval.conftest import read_jsonl, write_jsonl


def answer(
    text: str, reference: str, score: float = 0.0, label: str | None = None, unread: bool = False, **facts: Any
) -> Answer:
    row = {"prompt": facts.pop("prompt", "Is it?"), "text": text, "metadata": facts}
    return Answer(row, score, Reading(text.lower() if label is None else label, unread), reference)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("correct", answer("yes", "yes", 1.0)),
        ("partly", answer("red", "dark red", 0.6)),
        ("wrong", answer("no", "yes")),
        ("wrong", answer("yes, there is no dog", "no", label="yes")),
        ("empty", answer(" \n", "yes", label="", unread=True)),
        ("empty", answer("<think>yes", "yes", label="", unread=True)),
        ("truncated", answer("It is a", "cat", finish_reason="length")),
        ("correct", answer("cat", "cat", 1.0, finish_reason="length")),
        ("refused", answer("I'm sorry, I can't tell.", "yes", label="other", unread=True)),
        ("refused", answer("抱歉，我不知道", "A", label="", unread=True)),
        ("format", answer("Sure, yes it is", "yes", label="other", unread=True)),
        ("format", answer("The dog.", "dog", label="the dog")),
        ("format", answer("(B).", "B", label="", unread=True)),
        ("unread", answer("A. or B.", "B", label="", unread=True)),
        ("unread", answer("perhaps", "yes", label="other", unread=True)),
    ],
)
def test_kinds(kind: str, given: Answer) -> None:
    assert given.kind == kind and kind in KINDS


def test_groups_by_recorded_properties() -> None:
    small = {"image_sizes": [[300, 200]], "image_tokens": 576}
    answers = [answer("a", "a", 1.0, prompt="What color?", **small)] * 6 + [answer("b", "c", prompt="Where is it?")] * 2
    tables = analyse(answers).tables
    assert [(group.name, group.count, group.accuracy) for group in tables["question type"]] == [
        ("what color", 6, 100.0), ("where is", 2, 0.0),
    ]  # fmt: skip
    assert [group.name for group in tables["frequency of the reference"]] == ["to 5", "to 20"]
    assert [group.name for group in tables["image size (megapixels)"]] == ["to 0.1", NOT_RECORDED]
    assert [group.name for group in tables["image tokens"]] == ["576", NOT_RECORDED]
    assert all(group.low <= group.accuracy <= group.high for groups in tables.values() for group in groups)
    many = [answer("a", "a", 1.0, prompt=f"q{n} x") for n in range(40)]
    types = analyse(many).tables["question type"]
    assert len(types) == 12 and types[-1].count == 29 and sum(group.count for group in types) == 40


def test_confusion_of_closed_sets_only() -> None:
    pairs = [("yes", "yes"), ("no", "yes"), ("other", "yes"), ("no", "no")]
    labels, cells = confusion_matrix([answer(text, reference) for text, reference in pairs])
    assert labels == ["no", "yes"] and cells == [[1, 0, 0], [1, 1, 1]]
    assert confusion_matrix([answer("x", str(n)) for n in range(20)]) == ([], [])
    assert confusion_matrix([answer("x", "")] * 2) == ([], [])


def test_yes_bias_is_that_of_signal_detection() -> None:
    def bias(hits: int, alarms: int) -> YesBias:
        cells = [("yes", "yes", hits), ("no", "yes", 100 - hits), ("yes", "no", alarms), ("no", "no", 100 - alarms)]
        found = YesBias.of([answer(text, reference) for text, reference, count in cells for _ in range(count)])
        assert found is not None
        return found

    fair, eager = bias(84, 16), bias(98, 60)
    assert fair.yes_ratio == fair.true_ratio == 0.5 and fair.criterion == pytest.approx(0) and fair.d_prime > 1.9
    assert eager.criterion < -0.5 and eager.yes_ratio == 0.79
    assert math.isfinite(bias(100, 0).d_prime)
    assert YesBias.of([answer("yes", "yes")]) is None and YesBias.of([answer("a", "b")]) is None


def test_the_panel_escapes_names_and_shows_every_kind() -> None:
    answers = [answer("yes", "yes", 1.0), answer("no", "yes"), answer("", "no", unread=True, label="")]
    panel = render_page([], None, {}, [("<b>", {"<i>": analyse(answers)}, {})])
    assert "<b>" not in panel.replace("<b style", "").replace("<b>1</b>", "") and "&lt;i&gt;" in panel
    assert all(f"k-{kind}" in panel for kind in ("correct", "wrong", "empty")) and "Yes-bias" in panel


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_analysed_or_says_why_not(name: str, tmp_path: Path) -> None:
    data = make_everything(tmp_path / "data")
    root = data / BENCHMARKS[name][0]
    task = make_task(name, root)
    rows = [
        {"question_id": each.question_id, **({} if each.round_id is None else {"round_id": 0}), "prompt": each.prompt,
         "text": "Yes", "metadata": {}}
        for each in task.questions()
    ]  # fmt: skip
    (tmp_path / name).mkdir()
    write_jsonl(tmp_path / name / "answers.jsonl", rows)
    score = {"task": name, "split": task.split, "data_root": str(root), "limit": None}
    graded = name in ("llava_bench", "llava_bench_coco", "mm_vet")
    side = load_side(tmp_path, {**score, "judge": {}} if graded else score)
    if graded or name in ("vqav2", "vizwiz"):
        assert not side.answers and side.unscored in (
            "a judge grades the answers",
            "only a server can score the answers",
        )
    else:
        assert analyse(side.answers).total.count == len(rows)


def golden_pope(golden: Path, folder: Path) -> Analysis:
    source = golden / "eval" / "pope_full"
    for path in source.rglob("*.gz"):
        target = folder / path.relative_to(source).with_suffix("")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(gzip.decompress(path.read_bytes()))
    (folder / "run" / "pope").mkdir(parents=True)
    write_jsonl(folder / "run" / "pope" / "answers.jsonl", read_jsonl(folder / "answers" / "llava-v1.5-13b.jsonl"))
    return analyse(load_side(folder / "run", {"task": "pope", "split": "test", "data_root": str(folder)}).answers)


@pytest.mark.golden
def test_published_pope_answers(golden_dir: Path, tmp_path: Path) -> None:
    """The counts of the published scorer, split by kind; LLaVA-1.5-13B says yes too rarely."""
    found = golden_pope(golden_dir, tmp_path)
    assert found.total.kinds == {"correct": 7749, "wrong": 1161}
    assert found.labels == ["no", "yes"] and found.confusion == [[4203, 207, 0], [954, 3546, 0]]
    types = {group.name: group for group in found.tables["question type"]}
    assert types["adversarial"].accuracy == pytest.approx(85.5) and types["random"].accuracy == pytest.approx(
        88.007, abs=1e-3
    )
    assert types["adversarial"].low < 85.5 < types["adversarial"].high
    bias = found.bias["adversarial"]
    assert bias.yes_ratio == pytest.approx(0.433) and bias.true_ratio == 0.5 and bias.criterion > 0.2
    assert bias.d_prime < found.bias["popular"].d_prime < found.bias["random"].d_prime


def test_the_report_shows_the_analysis(tmp_path: Path) -> None:
    data = make_everything(tmp_path / "data")
    (tmp_path / "run" / "gqa").mkdir(parents=True)
    rows = [{"question_id": each.question_id, "prompt": each.prompt, "text": "yes" if n else "no"}
            for n, each in enumerate(make_task("gqa", data / "gqa").questions())]  # fmt: skip
    write_jsonl(tmp_path / "run" / "gqa" / "answers.jsonl", rows)
    score = '{"model_id": "m", "task": "gqa", "split": "testdev_balanced", "primary_metric": null, "data_root": "%s"}'
    (tmp_path / "run" / "gqa" / "score.json").write_text(score % (data / "gqa"))
    assert report.main([str(tmp_path / "run"), "--output-dir", str(tmp_path), "--samples", "0"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "Errors: gqa" in page and "k-correct" in page and "http" not in page
