"""Every printed metric has an interval around exactly the printed score, in every benchmark."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llava.errors import DataError
from llava.eval import main as evaluate
from llava.eval import report
from llava.eval.benchmarks.outcomes import FILE
from llava.eval.benchmarks.registry import TASKS, make_task
from llava.eval.outcomes import read_outcomes
from llava.eval.reporting.chart import draw_chart
from llava.eval.reporting.data import read_run
from llava.eval.reporting.paired import compare_runs
from tests.eval.benchdata import ASK, BENCHMARKS, dump, make_everything, save_image
from tests.eval.conftest import read_jsonl, write_jsonl
from tests.eval.fake_server import FakeServer

SPLITS = {"vqav2": "val", "vizwiz": "val"}
# answers of which some are right, some wrong, and some empty
TEXTS = {
    "pope": ["Yes", "No", "", "yes", "Yes", "no"], "mme": ["Yes", "No", "Yes", "Yes", "other", "No"],
    "mmbench": ["A", "B", "A"], "mmbench_cn": ["A", "A", "(C)"], "seed": ["A", "The answer is B."],
    "science_qa": ["B", "The answer is B"], "textvqa": ["Stop.", "go"], "gqa": ["Yes.", "no"], "vqav2": ["yes", "no"],
    "vizwiz": ["Yes", "no"],
}  # fmt: skip
RIGHT, SOME = ["No", "Yes"], ["No", "Yes", "No", "Yes", "Yes"]  # answers to POPE
COUNTS = {"n", "correct", "unread", "answers", "missing", "other", "counts", "n_failed", "judge", "intervals"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_everything(tmp_path_factory.mktemp("data") / "eval")


def answer(name: str, root: Path, folder: Path, texts: list[str], split: str | None = None) -> Path:
    rows = []
    for at, each in enumerate(make_task(name, root, split).questions()):
        rounds = {} if each.round_id is None else {"round_id": each.round_id}
        text = texts[at % len(texts)]
        rows.append({"question_id": each.question_id, **rounds, "prompt": each.prompt, "text": text, "metadata": {}})
    folder.mkdir(parents=True, exist_ok=True)
    return write_jsonl(folder / "answers.jsonl", rows)


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, float]]:
    """Numbers of the scores by path, without counts."""
    if isinstance(value, dict):
        for key, each in value.items():
            if key not in COUNTS:
                yield from leaves(each, (*path, key))
    elif isinstance(value, list | tuple):
        for at, each in enumerate(value):
            yield from leaves(each, (*path, str(at)))
    elif isinstance(value, float):
        yield "/".join(path), value


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_metric_has_an_interval_around_its_value(
    name: str, data: Path, tmp_path: Path, judge: FakeServer
) -> None:
    judge.replies = [(200, text) for text in ("0.5", "1.0")] if name == "mm_vet" else [(200, "8 6"), (200, "9 10")]
    task = make_task(name, data / BENCHMARKS[name][0], SPLITS.get(name))
    path = answer(name, data / BENCHMARKS[name][0], tmp_path, TEXTS.get(name, ["yes", "red"]), SPLITS.get(name))
    scores = task.score(path)
    printed = dict(leaves(scores))
    outcomes = read_outcomes(tmp_path / FILE)
    found = {metric.name: metric.estimate for metric in task.metrics(outcomes)}
    assert found.keys() == scores["intervals"].keys() and printed.keys() <= found.keys()
    assert {key: found[key] for key in printed} == pytest.approx(printed)
    assert task.metric in found and found[task.metric] == pytest.approx(task.primary_metric(scores))
    assert len(set(outcomes.ids)) == len(read_jsonl(path)) == len(read_jsonl(tmp_path / FILE))
    assert any(0 < value < 100 for value in found.values())  # the answers are a mixture
    for key, each in scores["intervals"].items():
        assert each is None or each["low"] <= found[key] <= each["high"]


def test_splits_of_servers_and_old_runs_have_no_outcomes(data: Path, tmp_path: Path) -> None:
    path = answer("vqav2", data / "vqav2", tmp_path, ["yes"])
    (tmp_path / FILE).write_text("of an earlier run with labels\n")
    assert "intervals" not in make_task("vqav2", data / "vqav2").score(path)
    assert not (tmp_path / FILE).exists()
    with pytest.raises(DataError, match=r"outcomes\.jsonl is missing; score the run again: llava eval"):
        read_outcomes(tmp_path / FILE)


def make_many(root: Path, images: int = 12) -> Path:
    """POPE with an image for each six questions, half of them about what is not there, and GQA with two an image."""
    labels, rows = [], []
    for image in range(images):
        save_image(root / "pope" / "val2014" / f"{image}.jpg")
        for thing in range(6):
            row = {"image": f"{image}.jpg", "text": f"Is there a thing {thing}?"}
            labels.append({**row, "label": "yes" if thing % 2 else "no"})
            rows.append({**row, "text": row["text"] + ASK, "category": "random", "question_id": len(rows)})
    for kind in ("random", "popular", "adversarial"):
        (root / "pope" / "coco").mkdir(exist_ok=True)
        write_jsonl(root / "pope" / "coco" / f"coco_pope_{kind}.json", labels)
    write_jsonl(root / "pope" / "llava_pope_test.jsonl", rows)
    asked = [{"question_id": str(n), "image": f"{n // 2}.jpg", "text": f"Q{n}?{ASK}"} for n in range(2 * images)]
    save_image(root / "gqa" / "data" / "images" / "0.jpg")
    write_jsonl(root / "gqa" / "llava_gqa_testdev_balanced.jsonl", asked)
    label = {"answer": "yes", "types": {"structural": "verify"}}
    labels_path = root / "gqa" / "data" / "testdev_balanced_questions.json"
    dump(labels_path, {row["question_id"]: label for row in asked})
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs of POPE and GQA, scored by `llava eval --score-only`."""
    root = tmp_path_factory.mktemp("many")
    data = make_many(root / "data")
    texts = {"a": {"pope": RIGHT, "gqa": ["yes", "yes", "no"]}, "b": {"pope": SOME, "gqa": ["yes"]}}
    for run, tasks in texts.items():
        for name, cycle in tasks.items():
            answer(name, data / name, root / run / name, cycle)
        flags = ["--tasks", "pope,gqa", "--eval-data", str(data), "--output-dir", str(root / run), "--score-only"]
        assert evaluate.main([*flags, "--model-path", f"model-{run}"]) == 0
    return root / "a", root / "b"


def test_scores_are_printed_and_written_with_intervals(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    score = json.loads((runs[1] / "pope" / "score.json").read_text())
    interval = score["primary_interval"]
    assert interval == score["intervals"]["mean_f1"] and interval["clusters"] == 12
    assert interval["low"] < score["primary_metric"] < interval["high"] and interval["detectable"] > 0
    text = TASKS["pope"].summary(score)
    assert "95 % confidence intervals, clustered by image:" in text
    assert f"{interval['low']:.5g} to {interval['high']:.5g}" in text and "categories/random/yes_ratio" in text
    perfect = json.loads((runs[0] / "pope" / "score.json").read_text())["primary_interval"]
    assert perfect["high"] == 100 and 70 < perfect["low"] < 80  # 12 images, not 72 answers


def test_reports_show_intervals_in_table_csv_chart_and_page(runs: tuple[Path, Path], tmp_path: Path) -> None:
    assert report.main([str(runs[1]), "--output-dir", str(tmp_path), "--samples", "0"]) == 0
    interval = json.loads((runs[1] / "pope" / "score.json").read_text())["primary_interval"]
    shown = f"{interval['low']:.1f}–{interval['high']:.1f}"
    text, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    assert f"| {shown} " in text and f">{shown}<" in page and "95 % CI" in text
    with (tmp_path / "report.csv").open(newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["task"] == "pope")
    assert {key: float(row[key]) for key in interval if key != "value"} == {
        key: value for key, value in interval.items() if key != "value"
    }
    run = read_run(runs[1])
    without = {name: {**score, "primary_interval": None} for name, score in run.scores.items()}
    assert draw_chart([run]) != draw_chart([dataclasses.replace(run, scores=without)])


def test_runs_are_compared_task_by_task_with_a_correction(runs: tuple[Path, Path]) -> None:
    pope, gqa = sorted(compare_runs(*map(read_run, runs)), key=lambda each: each.task, reverse=True)
    assert (pope.task, pope.metric, gqa.task, gqa.metric) == ("pope", "mean_f1", "gqa", "accuracy")
    wrong = [str(n) for n in range(72) if (SOME[n % 5] == "Yes") != n % 2]
    assert pope.first == 100 > pope.second and (pope.gained, pope.lost) == ([], wrong)
    assert pope.p_value <= pope.p_adjusted <= 2 * pope.p_value and pope.significant
    assert gqa.difference is not None and gqa.difference.low < gqa.difference.value == pytest.approx(100 / 3)
    assert gqa.gained == [str(n) for n in range(2, 24, 3)] and gqa.detectable is not None
    with pytest.raises(DataError, match="no scored benchmark and split in common"):
        compare_runs(read_run(runs[0]), read_run(other_split(runs[1])))


def other_split(folder: Path) -> Path:
    """The run with scores of another split."""
    copy = folder.parent / "other" / "gqa"
    copy.mkdir(parents=True, exist_ok=True)
    score = json.loads((folder / "gqa" / "score.json").read_text())
    (copy / "score.json").write_text(json.dumps({**score, "split": "another"}))
    return copy.parent
