"""ScienceQA: multiple choice, with the published rule of reading an answer (spec/eval.md §4.4). Published: IMG."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

from llava.errors import DataError
from llava.eval.benchmarks.base import EVAL_ZIP, FileTask, Layout
from llava.eval.benchmarks.parsing import read_option
from llava.eval.run.answers import Row
from llava.eval.run.files import by_key, read_json, read_results, write_json
from llava.eval.run.questions import Question, read_science_questions

logger = logging.getLogger(__name__)

OPTIONS: Final = ("A", "B", "C", "D", "E")
FAILED: Final = "FAILED"
STATEMENT: Final = re.compile(r"The answer is ([A-Z]).")

Problem = Mapping[str, Any]


def parse(text: str, options: Sequence[str] = OPTIONS) -> str:
    """The published rule: a letter alone, a letter and `. `, or exactly one `The answer is X` and a character."""
    if text in options:
        return text
    if len(text) >= 3 and text[0] in options and text[1:3] == ". ":
        return text[0]
    return parse_statement(text)


def parse_statement(text: str) -> str:
    """The only letter after `The answer is `, else FAILED."""
    found = STATEMENT.findall(text)
    return str(found[0]) if len(found) == 1 else FAILED


def index(letter: str, problem: Problem, options: Sequence[str] = OPTIONS) -> int:
    """Position of a letter among the problem's choices, −1 when it is none of them."""
    here = list(options[: len(problem["choices"])])
    return here.index(letter) if letter in here else -1


def leniently(text: str, problem: Problem, options: Sequence[str] = OPTIONS) -> int:
    """Position of the choice an answer means by `choices.read_option`, `The answer is` before it left out."""
    body = text.rpartition("nswer is ")[2] or text
    letter = read_option(body, dict(zip(options, problem["choices"], strict=False)))
    return -1 if letter is None else options.index(letter)


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


@dataclass(frozen=True)
class Item:
    """One problem and what was answered; `row` is None when nothing was."""

    question_id: str
    problem: Problem
    row: Mapping[str, Any] | None
    options: Sequence[str] = OPTIONS

    @property
    def text(self) -> str:
        return "" if self.row is None else str(self.row["text"])

    @property
    def letter(self) -> str:
        return FAILED if self.row is None else parse(self.text, self.options)

    @property
    def index(self) -> int:
        return index(self.letter, self.problem, self.options)

    @property
    def right(self) -> bool:
        return bool(self.index == self.problem["answer"])

    @property
    def leniently_right(self) -> bool:
        return self.right or leniently(self.text, self.problem, self.options) == self.problem["answer"]

    def record(self) -> dict[str, Any]:
        """An item of `--output-file`."""
        return {
            "question_id": self.question_id,
            "parsed_ans": self.letter,
            "ground_truth": self.options[self.problem["answer"]],
            "question": "Unknown" if self.row is None else self.row.get("prompt", "Unknown"),
            "pred": self.text if self.row is not None else FAILED,
            "is_multimodal": SUBSETS["IMG"](self.problem),
        }


def percent(right: int, count: int) -> float | None:
    """100 · right / count, None of nothing."""
    return 100 * right / count if count else None


def shown(value: float | None, width: int = 0) -> str:
    """Two decimals, a dash for none."""
    return f"{'–' if value is None else f'{value:.2f}':>{width}}"


def score(items: Sequence[Item]) -> dict[str, Any]:
    """Accuracies in percent, overall, per subset and by the lenient rule. Missing answers count as wrong here."""
    if not items:
        raise DataError("The split has no problems; there is nothing to score.")
    subsets = {}
    for name, member in SUBSETS.items():
        inside = [item.right for item in items if member(item.problem)]
        subsets[name] = {"n": len(inside), "accuracy": percent(sum(inside), len(inside))}
    right = sum(item.right for item in items)
    return {
        "n": len(items),
        "correct": right,
        "accuracy": percent(right, len(items)),
        "img_accuracy": subsets["IMG"]["accuracy"],
        "lenient_accuracy": percent(sum(item.leniently_right for item in items), len(items)),
        "missing": sum(item.row is None for item in items),
        "subsets": subsets,
    }


def table(result: Mapping[str, Any]) -> str:
    """The published line, then the subsets and the lenient reading."""
    lines = [
        f"Total: {result['n']}, Correct: {result['correct']}, Accuracy: {shown(result['accuracy'])}%, "
        f"IMG-Accuracy: {shown(result['img_accuracy'])}%"
    ]
    lines += [f"  {name:<6}{found['n']:>6}{shown(found['accuracy'], 9)} %" for name, found in result["subsets"].items()]
    lines.append(f"  read leniently (any case, brackets, option texts): {shown(result['lenient_accuracy'])} %")
    return "\n".join(lines)


def read_problems(base_dir: Path, split: str) -> dict[str, Problem]:
    """The problems of a split of `pid_splits.json`, in its order."""
    splits, problems = read_json(base_dir / "pid_splits.json"), read_json(base_dir / "problems.json")
    if split not in splits:
        raise DataError(f"{base_dir / 'pid_splits.json'} has no split {split!r}; choose from {', '.join(splits)}.")
    unknown = [pid for pid in splits[split] if pid not in problems]
    if unknown:
        raise DataError(f"{base_dir / 'problems.json'} lacks {len(unknown)} problem(s) of {split}: {unknown[0]} first.")
    return {pid: problems[pid] for pid in splits[split]}


def known(rows: Sequence[Mapping[str, Any]], problems: Mapping[str, Problem], path: Path) -> dict[str, Any]:
    """Answers by problem; `DataError` for duplicates in `path` and for answers to other problems."""
    answers = by_key(rows, path, "question_id")
    strange = [pid for pid in answers if pid not in problems]
    if strange:
        raise DataError(
            f"{path} answers {len(strange)} question(s) that are not in this split, the first "
            f"{strange[0]!r}; not scored."
        )
    return answers


def read_items(base_dir: Path, split: str, result_file: Path, options: Sequence[str] = OPTIONS) -> list[Item]:
    """Every problem of the split with its answer; `DataError` for duplicates and answers to other problems."""
    problems = read_problems(base_dir, split)
    rows = known(read_results(result_file), problems, result_file)
    items = [Item(pid, problem, rows.get(pid), options) for pid, problem in problems.items()]
    if len(rows) < len(items):
        logger.warning("%d of %d answers are missing and count as wrong.", len(items) - len(rows), len(items))
    return items


def result_record(items: Sequence[Item]) -> dict[str, Any]:
    """The content of `--output-result`."""
    right = sum(item.right for item in items)
    return {
        "acc": percent(right, len(items)),
        "correct": right,
        "count": len(items),
        "results": {item.question_id: item.index for item in items},
        "outputs": {item.question_id: item.text if item.row is not None else FAILED for item in items},
    }


def evaluate(
    base_dir: Path, result_file: Path, output_file: Path | None, output_result: Path | None, split: str,
    options: Sequence[str],
) -> str:  # fmt: skip
    """Print the accuracies and write the two result files that are asked for."""
    items = read_items(base_dir, split, result_file, options)
    if output_file is not None:
        kinds = {
            name: [item.record() for item in items if item.right == want]
            for name, want in (("correct", True), ("incorrect", False))
        }
        write_json(output_file, kinds, indent=2)
    if output_result is not None:
        write_json(output_result, result_record(items), indent=2)
    return table(score(items))


def letters(text: str) -> tuple[str, ...]:
    """The value of `--options`: `A,B,C`, or the published form `ABC`."""
    return tuple(text.split(",")) if "," in text else tuple(text)


# --- ScienceQA --------------------------------------------------------------------------------------------------------


SOURCE = "https://github.com/lupantech/ScienceQA, data/scienceqa"


class ScienceQA(FileTask):
    name: ClassVar[str] = "science_qa"
    column = "SQA"
    folder = "scienceqa"
    layouts: ClassVar = {
        "test": Layout(
            "llava_test_CQM-A.json", "images/test", 4241, SOURCE,
            dict.fromkeys(("pid_splits.json", "problems.json"), SOURCE),
            f"{EVAL_ZIP}; or build it: python scripts/convert_sqa_to_llava.py convert_to_questions",
        )
    }  # fmt: skip
    splits = tuple(layouts)

    def read(self, path: Path) -> Sequence[Question]:
        return read_science_questions(path, single_pred_prompt=True)

    def score_rows(self, rows: Sequence[Row], path: Path) -> dict[str, Any]:
        problems = read_problems(self.root, self.split)
        answers = known(rows, problems, path)
        return score([Item(pid, problems[pid], row) for pid, row in answers.items()])

    def primary_metric(self, score: dict[str, Any]) -> float | None:
        found = score["img_accuracy"]
        return None if found is None else float(found)

    def references(self, rows: Sequence[Row]) -> list[str]:
        problems = read_problems(self.root, self.split)
        return [OPTIONS[problems[row["question_id"]]["answer"]] for row in rows]

    def table(self, score: dict[str, Any]) -> str:
        return table(score)
