"""ScienceQA answered by a model and GPT-4 together (spec/eval.md §4.5). A guess is drawn by the problem's id (M6)."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import DataError
from llava.eval.benchmarks.science_qa import FAILED, Problem, index, parse_statement, percent, read_problems, shown
from llava.eval.run.files import by_key, read_json, read_results, write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Voter:
    """The indices one source gives, −1 where it failed."""

    indices: Mapping[str, int]

    def guess(self, pid: str, problem: Problem) -> int:
        """Its index, else one drawn evenly from the choices, the same in every run."""
        found = self.indices[pid]
        return random.Random(pid).randrange(len(problem["choices"])) if found < 0 else found

    def or_else(self, pid: str, other: int) -> int:
        found = self.indices[pid]
        return other if found < 0 else found


def voter(texts: Mapping[str, str], problems: Mapping[str, Problem], options: Sequence[str]) -> Voter:
    """What `The answer is X` says in each text; problems without a text failed."""
    return Voter(
        {pid: index(parse_statement(texts.get(pid, FAILED)), problem, options) for pid, problem in problems.items()}
    )


def _read_all(
    base_dir: Path, gpt4_result: Path, our_result: Path, split: str
) -> tuple[dict[str, Problem], dict[str, str], dict[str, str]]:
    problems = read_problems(base_dir, split)
    outputs = read_json(gpt4_result).get("outputs")
    if not isinstance(outputs, dict):
        raise DataError(f"{gpt4_result} has no 'outputs'; expected the result file of a ScienceQA run.")
    return problems, outputs, _texts(our_result)


def _texts(path: Path) -> dict[str, str]:
    return {pid: row["text"] for pid, row in by_key(read_results(path), path, "question_id").items()}


def _line(label: str, right: int, count: int, unit: str = "Accuracy") -> str:
    return f"Total: {count}, {label}: {right}, {unit}: {shown(percent(right, count))}%"


def ensemble(base_dir: Path, gpt4_result: Path, our_result: Path, split: str, options: Sequence[str]) -> str:
    """Accuracy over the problems both answered: GPT-4's answer, ours where it gave none; and of either being right."""
    problems, theirs, ours = _read_all(base_dir, gpt4_result, our_result, split)
    problems = {pid: problem for pid, problem in problems.items() if pid in theirs and pid in ours}
    if not problems:
        raise DataError(f"{gpt4_result} and {our_result} have no problem of split {split} in common.")
    gpt4, our = voter(theirs, problems, options), voter(ours, problems, options)
    right = upper = 0
    for pid, problem in problems.items():
        mine = our.guess(pid, problem)
        joint = gpt4.or_else(pid, mine)
        right += joint == problem["answer"]
        upper += problem["answer"] in (joint, mine)
    failed = sum(found < 0 for found in gpt4.indices.values())
    return "\n".join(
        (
            _line("Correct", right, len(problems)),
            _line("Correct (upper)", upper, len(problems)),
            _line("GPT-4 NO-ANS (RANDOM)", failed, len(problems), "Percentage"),
        )
    )


def requery(
    base_dir: Path, gpt4_result: Path, our_result: Path, requery_result: Path, output_result: Path, split: str,
    options: Sequence[str],
) -> str:  # fmt: skip
    """The six published lines, with GPT-4 asked again where it and our model disagree; writes the requery's result."""
    problems, theirs, ours = _read_all(base_dir, gpt4_result, our_result, split)
    missing = [pid for pid in problems if pid not in theirs or pid not in ours]
    if missing:
        raise DataError(
            f"{len(missing)} problem(s) of {split} lack an answer of ours or of GPT-4, first {missing[0]!r}."
        )
    again = voter(_texts(requery_result), problems, options)
    gpt4, our = voter(theirs, problems, options), voter(ours, problems, options)
    count = dict.fromkeys(("ours", "gpt4", "joint", "requery", "upper"), 0)
    results = {}
    for pid, problem in problems.items():
        truth, mine, guess = problem["answer"], our.guess(pid, problem), gpt4.guess(pid, problem)
        results[pid] = again.or_else(pid, mine)
        for name, right in (
            ("ours", mine == truth), ("gpt4", guess == truth), ("joint", gpt4.or_else(pid, mine) == truth),
            ("requery", results[pid] == truth), ("upper", truth in (guess, mine)),
        ):  # fmt: skip
            count[name] += right
    total = len(problems)
    failed = sum(found < 0 for found in gpt4.indices.values())
    wrong = [pid for pid, found in results.items() if found != problems[pid]["answer"]]
    logger.warning("The requery is wrong for %d problem(s): %s", len(wrong), ", ".join(wrong))
    record: dict[str, Any] = {
        "acc": percent(count["requery"], total), "correct": count["requery"], "count": total, "results": results,
        "outputs": {},
    }  # fmt: skip
    write_json(output_result, record, indent=2)
    return "\n".join(
        (
            _line("Our-Correct", count["ours"], total),
            _line("GPT-4-Correct", count["gpt4"], total),
            _line("GPT-4 NO-ANS (RANDOM)", failed, total, "Percentage"),
            _line("GPT-4-OursVisual-Correct", count["joint"], total),
            _line("Requery-Correct", count["requery"], total),
            _line("Correct upper", count["upper"], total),
        )
    )
