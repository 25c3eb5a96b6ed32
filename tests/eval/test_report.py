"""`llava report`: tables, chart and page from score files; differences between two runs."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.eval import report
from llava.eval.benchmarks.registry import make_task
from llava.eval.reporting.chart import draw_chart
from llava.eval.reporting.data import compare, read_run
from tests.eval.benchdata import BENCHMARKS, make_everything
from tests.eval.conftest import read_jsonl, write_jsonl

NASTY = '<script>alert("x")</script> | **bold**'


def write_run(folder: Path, data: Path, model: str, scores: dict[str, float | None], text: str = "Yes") -> Path:
    """Write an output folder of `llava eval`."""
    for name, primary_metric in scores.items():
        root = data / BENCHMARKS[name][0]
        task = make_task(name, root)
        rows = [
            {"question_id": each.question_id, "prompt": each.prompt, "text": text, "metadata": {}}
            for each in task.questions()
        ]
        (folder / name).mkdir(parents=True)
        write_jsonl(folder / name / "answers.jsonl", rows)
        facts = {"questions": len(rows), "limit": None, "primary_metric": primary_metric, "data_root": str(root)}
        score = {"model_id": model, "task": name, "split": task.split, **facts}
        (folder / name / "score.json").write_text(json.dumps(score))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("report")
    data = make_everything(root / "eval")
    first = {"pope": 85.95, "gqa": 60.0, "mme": 1540.0, "vqav2": None, "easy_vqa": 88.0}
    ours = write_run(root / "a", data, "llava-v1.5-13b", first)
    return ours, write_run(root / "b", data, "mine", {"pope": 80.0, "gqa": 60.5}, NASTY)


def test_all_report_files_are_written(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([*map(str, runs), "--output-dir", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.strip() == shown.strip()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    zoo = [line for line in table if line[0] in ("published", "ours")]
    assert [line[0] for line in zoo] == ["published", "ours", "ours"]
    assert zoo[0][1:7] == ["LLaVA-1.5", "CLIP-L-336px", "V-13B", "336", "80.0", "63.3"] and zoo[1][5:7] == ["–", "60.0"]
    verdicts = {(line[0], line[1]): line[-1] for line in table if line[1] in BENCHMARKS}
    assert verdicts["llava-v1.5-13b", "pope"] == "inside" and verdicts["llava-v1.5-13b", "gqa"] == "outside"
    assert verdicts["llava-v1.5-13b", "mme"] == "inside" and verdicts["mine", "gqa"] == "nothing published"
    assert verdicts["llava-v1.5-13b", "vqav2"] == "scored by its server"
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "report.csv").read_text())))
    assert len(rows) == 7 and float(rows[0]["published"] or 0) in (80.0, 63.3)
    with Image.open(tmp_path / "out" / "report.png") as chart:
        assert chart.width > 1000 and chart.height > 500


def test_a_run_whose_question_file_is_gone_does_not_end_the_report(tmp_path: Path) -> None:
    data = make_everything(tmp_path / "data")
    folder = write_run(tmp_path / "a", data, "mine", {"pope": 80.0, "gqa": 60.5})
    task = make_task("gqa", data / BENCHMARKS["gqa"][0])
    task.question_path.unlink()
    assert report.main([str(folder), "--output-dir", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Errors: pope" in page and "No error analysis of gqa, mine: Cannot read" in page
    assert task.question_path.name in page


def test_the_page_embeds_images_and_escapes_answers(runs: tuple[Path, Path], tmp_path: Path) -> None:
    assert report.main([*map(str, runs), "--output-dir", str(tmp_path), "--samples", "2"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "http://" not in page and "https://" not in page
    assert page.count("data:image/jpeg;base64,") == 10 and page.count("data:image/png;base64,") == 1
    assert 'class="same">Yes' in page and ">reference<" in page


def test_missing_images_leave_the_text(runs: tuple[Path, Path], tmp_path: Path) -> None:
    score = json.loads((runs[0] / "gqa" / "score.json").read_text())
    copy = tmp_path / "run" / "gqa"
    copy.mkdir(parents=True)
    (copy / "score.json").write_text(json.dumps({**score, "data_root": str(tmp_path / "none"), "limit": 7}))
    write_jsonl(copy / "answers.jsonl", read_jsonl(runs[0] / "gqa" / "answers.jsonl"))
    assert report.main([str(tmp_path / "run"), "--output-dir", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("no image") == 6 and "only 7 questions" in page


def test_long_names_fit_the_chart(runs: tuple[Path, Path]) -> None:
    """matplotlib warns if they do not, and warnings are errors in tests."""
    run = read_run(runs[0])
    many = [dataclasses.replace(run, name=f"a-model-of-a-long-name ({'a/long/folder/' * 5}{n})") for n in range(6)]
    with Image.open(io.BytesIO(draw_chart(many))) as chart:
        assert chart.width > 1000


def test_a_subset_of_the_published_questions_is_not_compared(runs: tuple[Path, Path], tmp_path: Path) -> None:
    score = json.loads((runs[0] / "gqa" / "score.json").read_text())
    (tmp_path / "gqa").mkdir()
    (tmp_path / "gqa" / "score.json").write_text(json.dumps({**score, "published_questions": 12578}))
    assert [line.verdict for line in compare(read_run(tmp_path))] == ["7 questions of 12578"]


def test_two_runs_are_compared(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def manifest(run: Path, **identity: Any) -> None:
        content = {"identity": {"chunk": [0, 1], **identity}, "environment": {"packages": {"torch": run.name}}}
        (run / "gqa" / "answers.jsonl.manifest.json").write_text(json.dumps(content))

    manifest(runs[0], dtype="float32", decoding={"temperature": 0})
    manifest(runs[1], dtype="bfloat16", decoding={"temperature": 0})
    assert report.main(["--diff", *map(str, runs), "--output-dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "## gqa: 60.0 and 60.5 (+0.5)" in text and "7 of 7 answers" in text
    assert "| identity.dtype " in text and "bfloat16" in text and "environment.packages.torch" in text
    assert "temperature" not in text and "Only in" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["none"], "no TASK/score.json"),
        (["--diff", "RUN"], "compares two runs"),
        (["RUN", "--published", "x"], "No published scores for 'x'"),
        (["RUN", "--samples", "-1"], "at least 0"),
    ],
)
def test_errors_are_reported_in_one_line(
    flags: list[str], message: str, runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(runs[0]) if flag == "RUN" else flag for flag in flags]) == 2
    assert message in capsys.readouterr().err


def test_runs_of_one_model_are_distinguished(runs: tuple[Path, Path], tmp_path: Path) -> None:
    assert report.main([str(runs[0]), str(runs[0]), "--output-dir", str(tmp_path), "--samples", "0"]) == 0
    assert f"llava-v1.5-13b ({runs[0]})" in (tmp_path / "report.md").read_text()
