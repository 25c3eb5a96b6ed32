"""`llava eval --tasks all` on synthetic data in the official layouts, and the tasks' answers and scores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from llava.engine.sequence import SamplingParams
from llava.errors import DataError
from llava.eval import main as evaluate
from llava.eval.benchmarks import science_qa
from llava.eval.benchmarks.registry import TASKS, make_task, make_tasks
from llava.eval.run.manifest import scorer_record
from llava.eval.run.questions import LETTER_SUFFIX, LETTER_SUFFIX_CN, Question
from llava.eval.run.runner import Answer, RunSettings
from llava.eval.run.runner import run as answer_all
from llava.eval.run.shards import shard_path, shards_folder
from tests.eval.benchdata import ASK, BENCHMARKS, make_everything
from tests.eval.conftest import read_jsonl, write_jsonl
from tests.eval.fake_server import FakeServer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_everything(tmp_path_factory.mktemp("data") / "eval")


def grades(body: dict[str, Any]) -> tuple[int, str]:
    """Replies of a judge: grade 0.5, or scores 8 and 6."""
    return 200, "0.5" if body["messages"][-1]["content"].endswith("Grade:") else "8 6\nThe second is shorter."


@pytest.fixture(scope="module")
def run(tiny_dirs: dict[str, Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The output folder of `llava eval --tasks all`."""
    output = tmp_path_factory.mktemp("run")
    judge = FakeServer(grades)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_BASE_URL", judge.url)
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        patch.setattr("llava.eval.benchmarks.easy_vqa.package_data", lambda: data / "easy_vqa")
        flags = ["--tasks", "all", "--model-path", str(tiny_dirs["chat"]), "--device", "cpu", "--max-new-tokens", "2"]
        assert evaluate.main([*flags, "--eval-data", str(data), "--output-dir", str(output)]) == 0
        yield output
    judge.close()


def score_of(run: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / name / "score.json").read_text())
    return found


def test_the_registry_is_complete() -> None:
    assert set(TASKS) == set(BENCHMARKS) and len(TASKS) == 14


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_task_is_answered_and_scored(name: str, run: Path, data: Path) -> None:
    folder, count, _ = BENCHMARKS[name]
    rows = read_jsonl(run / name / "answers.jsonl")
    score = score_of(run, name)
    assert len(rows) == count and score["task"] == name and score["limit"] is None
    manifest = json.loads((run / name / "answers.jsonl.manifest.json").read_text())
    assert manifest["status"] == "complete" and manifest["files"]
    server_scored = name in ("vqav2", "vizwiz")
    assert (score["primary_metric"] is None) == server_scored
    assert server_scored <= ("upload" in score)
    task = make_task(name, data / folder)
    references = task.references(rows)
    assert len(references) == count and all(references) != server_scored


class Yes:
    """A model that answers yes."""

    batch_size = 4

    def identity(self, settings: RunSettings) -> dict[str, object]:
        return {"checkpoint": "yes"}

    def answer(self, questions: Sequence[Question], order: Iterable[int], settings: RunSettings) -> Iterator[Answer]:
        return ((position, "yes", None) for position in order)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_missing_shards_and_answers_are_reported_and_not_scored(
    name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava.eval.benchmarks.easy_vqa.package_data", lambda: data / "easy_vqa")
    questions = make_task(name, data / BENCHMARKS[name][0]).questions()
    answers = tmp_path / name / "answers.jsonl"
    dead = shard_path(shards_folder(answers), 1, 2)
    flags = ["--tasks", name, "--eval-data", str(data), "--output-dir", str(tmp_path), "--score-only"]

    def refused(*more: str) -> str:
        assert evaluate.main([*flags, "--model-path", "yes", *more]) == 2
        assert not (tmp_path / name / "score.json").exists()
        return capsys.readouterr().err

    for index in (0, 1):
        settings = RunSettings("yes", "yes", "", SamplingParams(4), chunk=(index, 2))
        answer_all(Yes(), questions, shard_path(shards_folder(answers), index, 2), settings)
    rows = read_jsonl(dead)
    write_jsonl(dead, rows[1:])
    assert f"{name}: Shard 1 of 2" in (error := refused("--num-chunks", "2")) and f"has {len(rows) - 1} of" in error
    dead.unlink()
    assert f"{name}: Shard 1 of 2" in (error := refused("--num-chunks", "2")) and "is missing" in error
    assert not answers.exists()
    answer_all(Yes(), questions, answers, RunSettings("yes", "yes", "", SamplingParams(4)))
    rows = read_jsonl(answers)
    write_jsonl(answers, rows[:-1])
    assert f"question without an answer is {questions[-1].question_id!r}" in refused()
    write_jsonl(answers, rows[1:])
    assert f"line 1 answers question {rows[1]['question_id']!r}" in refused()
    write_jsonl(answers, [*rows[:-1], {**rows[-1], "text": "", "metadata": {"error": "too long"}}])
    assert f"1 of them failed; not scored. The first question without an answer is {questions[-1].question_id!r}" in (
        refused()
    )


def test_replaced_answers_leave_no_outcomes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else a report would take those of the old answers for those of the new ones."""
    task, answers = make_task("gqa", data / "gqa"), tmp_path / "gqa" / "answers.jsonl"
    for index in (0, 1):
        settings = RunSettings("yes", "yes", "", SamplingParams(4), chunk=(index, 2))
        answer_all(Yes(), task.questions(), shard_path(shards_folder(answers), index, 2), settings)
    flags = ["--tasks", "gqa", "--eval-data", str(data), "--output-dir", str(tmp_path), "--score-only"]
    flags += ["--model-path", "yes", "--num-chunks", "2"]
    written = [answers.with_name("score.json"), answers.with_name("outcomes.jsonl")]
    assert evaluate.main(flags) == 0 and all(path.exists() for path in written)

    def fail(*_: object) -> None:
        raise DataError("no labels")

    monkeypatch.setattr(type(task), "score_rows", fail)
    assert evaluate.main(flags) == 2 and not any(path.exists() for path in written)
    assert "no labels" in capsys.readouterr().err


def test_labels_of_equal_names_are_recorded_apart(data: Path) -> None:
    task = make_task("easy_vqa", data / "easy_vqa")
    labels = scorer_record(task, task.question_path)["labels"]
    assert labels.keys() == {"test/questions.json", "train/questions.json"} and len(set(labels.values())) == 2


def test_uploads_are_written(run: Path) -> None:
    assert len(json.loads((run / "vqav2" / "upload.json").read_text())) == 6
    assert [row["image"] for row in json.loads((run / "vizwiz" / "upload.json").read_text())][1].startswith(
        "VizWiz_test"
    )
    assert (run / "mmbench" / "upload.xlsx").is_file()
    assert [row["question_id"] for row in read_jsonl(run / "seed" / "upload.jsonl")] == ["101", "v0"]
    assert len(json.loads((run / "gqa" / "testdev_balanced_predictions.json").read_text())) == 7


def test_judged_scores_name_their_judge(run: Path) -> None:
    assert score_of(run, "mm_vet")["primary_metric"] == 50.0 and score_of(run, "mm_vet")["capabilities"]["ocr"] == 50.0
    for name in ("llava_bench", "llava_bench_coco"):
        score = score_of(run, name)
        assert score["primary_metric"] == 75.0 and score["judge"]["model"] == "gpt-4-0314"
    assert len(read_jsonl(run / "llava_bench" / "reviews.jsonl")) == 3


def test_without_a_judge_the_answers_are_kept_and_not_scored(
    run: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("mm_vet", "llava_bench"):
        with pytest.raises(ValueError, match="No judge is configured"):
            make_task(name, data / BENCHMARKS[name][0]).score(run / name / "answers.jsonl")


def test_new_answers_and_another_judge_are_reviewed_again(
    run: Path, data: Path, judge: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run / "llava_bench", tmp_path / "llava_bench")
    answers = tmp_path / "llava_bench" / "answers.jsonl"
    task = make_task("llava_bench", data / BENCHMARKS["llava_bench"][0])
    rows = read_jsonl(answers)
    write_jsonl(answers, [{**rows[0], "text": "another", "answer_id": "another"}, *rows[1:]])
    assert task.score(answers)["accuracy"] == pytest.approx(100 * 9 / 8)
    monkeypatch.setenv("LLAVA_JUDGE", "other")
    judge.replies = [(200, "4 2")]
    scored = task.score(answers)
    assert (scored["accuracy"], scored["judge"]["model"]) == (50, "other")
    assert len(judge.bodies) == 6  # the cache key includes the URL, so copied replies are not used


def test_mmbench_is_asked_as_published(run: Path, data: Path) -> None:
    rows = read_jsonl(run / "mmbench" / "answers.jsonl")
    assert list(rows[2]) == [
        *("question_id", "round_id", "prompt", "text", "options", "option_char", "answer_id", "model_id", "metadata"),
    ]
    assert rows[2]["prompt"] == "A hint.\nWhy?\nA. None\nB. nan\nC. x" and rows[2]["option_char"] == ["A", "B", "C"]
    english, chinese = (make_task(name, data / name).questions()[0] for name in ("mmbench", "mmbench_cn"))
    assert english.text == f"Which?\nA. kite\nB. cup\n{LETTER_SUFFIX}"
    assert chinese.text == f"Which?\nA. kite\nB. cup\n{LETTER_SUFFIX_CN}"
    assert english.images == make_task("mmbench", data / "mmbench").questions()[1].images  # one image, two rows


RIGHT = {
    "pope": ["Yes"] * 6, "textvqa": ["Stop."] * 3, "science_qa": ["B"] * 2, "mme": ["Yes", "No"] * 14,
    "gqa": ["Yes."] * 7, "mmbench": ["A", "B", "C"], "mmbench_cn": ["A", "B.", "(C)"], "seed": ["A", "B"],
}  # fmt: skip


def score(name: str, data: Path, folder: Path, texts: list[str], limit: int | None, split: str | None = None) -> Any:
    task = make_task(name, data / BENCHMARKS[name][0], split)
    rows = [
        {"question_id": q.question_id, **({} if q.round_id is None else {"round_id": 0}), "prompt": q.prompt, "text": t}
        for q, t in zip(task.questions(limit), texts)
    ]
    return task.primary_metric(task.score(write_jsonl(folder / "a.jsonl", rows), limit))


@pytest.mark.parametrize("name", RIGHT)
def test_right_answers_score_full_with_and_without_a_limit(name: str, data: Path, tmp_path: Path) -> None:
    full = 2000 if name == "mme" else 100
    assert score(name, data, tmp_path, RIGHT[name], None) == pytest.approx(full)
    if name.startswith("mm"):
        with pytest.raises(ValueError, match="does not support --limit"):
            score(name, data, tmp_path, RIGHT[name], 1)
    else:
        assert score(name, data, tmp_path, RIGHT[name], 1) == pytest.approx(full)


@pytest.mark.parametrize("name", ["vqav2", "vizwiz"])
def test_validation_splits_are_scored_here(name: str, data: Path, tmp_path: Path) -> None:
    assert score(name, data, tmp_path, ["yes", "no"], None, "val") == pytest.approx(50)
    question = make_task(name, data / name, "val").questions()[0]
    assert question.prompt.endswith(ASK) and question.images[0].endswith(".jpg")


def test_the_test_split_of_mmbench_is_only_submitted(data: Path, tmp_path: Path) -> None:
    assert score("mmbench", data, tmp_path, ["A", "B", "C"], None, "test") is None
    assert (tmp_path / "upload.xlsx").is_file()


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "easy_vqa"])
def test_a_missing_file_is_reported_with_its_source(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is missing; its source is .*https?://.* llava eval prepare"):
        make_task(name, tmp_path).questions()
    if name != "llava_bench_coco":
        assert str(make_task(name).image_folder).startswith(str(Path("playground/data/eval")))


def test_tasks_are_unique_and_all_selects_every_task(tmp_path: Path) -> None:
    assert [task.name for task in make_tasks(["gqa", " all", "gqa"])][:2] == ["gqa", "vqav2"]
    with pytest.raises(ValueError, match="use --eval-data"):
        make_tasks(["gqa", "pope"], tmp_path)


def test_science_questions_are_asked_with_and_without_the_suffix(data: Path, tmp_path: Path) -> None:
    path = data / "scienceqa" / "llava_test_CQM-A.json"
    first, second = science_qa.read_questions(path, single_pred_prompt=True)
    assert first.prompt == f"<image>\n{first.text}" and first.text == f"Q?\nA. x\nB. y\n{LETTER_SUFFIX}"
    assert second.prompt == second.text and second.images == ()
    assert science_qa.read_questions(path)[1].text == "Q?\nA. x\nB. y"
    (tmp_path / "bad.json").write_text('[{"id": 1}]')
    with pytest.raises(ValueError, match=r"bad\.json is not a list of ScienceQA"):
        science_qa.read_questions(tmp_path / "bad.json")


def test_prepare_lists_found_and_missing_files(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS["gqa"].layouts, "testdev_balanced", TASKS["gqa"].layouts["testdev_balanced"])
    assert evaluate.main(["prepare", "pope", "--eval-data", str(data), "--checksums"]) == 1
    shown = capsys.readouterr().out
    assert "pope: 6 questions, expected 8910" in shown and "sha256" in shown
    assert evaluate.main(["prepare", "--eval-data", str(data / "none")]) == 1
    shown = capsys.readouterr().out
    assert shown.count("not ready") >= 13 and "https://cs.stanford.edu" in shown
    import dataclasses

    layout = TASKS["gqa"].layouts["testdev_balanced"]
    monkeypatch.setitem(TASKS["gqa"].layouts, "testdev_balanced", dataclasses.replace(layout, rows=7))
    assert evaluate.main(["prepare", "gqa", "--eval-data", str(data)]) == 0
    assert "gqa: ready, 7 questions" in capsys.readouterr().out
    for split, rows in (("test", 9673), ("train", 38575)):
        assert make_task("easy_vqa", data / "easy_vqa", split).published_rows == rows
