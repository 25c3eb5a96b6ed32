"""Scoring programs report answers that do not match the questions in one line, with exit status 2 and no score."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava.eval import eval_gqa, eval_mmbench, eval_mme, eval_pope, eval_science_qa, eval_textvqa, eval_vqa
from llava.eval.benchmarks import judged, mmbench, mme, vqa
from llava.eval.run.answers import read_results
from tests.eval.conftest import write_jsonl
from tests.test_package import ROOT, fresh

Row = dict[str, Any]
ASK = "\nAnswer the question using a single word or phrase."


def answer(question_id: Any, text: str, prompt: str = "Q?" + ASK) -> Row:
    return {"question_id": question_id, "prompt": prompt, "text": text, "metadata": {}}


def dump(path: Path, value: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return str(path)


class Bench:
    """A small benchmark with correct answers, the program that scores them, and the expected output."""

    def __init__(self, rows: list[Row], main: Callable[..., int], flags: list[str], expected: str) -> None:
        self.rows, self.main, self.flags, self.expected = rows, main, flags, expected

    def run(self, rows: list[Row], folder: Path) -> int:
        path = write_jsonl(folder / "answers.jsonl", rows)
        return self.main([*self.flags, "--result-file", str(path)])


def pope_bench(folder: Path) -> Bench:
    questions = [f"Is there {thing} in the image?" for thing in ("a dog", "an apple")]
    labels = [{"image": "1.jpg", "text": q, "label": label} for q, label in zip(questions, ("yes", "no"))]
    (folder / "coco").mkdir()
    write_jsonl(folder / "coco" / "coco_pope_random.json", labels)
    asked = [q.replace("an apple in the image", "an apple in the imange") for q in questions]
    rows = [{"question_id": n, "image": "1.jpg", "text": q + ASK, "category": "random"} for n, q in enumerate(asked, 7)]
    flags = ["--annotation-dir", str(folder / "coco"), "--question-file", str(write_jsonl(folder / "q.jsonl", rows))]
    return Bench([answer(7, "Yes"), answer(8, "No")], eval_pope.main, flags, "Mean F1 x 100: 100.000")


def textvqa_bench(folder: Path) -> Bench:
    rows = [{"image_id": "i", "question": f"Q{n}?", "answers": ["stop"] * 10} for n in range(2)]
    flags = ["--annotation-file", dump(folder / "val.json", {"data": rows})]
    return Bench([answer("i", "Stop", f"Q{n}?{ASK}") for n in range(2)], eval_textvqa.main, flags, "Accuracy: 100.00%")


def vqa_bench(folder: Path) -> Bench:
    rows = [{"question_id": n, "answers": [{"answer": "yes"}] * 10} for n in range(2)]
    flags = ["--annotation-file", dump(folder / "val.json", {"annotations": rows})]
    return Bench([answer(0, "yes"), answer(1, "Yes.")], eval_vqa.main, flags, "Accuracy: 100.00%")


def gqa_bench(folder: Path) -> Bench:
    rows = {str(n): {"answer": "yes", "types": {"structural": "verify"}} for n in range(2)}
    flags = ["--question-file", dump(folder / "q.json", rows)]
    return Bench([answer("0", "Yes."), answer("1", "yes")], eval_gqa.main, flags, "100.00 %")


def mme_bench(folder: Path) -> Bench:
    rows = []
    for task in mme.TASKS:
        place = folder / "MME" / task
        place.mkdir(parents=True)
        (place / "0.txt").write_text("Is it?  Please answer yes or no.\tYes\nNot? Please answer yes or no.\tNo\n")
        rows += [answer(f"{task}/0.png", "Yes", "Is it?" + ASK), answer(f"{task}/0.png", "no\tway", "Not?" + ASK)]
    return Bench(rows, eval_mme.main, ["--annotation-dir", str(folder / "MME")], "total score: 2000.0")


def mmbench_bench(folder: Path) -> Bench:
    lines = ["index\tquestion\thint\tA\tB\tanswer\tcategory\timage"]
    lines += [f"{index}\tQ\t\tNone\tnan\t{right}\tc\tzz" for index, right in ((7, "A"), (1000007, "B"))]
    (folder / "t.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = [{**answer(7, "A."), "round_id": 0}, {**answer(1000007, "(b)"), "round_id": 0}]
    return Bench(rows, eval_mmbench.main, ["--annotation-file", str(folder / "t.tsv")], "Circular accuracy: 100.00%")


BENCHES = [pope_bench, textvqa_bench, vqa_bench, gqa_bench, mme_bench, mmbench_bench]


@pytest.fixture(params=BENCHES, ids=lambda make: make.__name__.removesuffix("_bench"))
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    made: Bench = request.param(tmp_path)
    return made


def test_right_answers_in_any_order_score_full(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.run(bench.rows, tmp_path) == 0
    first = capsys.readouterr().out
    assert bench.expected in first
    assert bench.run(bench.rows[::-1], tmp_path) == 0
    assert capsys.readouterr().out == first


INVALID: dict[str, tuple[Callable[[list[Row]], list[Row]], str]] = {
    "missing": (lambda rows: rows[:-1], "missing"),
    "duplicate": (lambda rows: [*rows, rows[0]], "duplicate|without a matching question"),
    "strange": (
        lambda rows: [*rows[:-1], {**rows[-1], "question_id": "existence/9.png"}],
        "missing|without a matching question",
    ),
    "failed": (lambda rows: [{**rows[0], "text": "", "metadata": {"error": "no image"}}, *rows[1:]], "no image"),
    "empty": (lambda rows: [], "no answers"),
    "no text": (lambda rows: [{"question_id": 7}], "line 1 is missing text"),
}


@pytest.mark.parametrize("kind", INVALID)
def test_invalid_answers_are_refused_in_one_line(
    bench: Bench, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, messages = INVALID[kind]
    assert bench.run(change(bench.rows), tmp_path) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and output.err.startswith("error: ")
    assert any(word in output.err for word in messages.split("|")), output.err


def test_science_qa_counts_missing_answers_as_wrong_but_refuses_unknown_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = {"choices": ["x", "y"], "answer": 1, "hint": "", "image": "image.png", "question": "?", "grade": "grade2"}
    dump(tmp_path / "problems.json", {"1": problem, "2": problem})
    dump(tmp_path / "pid_splits.json", {"test": ["1", "2"]})
    flags = ["--base-dir", str(tmp_path), "--result-file"]
    assert eval_science_qa.main([*flags, str(write_jsonl(tmp_path / "a.jsonl", [answer("1", "B")]))]) == 0
    assert "Total: 2, Correct: 1, Accuracy: 50.00%, IMG-Accuracy: 50.00%" in capsys.readouterr().out
    for rows in ([answer("3", "B")], [answer("1", "B")] * 2):
        assert eval_science_qa.main([*flags, str(write_jsonl(tmp_path / "a.jsonl", rows))]) == 2
        assert capsys.readouterr().out == ""
    assert eval_science_qa.main([*flags, str(tmp_path / "a.jsonl"), "--split", "val"]) == 2
    assert "no split 'val'" in capsys.readouterr().err


def test_pope_refuses_labels_without_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = pope_bench(tmp_path)
    with (tmp_path / "coco" / "coco_pope_random.json").open("a") as file:
        file.write('{"image": "2.jpg", "text": "Is there a cat in the image?", "label": "no"}\n')
    assert bench.run(bench.rows, tmp_path) == 2
    assert "1 extra labels (unmatched rows)" in capsys.readouterr().err
    write_jsonl(tmp_path / "coco" / "coco_pope_popular.json", [{"image": "1", "text": "?", "label": "no"}])
    assert bench.run(bench.rows, tmp_path) == 2
    assert "popular" in capsys.readouterr().err


def test_a_refused_conversion_writes_no_file(tmp_path: Path) -> None:
    questions = write_jsonl(tmp_path / "q.jsonl", [{"question_id": n, "image": f"{n}.jpg"} for n in range(2)])
    rows = write_jsonl(tmp_path / "a.jsonl", [answer(0, "yes")])
    with pytest.raises(ValueError, match="missing"):
        vqa.submit_vizwiz(questions, rows, tmp_path / "out" / "up.json")
    write_jsonl(rows, [answer(0, "yes")] * 2)
    with pytest.raises(ValueError, match="duplicate"):
        judged.convert(rows, tmp_path / "out" / "up.json")
    mmbench_bench(tmp_path)
    write_jsonl(rows, [answer(7, "A")])
    with pytest.raises(ValueError, match="missing"):
        mmbench.convert(tmp_path / "t.tsv", tmp_path, tmp_path / "out", "a")
    assert not (tmp_path / "out").exists()


def test_a_malformed_answers_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question_id": 1, "text": "x"}\n{"question', encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.jsonl line 2"):
        read_results(tmp_path / "a.jsonl")
    for question_id, text in ((1, None), (1, 5), ([1], "x")):
        write_jsonl(tmp_path / "a.jsonl", [{"question_id": question_id, "text": text, "metadata": ["a list"]}])
        with pytest.raises(ValueError, match=r"has the answer .* expected a string"):
            read_results(tmp_path / "a.jsonl")
    write_jsonl(tmp_path / "a.jsonl", [{"question_id": 1, "text": "x", "metadata": ["a list"]}])
    assert len(read_results(tmp_path / "a.jsonl")) == 1


@pytest.mark.parametrize(
    ("index", "message"), [("7.0", "the index '7.0'"), ("1", "the same index"), ("", "the index ''")]
)
def test_a_malformed_mmbench_table_is_reported(index: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text(f"index\tquestion\tA\n1\tq\ta\n{index}\tq\ta\n")
    with pytest.raises(ValueError, match=message):
        mmbench.read_table(tmp_path / "t.tsv")


def test_scorers_and_their_programs_import_no_torch() -> None:
    """Checked in a fresh interpreter for every scorer and entry point."""
    modules = list((ROOT / "llava" / "eval").glob("eval_*.py"))
    modules += [path for path in (ROOT / "llava" / "eval" / "benchmarks").glob("*.py") if path.stem != "__init__"]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules]
    assert len(names) > 20
    names += ["llava.eval.m4c_evaluator", "llava.eval.summarize_gpt_review", "llava.eval.scienceqa_prompts"]
    done = fresh(f"import sys, {', '.join(names)}; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert not {"torch", "transformers", "numpy", "PIL", "pandas"} & set(done.stdout.split())


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("convert_*.py")), ids=lambda path: path.stem)
def test_converters_run_by_path_from_any_folder(path: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(path), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
