"""Benchmarks whose long answers a judge grades: MM-Vet, and LLaVA-Bench in the wild and on COCO.

The judge is any server with OpenAI's API (`OPENAI_BASE_URL`, `OPENAI_API_KEY`); without one the answers are kept and
the score is withheld.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Protocol

from llava.errors import ConfigError, DataError
from llava.eval.benchmarks.base import COCO, FileTask, Layout
from llava.eval.judging import reviews
from llava.eval.judging.judge import Judge, base_url
from llava.eval.run.answers import Row
from llava.eval.run.files import by_key, read_json, read_results, read_rows, write_json, write_jsonl

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
    """A judge, see `llava.eval.judging.judge.Judge`."""

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


def grade(
    judge: Asked, references: Mapping[str, Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """By id, grade and capabilities of each answer. A reply without a grade is asked for once more, then refused."""
    grades: dict[str, Any] = {}
    for row in rows:
        key = f"v1_{row['question_id']}"
        if key not in references:
            raise DataError(f"mm-vet.json has no question {key!r}; expected the annotations of release v1.")
        truth = references[key]
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


# --- Benchmarks whose long answers a judge grades ---------------------------------------------------------------------


MODEL: Final = "gpt-4-0314"
MM_VET: Final = "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip"
LLAVA: Final = "https://github.com/haotian-liu/LLaVA"
WILD: Final = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"


def judge(path: Path, model: str) -> Judge:
    """The judge that the environment names; its replies are kept beside `path`."""
    if not (os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_BASE_URL")):
        raise ConfigError(
            "There is no judge, so the answers are kept and not scored; set OPENAI_API_KEY, or OPENAI_BASE_URL for "
            "another server (its model: LLAVA_JUDGE), and run the same command again."
        )
    return Judge(os.environ.get("LLAVA_JUDGE", model), base_url(None), cache=path.with_name("judge.cache.jsonl"))


class JudgedTask(FileTask):
    max_new_tokens: ClassVar[int] = 1024
    splits: ClassVar[tuple[str, ...]] = ("test",)


class MMVet(JudgedTask):
    name: ClassVar[str] = "mm_vet"
    column = "MM-Vet"
    folder = "mm-vet"
    layouts: ClassVar = {
        "test": Layout(
            "llava-mm-vet.jsonl", "images", 218, MM_VET,
            {"mm-vet.json": MM_VET},
        )
    }  # fmt: skip

    def score_rows(self, rows: Sequence[Row], path: Path) -> dict[str, Any]:
        target = path.with_name("results.json")
        write_json(target, {f"v1_{row['question_id']}": row["text"] for row in rows}, indent=2)
        asked = judge(path, JUDGE)
        grades = grade(asked, read_json(self.root / "mm-vet.json"), rows)
        write_json(path.with_name("grades.json"), grades, indent=2)
        return {**score(grades), "judge": asked.record(), "upload": str(target)}

    def references(self, rows: Sequence[Row]) -> list[str]:
        known = read_json(self.root / "mm-vet.json")
        return [str(known[f"v1_{row['question_id']}"]["answer"]) for row in rows]

    def table(self, score: dict[str, Any]) -> str:
        return table(score)


class LlavaBench(JudgedTask):
    """Reference answers come first in a comparison, so that the ratio is model over reference."""

    name: ClassVar[str] = "llava_bench"
    column: ClassVar[str | None] = "LLaVA-Bench"
    folder = "llava-bench-in-the-wild"
    layouts: ClassVar = {
        "test": Layout("questions.jsonl", "images", 60, WILD,
                       dict.fromkeys(("answers_gpt4.jsonl", "context.jsonl"), WILD), WILD)
    }  # fmt: skip
    kind: ClassVar[reviews.Kind] = reviews.Kind(reviews.caption_context, "llava_bench_")

    def score_rows(self, rows: Sequence[Row], path: Path) -> dict[str, Any]:
        asked = judge(path, MODEL)
        reference, context = (self.root / name for name in self.layout.labels)
        questions, answered = path.with_name("questions.part.jsonl"), {row["question_id"] for row in rows}
        write_jsonl(questions, [row for row in read_rows(self.question_path) if row["question_id"] in answered])
        subset = path.with_name("reference.part.jsonl")
        write_jsonl(subset, [row for row in read_rows(reference) if row["question_id"] in answered])
        output = path.with_name("reviews.jsonl")
        output.unlink(missing_ok=True)  # what is in it is in the cache, under the answers and the judge it is by
        reviews.review_files(asked, self.kind, questions, [subset, path], reviews.RULES, output, context)
        result = reviews.score(read_rows(output))
        if result["n_failed"]:
            raise DataError(f"{output} has {result['n_failed']} judgements without scores; not scored. Run again.")
        first, second = result["means"]["all"]
        if not first:
            raise DataError(f"{output}: the reference has a mean of 0, so there is no ratio.")
        return {"n": len(rows), "accuracy": 100 * second / first, **result, "judge": asked.record()}

    def references(self, rows: Sequence[Row]) -> list[str]:
        reference = next(iter(self.layout.labels))
        texts = {row["question_id"]: row["text"] for row in read_rows(self.root / reference)}
        return [texts[row["question_id"]] for row in rows]

    def table(self, score: dict[str, Any]) -> str:
        return reviews.table(score)


class LlavaBenchCoco(LlavaBench):
    """30 pictures of COCO with three questions each; the context is captions and boxes."""

    name: ClassVar[str] = "llava_bench_coco"
    column: ClassVar[str | None] = None
    folder = "../coco2014_val_qa_eval"
    layouts: ClassVar = {
        "test": Layout(
            "qa90_questions.jsonl", "val2014", 90, f"{COCO}val2014.zip",
            {"qa90_gpt4_answer.jsonl": f"{LLAVA}, playground/data/coco2014_val_qa_eval",
             "caps_boxes_coco2014_val_80.jsonl": f"{LLAVA}, llava/eval/table"},
            f"{LLAVA}, playground/data/coco2014_val_qa_eval",
        )
    }  # fmt: skip
    kind = reviews.Kind(reviews.box_context)
