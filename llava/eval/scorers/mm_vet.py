"""MM-Vet: the file its grading notebook reads, and grades by a judge of one's own (spec/eval.md §4.8, §6).

An answer's grade is 0 to 1 in steps of 0.1; the score is 100 × the mean, over all and over each capability. Published
numbers come from the official notebook and GPT-4; these prompts are worded afresh.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from llava.errors import DataError
from llava.eval.files import by_key, read_results, write_json

JUDGE: Final = "gpt-4-0613"
PROMPT: Final = """Grade how right an answer about a picture is, from 0.0 (nothing of it) to 1.0 (all of it) in steps \
of 0.1. The true answer may have parts: <AND> joins parts that must all be there, <OR> separates ways to be right.

Question: What is x in the equation?
True answer: -1 <AND> -5
Answer: x = 3
Grade: 0.0

Question: What is x in the equation?
True answer: -1 <AND> -5
Answer: x is -1.
Grade: 0.5

Question: What is x in the equation?
True answer: -1 <AND> -5
Answer: The solutions are x = -5 and x = -1.
Grade: 1.0

Question: {question}
True answer: {truth}
Answer: {answer}
Grade:"""
GRADE: Final = re.compile(r"\s*(?:Grade:)?\s*(1(?:\.0+)?|0(?:\.\d+)?)\s*\.?\s*")


class Asked(Protocol):
    """A judge, see `llava.eval.judge.Judge`."""

    def ask(self, user: str, system: str | None = None, *, afresh: bool = False) -> str: ...


def convert(src: Path, dst: Path) -> str:
    """Write `{"v1_<id>": text}`."""
    rows = by_key(read_results(src), src, "question_id")
    write_json(dst, {f"v1_{key}": row["text"] for key, row in rows.items()}, indent=2)
    return ""


def parse_grade(reply: str) -> float | None:
    """The number that is all of the reply's first line; None when it is something else."""
    match = GRADE.fullmatch(reply.strip().split("\n")[0]) if reply.strip() else None
    return None if match is None else float(match[1])


def grade(judge: Asked, truths: Mapping[str, Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By id, grade and capabilities of each answer. A reply without a grade is asked for once more, then refused."""
    grades: dict[str, Any] = {}
    for row in rows:
        key = f"v1_{row['question_id']}"
        if key not in truths:
            raise DataError(f"mm-vet.json has no question {key!r}; expected the annotations of release v1.")
        truth = truths[key]
        message = PROMPT.format(question=truth["question"], truth=truth["answer"], answer=row["text"])
        found = parse_grade(judge.ask(message))
        found = parse_grade(judge.ask(message, afresh=True)) if found is None else found
        if found is None:
            raise DataError(f"The judge gave no grade to the answer of {key!r}, twice; not scored.")
        grades[key] = {"grade": found, "capability": list(truth["capability"])}
    return grades


def score(grades: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """100 × the mean grade, over all and per capability."""
    groups: dict[str, list[float]] = {"total": []}
    for found in grades.values():
        for name in ("total", *found["capability"]):
            groups.setdefault(name, []).append(found["grade"])
    means = {name: 100 * sum(values) / len(values) for name, values in groups.items()}
    return {"n": len(grades), "accuracy": means["total"], "capabilities": means}


def table(result: Mapping[str, Any]) -> str:
    return "\n".join(f"{name:<8}{value:>8.1f}" for name, value in result["capabilities"].items())
