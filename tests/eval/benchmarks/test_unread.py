"""Unread answers are counted, printed and reported, and absence is never an answer, in every benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava.errors import DataError
from llava.eval import eval_gqa, eval_mme, eval_pope, eval_science_qa, eval_vqa
from llava.eval import main as evaluate
from llava.eval.benchmarks import judged, mme, pope, science_qa, seed, vqa
from llava.eval.benchmarks.parsing import official_soft_accuracy, soft_accuracy
from llava.eval.benchmarks.registry import make_task
from llava.eval.judging import reviews
from llava.eval.reporting.data import csv_text, markdown, read_run
from llava.eval.run.answers import final_answer, read_results
from tests.eval.benchdata import BENCHMARKS, make_everything
from tests.eval.benchmarks.test_refusals import answer, dump, gqa_bench, mme_bench, pope_bench, vqa_bench
from tests.eval.conftest import write_jsonl
from tests.eval.fake_server import FakeServer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_everything(tmp_path_factory.mktemp("data") / "eval")


def write_answers(name: str, data: Path, folder: Path, text: Any) -> list[dict[str, Any]]:
    rows = []
    for each in make_task(name, data / BENCHMARKS[name][0]).questions():
        rounds = {} if each.round_id is None else {"round_id": each.round_id}
        rows.append({"question_id": each.question_id, **rounds, "prompt": each.prompt, "text": text, "metadata": {}})
    (folder / name).mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / name / "answers.jsonl", rows)
    return rows


@pytest.fixture
def flags(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("llava.eval.benchmarks.easy_vqa.package_data", lambda: data / "easy_vqa")
    return ["--eval-data", str(data), "--output-dir", str(tmp_path), "--score-only", "--model-path", "m"]


@pytest.mark.parametrize("text", ["", " \n", "<think>Yes, the answer is A"], ids=["empty", "blank", "thinking"])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_absence_is_never_an_answer(
    name: str, text: str, flags: list[str], data: Path, tmp_path: Path, judge: FakeServer,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    judge.replies = [(200, "8 0\nThe second is empty.")]
    count = len(write_answers(name, data, tmp_path, text))
    assert evaluate.main(["--tasks", name, *flags]) == 0
    score = json.loads((tmp_path / name / "score.json").read_text())
    assert score["primary_metric"] == (None if name in ("vqav2", "vizwiz") else 0)
    assert (score["unread"], score["answers"]) == (count, count)
    assert f"Unread answers: {count} of {count}\n" in capsys.readouterr().out
    assert bool(judge.bodies) == name.startswith("llava_bench")
    assert f"m,{name},{score['split']},{count},{count}," in csv_text([read_run(tmp_path)])
    assert " unread " in markdown([read_run(tmp_path)])


@pytest.mark.parametrize("kind", ["null", "number", "list", "absent", "duplicate", "unknown", "no server reply"])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_what_is_no_answer_withholds_the_score(
    name: str, kind: str, flags: list[str], data: Path, tmp_path: Path, judge: FakeServer,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rows = write_answers(name, data, tmp_path, "Yes")
    texts = {"null": None, "number": 5, "list": ["Yes"], "no server reply": "#ERROR#"}
    if kind in texts:
        rows[-1]["text"] = texts[kind]
    elif kind == "absent":
        del rows[-1]["text"]
    else:
        rows.append(rows[-1] if kind == "duplicate" else {**rows[-1], "question_id": "unknown"})
    write_jsonl(tmp_path / name / "answers.jsonl", rows)
    assert evaluate.main(["--tasks", name, *flags]) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"error: {name}: ") and output.err.count("\n") == 1 and output.out == ""
    assert not (tmp_path / name / "score.json").exists() and not judge.bodies


POPE = {"Yes": 0, "No.": 0, "Yes, there is.": 0, "There is no dog": 0, "not visible": 0, "(no)": 1, "\nNo": 1, "": 1}
POPE |= {"NO": 1, "Not sure": 1, "yes and no": 1, "There are none": 1, "isn't": 1, "I cannot see it": 1, "是": 1}
POPE |= {"Yes, there is no doubt": 1, "Sorry, I can't help with that.": 1, "Yes or no.": 1, "yes": 0}


@pytest.mark.parametrize(("text", "unread"), POPE.items())
def test_pope_counts_answers_that_its_rule_misreads(text: str, unread: int) -> None:
    assert pope.is_unread(text) == bool(unread)


def test_pope_names_the_published_score_of_empty_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = pope_bench(tmp_path)
    assert bench.run([answer(7, ""), answer(8, "No")], tmp_path) == 0
    printed = capsys.readouterr().out
    assert "F1 score: 1.0\n" in printed and "Mean F1 x 100: 0.000" in printed
    assert "With empty answers read as yes, as published: 100.000\nUnread answers: 1 of 2\n" in printed
    assert bench.main is eval_pope.main


def test_mme_and_gqa_count_what_they_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = mme_bench(tmp_path)
    others = {"\nYes": "yes", "是": "other", "YES.": "yes", "Not sure": "no", "   Yes": "other", "": "other"}
    assert {text: mme.parse(text) for text in others} == others
    assert bench.run([{**bench.rows[0], "text": "是"}, *bench.rows[1:]], tmp_path) == 0
    assert "Unread answers: 1 of 28\n" in capsys.readouterr().out and bench.main is eval_mme.main
    for key, value in (("question_id", 5), ("question_id", ""), ("prompt", None)):
        assert bench.run([{**bench.rows[0], key: value}, *bench.rows[1:]], tmp_path) == 2
        assert capsys.readouterr().err.startswith("error: ")
    bench = gqa_bench(tmp_path)
    assert bench.run([answer("0", "yes."), answer("1", ".")], tmp_path) == 0
    assert "Unread answers: 1 of 2\n" in capsys.readouterr().out and bench.main is eval_gqa.main


def test_the_published_rules_of_letters_count_what_they_cannot_read() -> None:
    problem = {"choices": ["x", "y"], "answer": 1, "image": "i"}
    texts = ["B", "B. y", "The answer is B.", "B.", "(B)", "E", "", "B or A"]
    items = [science_qa.Prediction(str(n), problem, {"text": text}) for n, text in enumerate(texts)]
    found = science_qa.score_predictions([*items, science_qa.Prediction("x", problem, None)])
    assert (found["correct"], found["unread"], found["answers"], found["missing"]) == (3, 6, 9, 1)
    assert "Unread answers: 6 of 9, 1 of them missing" in science_qa.ScienceQA.summary(found)
    question = {"question_type_id": 1, "data_type": "image", "answer": "B", "choice_a": "dog", "choice_b": "cat"}
    questions = [{**question, "question_id": n} for n in range(5)]
    answers = dict(enumerate(["B", "B.", "cat", "", "A or B"]))
    scores = seed.score_answers({"question_type": {"x": 1}, "questions": questions}, answers)
    assert (scores["total"], scores["lenient"], scores["unread"], scores["answers"]) == (20.0, 60.0, 4, 5)


def test_answers_without_a_label_withhold_the_score(data: Path, tmp_path: Path) -> None:
    for name, file in (("gqa", "data/testdev_balanced_questions.json"), ("seed", "SEED-Bench.json")):
        rows = write_answers(name, data, tmp_path, "A")
        root = tmp_path / "data" / name
        (root / file).parent.mkdir(parents=True)
        content = json.loads((data / BENCHMARKS[name][0] / file).read_text())
        if name == "seed":
            content["questions"].pop()
        else:
            content.pop(rows[-1]["question_id"])
        dump(root / file, content)
        with pytest.raises(DataError, match=r"has no label for 1 question\(s\), the first"):
            make_task(name, root).score_rows(rows, tmp_path / name / "answers.jsonl")


AGREED = {
    # answer, what all ten people say: submitted, as written, all normalized
    ("Yes.", "yes"): (1, 0, 1),
    ("yes", "yes"): (1, 1, 1),
    ("two\n", "2"): (1, 0, 1),
    ("the cat", "the cat"): (0, 1, 1),
    ("Coca-Cola", "coca-cola"): (0, 0, 1),
    ("coca cola", "coca cola "): (1, 1, 1),
    ("no", "yes"): (0, 0, 0),
    ("", ""): (0, 0, 0),
    (" \t", "?"): (0, 0, 0),
    ("Unanswerable.", "unanswerable"): (1, 0, 1),
}


@pytest.mark.parametrize(("said", "agreed"), AGREED)
def test_the_challenge_normalizes_nothing_where_all_people_agree(said: str, agreed: str) -> None:
    found = vqa.score_answers({1: [agreed] * 10}, {1: said})
    assert (found["accuracy"], found["as_written"], found["normalized"]) == tuple(
        100 * value for value in AGREED[said, agreed]
    )
    assert official_soft_accuracy(said, [agreed] * 10) == AGREED[said, agreed][1]
    assert soft_accuracy(said, [agreed] * 10) == AGREED[said, agreed][2]


def test_the_challenge_normalizes_where_people_differ() -> None:
    people = ["yes"] * 3 + ["Yes."] * 6 + ["no"]
    assert official_soft_accuracy("YES!", people) == soft_accuracy("YES!", people) == 1
    assert official_soft_accuracy("no", people) == pytest.approx(0.3)
    with pytest.raises(DataError, match="no reference answers"):
        official_soft_accuracy("yes", [])


def test_the_other_soft_accuracies_are_named_where_they_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = vqa_bench(tmp_path)
    assert bench.run([answer(0, "yes"), answer(1, "yes")], tmp_path) == 0
    assert capsys.readouterr().out == "Samples: 2\nAccuracy: 100.00%\nUnread answers: 0 of 2\n"
    assert bench.run(bench.rows, tmp_path) == 0
    assert "Accuracy: 100.00%\n  50.00 % by the same program for the answers as written\n" in capsys.readouterr().out
    assert bench.main is eval_vqa.main


FINAL = {"<think>a or b?</think>\nB": "B", "<think>a": "", " <thinking>no</thinking> Yes": "Yes", "x</think>y": "y"}
FINAL |= {"<answer> B </answer>": "B", "It is <answer>B</answer>.": "B", "B": "B", " a < b ": " a < b "}
FINAL |= {"<answer>A</answer> or <answer>B</answer>": "<answer>A</answer> or <answer>B</answer>"}
FINAL |= {"I think <think> is a tag": "I think <think> is a tag", "<think></think>": ""}


def test_thinking_is_no_part_of_an_answer(tmp_path: Path) -> None:
    assert {text: final_answer(text) for text in FINAL} == FINAL
    path = write_jsonl(tmp_path / "a.jsonl", [answer(n, text) for n, text in enumerate(FINAL)])
    assert [row["text"] for row in read_results(path)] == list(FINAL.values())


def test_science_qa_names_its_guesses_and_refuses_texts_of_other_types(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from llava.eval import eval_science_qa_gpt4

    problem = {"choices": ["x", "y"], "answer": 1, "hint": "", "image": None, "question": "?", "grade": "grade2"}
    dump(tmp_path / "problems.json", {"1": problem, "2": problem})
    dump(tmp_path / "pid_splits.json", {"test": ["1", "2"]})
    ours = write_jsonl(tmp_path / "a.jsonl", [answer("1", "The answer is B."), answer("2", "")])
    flags = ["--base-dir", str(tmp_path), "--our-result", str(ours), "--gpt4-result", str(tmp_path / "g.json")]
    dump(tmp_path / "g.json", {"outputs": {"1": "The answer is B.", "2": "The answer is B."}})
    assert eval_science_qa_gpt4.main(flags) == 0
    assert "Our unread answers, guessed at random as published: 1 of 2\n" in capsys.readouterr().out
    dump(tmp_path / "g.json", {"outputs": {"1": None, "2": "The answer is B."}})
    assert eval_science_qa_gpt4.main(flags) == 2
    assert "has no texts under 'outputs'" in capsys.readouterr().err
    assert eval_science_qa.main(["--base-dir", str(tmp_path), "--result-file", str(ours)]) == 0
    assert "Unread answers: 1 of 2\n" in capsys.readouterr().out


@pytest.mark.parametrize("scores", [None, 5, [8], [8, None], ["8", "9"], [[8], [9]]])
def test_a_review_without_two_numbers_is_refused(scores: Any) -> None:
    with pytest.raises(DataError, match="has neither 'tuple' nor 'score' with two numbers"):
        reviews.score_reviews([{"id": 1, "tuple": scores}])


GRADES = {
    "0.5": 0.5,
    "**0.5**": 0.5,
    ".5": 0.5,
    "0.5.": 0.5,
    "Score: 0.5": 0.5,
    "**Grade:** 0.5\nx": 0.5,
    "1": 1,
    "0": 0,
}
GRADES |= {"1.": 1, "0.5 because it is half": 0.5, "0.5, as x": 0.5, "0.5/1.0": 0.5, "<think>1</think>0.2": 0.2}
NO_GRADES = (
    "",
    " ",
    "0.5 or 0.6",
    "0.5 to 0.6",
    "0.5-0.6",
    "0.5 0.6",
    "2",
    "1.5",
    "10",
    "5/10",
    "-0.5",
    "50%",
    "1 of 2",
)


def test_grades_in_other_forms_are_read_and_unclear_ones_are_not() -> None:
    assert {reply: judged.parse_grade(reply) for reply in GRADES} == GRADES
    assert [judged.parse_grade(reply) for reply in (*NO_GRADES, "I think 0.5", "0,5")] == [None] * (len(NO_GRADES) + 2)
