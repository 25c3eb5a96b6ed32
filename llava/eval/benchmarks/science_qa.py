"""ScienceQA: multiple choice with the published answer parsing, and ensembles with GPT-4.

Published: the accuracy on questions with an image.
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from llava.errors import DataError
from llava.eval.benchmarks.base import EVAL_ZIP, Layout, Scores, Task, count_unread
from llava.eval.benchmarks.outcomes import Outcome
from llava.eval.benchmarks.parsing import parse_option
from llava.eval.run.answers import read_results, read_texts
from llava.eval.run.files import Record, Row, by_key, read_json, write_json
from llava.eval.run.questions import LETTER_SUFFIX, Question, QuestionId

logger = logging.getLogger(__name__)

OPTIONS: Final = ("A", "B", "C", "D", "E")
FAILED: Final = "FAILED"
STATEMENT: Final = re.compile(r"The answer is ([A-Z]).")
SOURCE: Final = "https://github.com/lupantech/ScienceQA, data/scienceqa"

Problem = Record  # an entry of problems.json

SUBSETS: Final[Mapping[str, Callable[[Problem], bool]]] = {
    "NAT": lambda problem: problem.get("subject") == "natural science",
    "SOC": lambda problem: problem.get("subject") == "social science",
    "LAN": lambda problem: problem.get("subject") == "language science",
    "TXT": lambda problem: bool(problem.get("hint")),
    "IMG": lambda problem: bool(problem.get("image")),
    "NO": lambda problem: not problem.get("hint") and not problem.get("image"),
    "G1-6": lambda problem: _grade(problem) in range(1, 7),
    "G7-12": lambda problem: _grade(problem) in range(7, 13),
}


def _grade(problem: Problem) -> int:
    digits = str(problem.get("grade", "")).removeprefix("grade")
    return int(digits) if digits.isdigit() else 0


def read_questions(path: Path, single_pred_prompt: bool = False) -> list[Question]:
    """Read the question file, a JSON list of conversations, whose first turn is the question.

    The recorded prompt starts with `<image>` if there is one; `single_pred_prompt` appends the request for a letter.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
        asked = [(row["id"], row.get("image"), str(row["conversations"][0]["value"])) for row in rows]
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not a list of ScienceQA conversations ({type(error).__name__}: {error})."
        ) from error
    questions = []
    for question_id, image, value in asked:
        text = value.replace("<image>", "").strip() + (f"\n{LETTER_SUFFIX}" if single_pred_prompt else "")
        prompt = f"<image>\n{text}" if image else text
        questions.append(Question(question_id, prompt, (image,) if image else (), text))
    return questions


def read_problems(base_dir: Path, split: str) -> dict[str, Problem]:
    """The problems of a split of `pid_splits.json`, in its order."""
    splits, problems = read_json(base_dir / "pid_splits.json"), read_json(base_dir / "problems.json")
    if split not in splits:
        raise DataError(f"{base_dir / 'pid_splits.json'} has no split {split!r}; choose from {', '.join(splits)}.")
    missing = [pid for pid in splits[split] if pid not in problems]
    if missing:
        raise DataError(
            f"{base_dir / 'problems.json'} is missing {len(missing)} problem(s) of {split}: {missing[0]} first."
        )
    return {pid: problems[pid] for pid in splits[split]}


def parse(text: str, options: Sequence[str] = OPTIONS) -> str:
    """The published rule: a letter alone, a letter and `. `, or exactly one `The answer is X` and a character."""
    if text in options:
        return text
    if len(text) >= 3 and text[0] in options and text[1:3] == ". ":
        return text[0]
    return parse_statement(text)


def parse_statement(text: str) -> str:
    """The letter of the only `The answer is X`, else `FAILED`."""
    found = STATEMENT.findall(text)
    return str(found[0]) if len(found) == 1 else FAILED


def choice_index(letter: str, problem: Problem, options: Sequence[str] = OPTIONS) -> int:
    """Index of the choice with this letter, -1 if there is none."""
    letters = list(options[: len(problem["choices"])])
    return letters.index(letter) if letter in letters else -1


def parse_lenient(text: str, problem: Problem, options: Sequence[str] = OPTIONS) -> int:
    """Index of the choice found by `parse_option`, -1 if there is none."""
    letter = parse_option(text, dict(zip(options, problem["choices"], strict=False)))
    return -1 if letter is None else options.index(letter)


@dataclass(frozen=True)
class Prediction:
    """A problem and the answer record, None if the answer is missing."""

    question_id: str
    problem: Problem
    row: Record | None
    options: Sequence[str] = OPTIONS

    @property
    def text(self) -> str:
        return "" if self.row is None else str(self.row["text"])

    @property
    def letter(self) -> str:
        return FAILED if self.row is None else parse(self.text, self.options)

    @property
    def index(self) -> int:
        return choice_index(self.letter, self.problem, self.options)

    @property
    def correct(self) -> bool:
        return bool(self.index == self.problem["answer"])

    @property
    def correct_lenient(self) -> bool:
        return self.correct or parse_lenient(self.text, self.problem, self.options) == self.problem["answer"]

    def outcome(self) -> Outcome:
        """The outcome of the answer, in the groups of `score_predictions`."""
        groups = [f"subsets/{name}/accuracy" for name, contains in SUBSETS.items() if contains(self.problem)]
        groups += ["img_accuracy"] if SUBSETS["IMG"](self.problem) else []
        return Outcome(self.question_id, self.correct, groups, {"lenient_accuracy": float(self.correct_lenient)})

    def record(self) -> Row:
        """An item of `--output-file`."""
        return {
            "question_id": self.question_id,
            "parsed_ans": self.letter,
            "ground_truth": self.options[self.problem["answer"]],
            "question": "Unknown" if self.row is None else self.row.get("prompt", "Unknown"),
            "pred": self.text if self.row is not None else FAILED,
            "is_multimodal": SUBSETS["IMG"](self.problem),
        }


def percent(part: int, total: int) -> float | None:
    """100 · part / total, None if the total is 0."""
    return 100 * part / total if total else None


def format_percent(value: float | None, width: int = 0) -> str:
    """Two decimals, a dash for None."""
    return f"{'–' if value is None else f'{value:.2f}':>{width}}"


def score_predictions(predictions: Sequence[Prediction]) -> Scores:
    """Accuracies in percent: overall, per subset, and with lenient parsing.

    Answers without a choice for the published rule are unread and wrong, also missing ones.
    """
    if not predictions:
        raise DataError("The split has no problems to score.")
    subsets = {}
    for name, contains in SUBSETS.items():
        members = [item.correct for item in predictions if contains(item.problem)]
        subsets[name] = {"n": len(members), "accuracy": percent(sum(members), len(members))}
    correct = sum(item.correct for item in predictions)
    return {
        "n": len(predictions),
        **count_unread(item.index < 0 for item in predictions),
        "correct": correct,
        "accuracy": percent(correct, len(predictions)),
        "img_accuracy": subsets["IMG"]["accuracy"],
        "lenient_accuracy": percent(sum(item.correct_lenient for item in predictions), len(predictions)),
        "missing": sum(item.row is None for item in predictions),
        "subsets": subsets,
    }


def answers_by_problem(rows: Sequence[Record], problems: Mapping[str, Problem], path: Path) -> dict[str, Record]:
    """Answers by problem id. Raises `DataError` for duplicates in `path` and for answers to other problems."""
    answers = by_key(rows, path, "question_id")
    unknown = [pid for pid in answers if pid not in problems]
    if unknown:
        raise DataError(
            f"{path} answers {len(unknown)} question(s) outside this split, the first {unknown[0]!r}; not scored."
        )
    return answers


class ScienceQA(Task):
    name: ClassVar[str] = "science_qa"
    column = "SQA"
    metric = "img_accuracy"
    folder = "scienceqa"
    layouts: ClassVar = {
        "test": Layout(
            "llava_test_CQM-A.json", "images/test", 4241, SOURCE,
            dict.fromkeys(("pid_splits.json", "problems.json"), SOURCE),
            f"{EVAL_ZIP}; or build it: python scripts/convert_sqa_to_llava.py convert_to_questions",
        )
    }  # fmt: skip

    def read_questions(self, path: Path) -> Sequence[Question]:
        return read_questions(path, single_pred_prompt=True)

    def score_rows(self, rows: Sequence[Row], path: Path) -> Scores:
        problems = read_problems(self.root, self.split)
        answers = answers_by_problem(rows, problems, path)
        items = [Prediction(pid, problems[pid], row) for pid, row in answers.items()]
        return {**score_predictions(items), "outcomes": [item.outcome() for item in items]}

    def references(self, rows: Sequence[Record]) -> list[str]:
        problems = read_problems(self.root, self.split)
        return [OPTIONS[problems[row["question_id"]]["answer"]] for row in rows]

    @staticmethod
    def table(scores: Scores) -> str:
        """The published line, followed by the subsets and the lenient accuracy."""
        lines = [
            f"Total: {scores['n']}, Correct: {scores['correct']}, Accuracy: {format_percent(scores['accuracy'])}%, "
            f"IMG-Accuracy: {format_percent(scores['img_accuracy'])}%"
        ]
        for name, subset in scores["subsets"].items():
            lines.append(f"  {name:<6}{subset['n']:>6}{format_percent(subset['accuracy'], 9)} %")
        lenient = format_percent(scores["lenient_accuracy"])
        lines.append(f"  lenient parsing (sentences, any case, brackets, option texts): {lenient} %")
        return "\n".join(lines)


def evaluate(
    base_dir: Path, result_file: Path, output_file: Path | None, output_result: Path | None, split: str,
    options: Sequence[str],
) -> str:  # fmt: skip
    """`eval_science_qa`: score an answers file and write the result files."""
    problems = read_problems(base_dir, split)
    rows = answers_by_problem(read_results(result_file), problems, result_file)
    items = [Prediction(pid, problem, rows.get(pid), options) for pid, problem in problems.items()]
    if len(rows) < len(items):
        logger.warning("%d of %d answers are missing and count as wrong.", len(items) - len(rows), len(items))
    if output_file is not None:
        sides = {"correct": True, "incorrect": False}
        records = {name: [item.record() for item in items if item.correct == side] for name, side in sides.items()}
        write_json(output_file, records, indent=2)
    if output_result is not None:
        correct = sum(item.correct for item in items)
        result = {
            "acc": percent(correct, len(items)),
            "correct": correct,
            "count": len(items),
            "results": {item.question_id: item.index for item in items},
            "outputs": {item.question_id: item.text if item.row is not None else FAILED for item in items},
        }
        write_json(output_result, result, indent=2)
    return ScienceQA.summary(score_predictions(items))


def parse_options(text: str) -> tuple[str, ...]:
    """The value of `--options`: `A,B,C`, or the published form `ABC`."""
    return tuple(text.split(",")) if "," in text else tuple(text)


@dataclass(frozen=True)
class Voter:
    """Choice indices of one model by problem id, -1 where it failed."""

    indices: Mapping[str, int]

    @classmethod
    def of(cls, texts: Mapping[QuestionId, str], problems: Mapping[str, Problem], options: Sequence[str]) -> Voter:
        """Parse the `The answer is X` of each text; problems without a text count as failed."""
        letters = {pid: parse_statement(texts.get(pid, FAILED)) for pid in problems}
        return cls({pid: choice_index(letters[pid], problem, options) for pid, problem in problems.items()})

    @property
    def failures(self) -> int:
        return sum(index < 0 for index in self.indices.values())

    def guess(self, pid: str, problem: Problem) -> int:
        """The index, or a uniform random choice seeded with the problem id if the model failed."""
        return self.or_else(pid, random.Random(pid).randrange(len(problem["choices"])))

    def or_else(self, pid: str, other: int) -> int:
        index = self.indices[pid]
        return other if index < 0 else index


def _read_all(
    base_dir: Path, gpt4_result: Path, our_result: Path, split: str
) -> tuple[dict[str, Problem], dict[QuestionId, str], dict[QuestionId, str]]:
    problems = read_problems(base_dir, split)
    outputs = read_json(gpt4_result).get("outputs")
    if not isinstance(outputs, dict) or not all(isinstance(text, str) for text in outputs.values()):
        raise DataError(f"{gpt4_result} has no texts under 'outputs'; expected the result file of a ScienceQA run.")
    return problems, outputs, read_texts(our_result)


def _line(label: str, part: int, total: int, unit: str = "Accuracy") -> str:
    return f"Total: {total}, {label}: {part}, {unit}: {format_percent(percent(part, total))}%"


def _guessed(voter: Voter) -> str:
    """The number of our model's answers that the published rule cannot read and replaces by a random choice."""
    return f"Our unread answers, guessed at random as published: {voter.failures} of {len(voter.indices)}"


def ensemble(base_dir: Path, gpt4_result: Path, our_result: Path, split: str, options: Sequence[str]) -> str:
    """Accuracy of GPT-4 with our model as fallback, and of either being right, over the problems that both answered."""
    problems, theirs, ours = _read_all(base_dir, gpt4_result, our_result, split)
    problems = {pid: problem for pid, problem in problems.items() if pid in theirs and pid in ours}
    if not problems:
        raise DataError(f"{gpt4_result} and {our_result} have no problem of split {split} in common.")
    gpt4, our = Voter.of(theirs, problems, options), Voter.of(ours, problems, options)
    correct = upper = 0
    for pid, problem in problems.items():
        ours_index = our.guess(pid, problem)
        joint = gpt4.or_else(pid, ours_index)
        correct += joint == problem["answer"]
        upper += problem["answer"] in (joint, ours_index)
    total = len(problems)
    lines = [_line("Correct", correct, total), _line("Correct (upper)", upper, total)]
    lines.append(_line("GPT-4 NO-ANS (RANDOM)", gpt4.failures, total, "Percentage"))
    return "\n".join([*lines, _guessed(our)])


def requery(
    base_dir: Path, gpt4_result: Path, our_result: Path, requery_result: Path, output_result: Path, split: str,
    options: Sequence[str],
) -> str:  # fmt: skip
    """The six published lines, with GPT-4 asked again where it and our model disagree; writes the requery's result."""
    problems, theirs, ours = _read_all(base_dir, gpt4_result, our_result, split)
    missing = [pid for pid in problems if pid not in theirs or pid not in ours]
    if missing:
        raise DataError(f"{len(missing)} problem(s) of {split} have no answer by us or by GPT-4, first {missing[0]!r}.")
    again = Voter.of(read_texts(requery_result), problems, options)
    gpt4, our = Voter.of(theirs, problems, options), Voter.of(ours, problems, options)
    count = dict.fromkeys(("ours", "gpt4", "joint", "requery", "upper"), 0)
    results = {}
    for pid, problem in problems.items():
        answer, our_index, gpt4_index = problem["answer"], our.guess(pid, problem), gpt4.guess(pid, problem)
        results[pid] = again.or_else(pid, our_index)
        count["ours"] += our_index == answer
        count["gpt4"] += gpt4_index == answer
        count["joint"] += gpt4.or_else(pid, our_index) == answer
        count["requery"] += results[pid] == answer
        count["upper"] += answer in (gpt4_index, our_index)
    total = len(problems)
    wrong = [pid for pid, found in results.items() if found != problems[pid]["answer"]]
    logger.warning("The requery is wrong for %d problem(s): %s", len(wrong), ", ".join(wrong))
    accuracy = percent(count["requery"], total)
    record = {"acc": accuracy, "correct": count["requery"], "count": total, "results": results, "outputs": {}}
    write_json(output_result, record, indent=2)
    return "\n".join(
        (
            _line("Our-Correct", count["ours"], total),
            _line("GPT-4-Correct", count["gpt4"], total),
            _line("GPT-4 NO-ANS (RANDOM)", gpt4.failures, total, "Percentage"),
            _line("GPT-4-OursVisual-Correct", count["joint"], total),
            _line("Requery-Correct", count["requery"], total),
            _line("Correct upper", count["upper"], total),
            _guessed(our),
        )
    )
