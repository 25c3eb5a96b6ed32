"""Answer parsing and scoring rules of each benchmark."""

from __future__ import annotations

import json
import sys
import types
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.errors import ConfigError, DataError, DependencyError
from llava.eval import eval_mme, m4c_evaluator
from llava.eval.benchmarks import gqa, mmbench, mme, pope, science_qa, seed, textvqa
from llava.eval.benchmarks.parsing import parse_option
from llava.eval.benchmarks.xlsx import write_xlsx
from tests.eval.conftest import write_jsonl

POPE = {"Yes": "yes", "No": "no", "no": "no", "No.": "no", "No, there is": "no", "There is no dog": "no", "NO": "yes"}
POPE |= {"There are none": "yes", "isn't": "yes", "no!": "yes", ". no": "yes", "": "yes"}


@pytest.mark.parametrize(("text", "wanted"), POPE.items())
def test_pope_reads_answers_as_published(text: str, wanted: str) -> None:
    assert pope.parse(text) == wanted


def test_pope_strict_parsing() -> None:
    found = [pope.parse_strict(text) for text in ("NO", "yes, it is", "No\n", "nope", "", "I cannot see", "(no)")]
    assert found == ["no", "yes", "no", "other", "other", "other", "no"]


@given(st.lists(st.tuples(st.sampled_from(["Yes", "No"]), st.sampled_from(["yes", "no"])), min_size=1))
def test_pope_figures_are_consistent(pairs: list[tuple[str, str]]) -> None:
    found = pope.ConfusionMatrix.of(pairs).metrics()
    assert sum(found["counts"]) == found["n"] == len(pairs)
    for key in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        assert 0 <= found[key] <= 1
    low, high = sorted((found["precision"], found["recall"]))
    assert low - 1e-9 <= found["f1"] <= high + 1e-9 or found["f1"] == 0


MME = {"Yes, it is": "yes", "no": "no", "Not at all": "no", "I think yes": "other", "Unknown": "other"}
MME |= {"Nothing": "no", "know": "no", "snow": "no", "a no": "no", "eyes": "yes", "a yes": "other", " yes": "yes"}


@pytest.mark.parametrize(("text", "wanted"), MME.items())
def test_mme_reads_the_first_four_characters(text: str, wanted: str) -> None:
    assert mme.parse(text) == wanted


def test_mme_scores_an_image() -> None:
    rows = [mme.ResultRow("0.txt", "a", "Yes", "Yes"), mme.ResultRow("0.txt", "b", "No", "yes")]
    half = mme.score_task(rows, "count")
    assert (half["acc"], half["acc+"], half["score"]) == (0.5, 0.0, 50.0)
    assert mme.score_task([rows[0], rows[1]._replace(answer="no")], "count")["score"] == 200.0
    with pytest.raises(DataError, match="without exactly two answers"):
        mme.score_task(rows[:1], "count")


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20), st.randoms())
def test_mme_does_not_depend_on_the_order_of_lines(images: list[tuple[bool, bool]], random: object) -> None:
    rows = [
        mme.ResultRow(f"{n}.txt", str(side), "Yes", "yes" if right else "no")
        for n, pair in enumerate(images)
        for side, right in enumerate(pair)
    ]
    before = mme.score_task(rows, "count")
    random.shuffle(rows)  # type: ignore[attr-defined]
    assert mme.score_task(rows, "count") == before
    assert 0 <= before["score"] <= 200


def test_mme_keeps_task_files_that_score_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for task in mme.TASKS:
        place = tmp_path / "MME" / task / "questions_answers_YN"
        (tmp_path / "MME" / task / "images").mkdir(parents=True)
        place.mkdir()
        (place / "0.txt").write_text("Is it? Please answer yes or no.\tYes\nNot? Please answer yes or no.\tNo\n")
        for question in ("Is it?", "Not?"):
            rows.append({"question_id": f"{task}/images/0.png", "prompt": question, "text": "Yes\tor\nno"})
    answers = write_jsonl(tmp_path / "a.jsonl", rows)
    files = ["--annotation-dir", str(tmp_path / "MME"), "--result-file", str(answers)]
    assert eval_mme.main([*files, "--output-dir", str(tmp_path / "out")]) == 0
    first = capsys.readouterr().out
    assert eval_mme.main(["--results-dir", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == first and "total score: 500.0" in first
    (tmp_path / "out" / "OCR.txt").unlink()
    assert eval_mme.main(["--results-dir", str(tmp_path / "out")]) == 2
    assert eval_mme.main([]) == eval_mme.main(files[:2]) == 2


SQA = {
    "B": 1,
    "B. apostrophe": 1,
    "The answer is C.": 2,
    "The answer is C": -1,
    "B.": -1,
    "(B) x": -1,
    "b": -1,
    "E": -1,
}
SQA |= {"The answer is A. The answer is B.": -1, "A. ": 0, "Z": -1, "": -1}


@pytest.mark.parametrize(("text", "wanted"), SQA.items())
def test_science_qa_reads_answers_as_published(text: str, wanted: int) -> None:
    assert science_qa.choice_index(science_qa.parse(text), {"choices": ["w", "x", "y", "z"]}) == wanted


def test_science_qa_lenient_parsing() -> None:
    problem = {"choices": ["chiasmus", "apostrophe"], "answer": 1}
    texts = ("B.", "(B) x", "b", "The answer is B", "It is an apostrophe", "chiasmus or apostrophe", "C")
    assert [science_qa.parse_lenient(text, problem) for text in texts] == [1, 1, 1, 1, 1, -1, -1]


def test_science_qa_subsets_overlap_as_published() -> None:
    problems = [
        {"choices": "xy", "answer": 0, "hint": "h", "image": "i", "subject": "natural science", "grade": "grade12"},
        {"choices": "xy", "answer": 1, "hint": "", "image": None, "subject": "language science", "grade": "grade6"},
    ]
    rows = [science_qa.Prediction(str(n), problem, {"text": "A", "prompt": "?"}) for n, problem in enumerate(problems)]
    found = science_qa.score_predictions(rows)
    assert {name: part["n"] for name, part in found["subsets"].items()} == {
        "NAT": 1, "SOC": 0, "LAN": 1, "TXT": 1, "IMG": 1, "NO": 1, "G1-6": 1, "G7-12": 1,
    }  # fmt: skip
    assert found["subsets"]["NAT"]["accuracy"] == 100 and found["subsets"]["LAN"]["accuracy"] == 0
    assert found["subsets"]["SOC"]["accuracy"] is None and "– %" in science_qa.ScienceQA.table(found)
    json.dumps(found, allow_nan=False)


def test_options_as_a_list_or_a_word() -> None:
    assert science_qa.parse_options("A,B,C") == science_qa.parse_options("ABC") == ("A", "B", "C")


def test_guesses_of_a_failed_voter_are_deterministic() -> None:
    problems = {str(n): {"choices": ["x", "y", "z"], "answer": 0} for n in range(60)}
    failed = science_qa.Voter.of({}, problems, science_qa.OPTIONS)
    guesses = [failed.guess(pid, problem) for pid, problem in problems.items()]
    assert guesses == [failed.guess(pid, problem) for pid, problem in problems.items()]
    assert set(guesses) == {0, 1, 2}


def test_textvqa_questions_of_every_prompt_shape() -> None:
    ask = "\nAnswer the question using a single word or phrase."
    assert textvqa.prompt_processor("What Is It?" + ask) == "what is it?"
    assert textvqa.prompt_processor("What?\nReference OCR token: a, b" + ask) == "what?"
    assert textvqa.prompt_processor("Reference OCR token: a, b\nWhat?" + ask) == "what?"
    assert textvqa.prompt_processor("OCR tokens: a. Question: What? Short answer:") == "what?"
    assert textvqa.prompt_processor("Two\nlines?\nReference OCR token: a" + ask) == "two\nlines?"
    with pytest.raises(DataError, match="Cannot find the TextVQA question"):
        textvqa.prompt_processor("What?")
    with pytest.raises(ConfigError, match="Nothing to score"):
        textvqa.evaluate(Path("x"), None, None)


def test_parse_option() -> None:
    options = {"A": "cat", "B": "None", "C": ""}
    texts = ("A", "a)", "[B]", "{b} x", "A: cat", "C", "The cat sat", "a catalogue", "none", "cat and none", "D", "")
    assert [parse_option(text, options) for text in texts] == [
        "A", "A", "B", "B", "A", "C", "A", None, "B", None, None, None,
    ]  # fmt: skip


def bench_rows(answers: dict[str, str]) -> mmbench.Table:
    head = {"question": "Q", "A": "p", "B": "q", "C": "r", "category": "c"}
    return [{"index": index, **head, "answer": answer} for index, answer in answers.items()]


def test_mmbench_circular_needs_every_copy() -> None:
    rows = bench_rows({"7": "A", "1000007": "B", "2000007": "C", "3000007": "A", "8": "B"})
    texts = {"7": "A", "1000007": "(B)", "2000007": "r", "3000007": "C", "8": "B. q"}
    found = mmbench.score_answers(rows, {0: {index: {"text": text, "round_id": 0} for index, text in texts.items()}})
    assert (found["n"], found["vanilla"], found["circular"]) == (2, 100.0, 50.0)


def test_mmbench_maps_a_rotated_round_back() -> None:
    row = bench_rows({"7": "B"})[0]
    rotated = {"text": "A", "round_id": 1, "options": ["q", "r", "p"], "option_char": ["B", "C", "A"]}
    assert mmbench.predicted_letter(row, rotated) == "B"
    assert mmbench.predicted_letter(row, {**rotated, "text": "p"}) == "A"
    both = {0: {"7": {"text": "B", "round_id": 0}}, 1: {"7": rotated}}
    assert mmbench.score_answers([row], both)["circular"] == 100
    both[1]["7"]["text"] = "B"
    found = mmbench.score_answers([row], both)
    assert (found["vanilla"], found["circular"]) == (100, 0)
    with pytest.raises(DataError, match="only the server"):
        mmbench.score_answers([{**row, "answer": ""}], both)


def test_mmbench_submission_inserts_after_the_last_option() -> None:
    rows = [{**row, "D": "s", "E": "t", "hint": "h", "split": "dev"} for row in bench_rows({"7": "A"})]
    header, line = mmbench.submission(rows, {"7": "x"})
    assert header == ["index", "question", "A", "B", "C", "answer", "D", "E", "prediction", "split"]
    assert line[header.index("prediction")] == "x"


def test_an_excel_file_keeps_any_text(tmp_path: Path) -> None:
    write_xlsx(tmp_path / "t.xlsx", [["a & <b>", "", "007", "-5", "x\x00y\n"], *[["z"] * 30]])
    with zipfile.ZipFile(tmp_path / "t.xlsx") as archive:
        assert archive.testzip() is None
        sheet = archive.read("xl/worksheets/sheet1.xml").decode()
    assert "a &amp; &lt;b&gt;" in sheet and ">007</t>" in sheet and "<v>-5</v>" in sheet and "xy\n" in sheet
    assert 'r="AD2"' in sheet and 'r="B1"' not in sheet
    first = (tmp_path / "t.xlsx").read_bytes()
    write_xlsx(tmp_path / "t.xlsx", [["a & <b>", "", "007", "-5", "x\x00y\n"], *[["z"] * 30]])
    assert (tmp_path / "t.xlsx").read_bytes() == first
    with pytest.raises(DataError, match="cannot hold a text of 32,768 characters; a cell of Excel has 32,767"):
        write_xlsx(tmp_path / "long.xlsx", [["z" * 32_768]])


def test_seed_counts_what_occurs() -> None:
    questions = [
        {"question_id": "1", "question_type_id": 2, "data_type": "image", "answer": "A", "choice_a": "cat"},
        {"question_id": "v2", "question_type_id": 1, "data_type": "video", "answer": "B", "choice_b": "dog"},
    ]
    found = seed.score_answers(
        {"question_type": {"x": 2, "y": 1, "z": 3}, "questions": questions}, {1: "A", "v2": "B."}
    )
    assert found["types"] == {"y": 0.0, "x": 100.0} and list(found["types"]) == ["y", "x"]
    assert (found["total"], found["lenient"], found["kinds"]) == (50.0, 100.0, {"image": 100.0, "video": 0.0})


def test_gqa_by_type() -> None:
    questions = {"1": {"answer": "Yes", "types": {"structural": "verify"}}, "2": {"answer": "left"}}
    found = gqa.score_answers(questions, {"1": "yes...", "2": "the left"})
    assert found == {"all": {"n": 2, "accuracy": 50.0}, "verify": {"n": 1, "accuracy": 100.0}}


@given(st.text(max_size=8), st.text(max_size=8), st.text(max_size=8))
def test_edit_distance_is_a_metric(a: str, b: str, c: str) -> None:
    distance = m4c_evaluator.edit_distance
    assert (distance(a, b) == 0) == (a == b)
    assert distance(a, b) == distance(b, a) <= max(len(a), len(b))
    assert distance(a, c) <= distance(a, b) + distance(b, c)


def test_scene_text_evaluators() -> None:
    pairs = [{"pred_answer": "Kitten", "gt_answers": ["sitting", "x"]}, {"pred_answer": "", "gt_answers": [""]}]
    assert m4c_evaluator.STVQAANLSEvaluator().eval_pred_list(pairs) == pytest.approx((4 / 7 + 1) / 2)
    assert m4c_evaluator.STVQAAccuracyEvaluator().eval_pred_list(pairs) == 0.5
    assert m4c_evaluator.EvalAIAnswerProcessor()("The Dog.") == "dog"
    with pytest.raises(DataError, match="no answers"):
        m4c_evaluator.TextVQAAccuracyEvaluator().eval_pred_list([])


def test_bleu_passes_captions_to_pycocoevalcap(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pycocoevalcap", "pycocoevalcap.bleu", "pycocoevalcap.tokenizer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    with pytest.raises(DependencyError, match="pip install pycocoevalcap"):
        m4c_evaluator.TextCapsBleu4Evaluator()

    class Bleu:
        def __init__(self, n: int) -> None:
            assert n == 4

        def compute_score(self, references: object, answers: object) -> tuple[list[float], None]:
            assert references == {0: ["a", "b"]} and answers == {0: ["c"]}
            return [0.4, 0.3, 0.2, 0.1], None

    class Tokenizer:
        def tokenize(self, captions: dict[int, list[dict[str, str]]]) -> dict[int, list[str]]:
            return {key: [each["caption"] for each in rows] for key, rows in captions.items()}

    bleu, tokenizer = types.ModuleType("b"), types.ModuleType("t")
    bleu.Bleu, tokenizer.PTBTokenizer = Bleu, Tokenizer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", bleu)
    monkeypatch.setitem(sys.modules, "pycocoevalcap.tokenizer.ptbtokenizer", tokenizer)
    pair = {"pred_answer": "c", "gt_answers": ["a", "b"]}
    assert m4c_evaluator.TextCapsBleu4Evaluator().eval_pred_list([pair]) == 0.1


def test_gqa_predictions_file(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"question_id": "1", "text": "Yes."}])
    gqa.convert(source, tmp_path / "new" / "p.json")
    assert json.loads((tmp_path / "new" / "p.json").read_text()) == [{"questionId": "1", "prediction": "yes"}]
