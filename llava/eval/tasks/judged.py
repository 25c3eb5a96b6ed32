"""Benchmarks whose long answers a judge grades: MM-Vet, and LLaVA-Bench in the wild and on COCO.

The judge is any server with OpenAI's API (`OPENAI_BASE_URL`, `OPENAI_API_KEY`); without one the answers are kept and
the score is withheld.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from llava.errors import ConfigError, DataError
from llava.eval import reviews
from llava.eval.answers import Row
from llava.eval.files import read_json, read_rows, write_json, write_jsonl
from llava.eval.judge import Judge, base_url
from llava.eval.scorers import mm_vet, review
from llava.eval.tasks.files import COCO, FileTask, Layout

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
        asked = judge(path, mm_vet.JUDGE)
        grades = mm_vet.grade(asked, read_json(self.root / "mm-vet.json"), rows)
        write_json(path.with_name("grades.json"), grades, indent=2)
        return {**mm_vet.score(grades), "judge": asked.record(), "upload": str(target)}

    def truths(self, rows: Sequence[Row]) -> list[str]:
        known = read_json(self.root / "mm-vet.json")
        return [str(known[f"v1_{row['question_id']}"]["answer"]) for row in rows]

    def table(self, score: dict[str, Any]) -> str:
        return mm_vet.table(score)


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
        result = review.score(read_rows(output))
        if result["n_failed"]:
            raise DataError(f"{output} has {result['n_failed']} judgements without scores; not scored. Run again.")
        first, second = result["means"]["all"]
        if not first:
            raise DataError(f"{output}: the reference has a mean of 0, so there is no ratio.")
        return {"n": len(rows), "accuracy": 100 * second / first, **result, "judge": asked.record()}

    def truths(self, rows: Sequence[Row]) -> list[str]:
        reference = next(iter(self.layout.labels))
        texts = {row["question_id"]: row["text"] for row in read_rows(self.root / reference)}
        return [texts[row["question_id"]] for row in rows]

    def table(self, score: dict[str, Any]) -> str:
        return review.table(score)


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
