"""Benchmarks with long answers graded by a judge model: MM-Vet, and LLaVA-Bench in the wild and on COCO.

The judge is a server with an OpenAI-compatible API (`OPENAI_BASE_URL`, `OPENAI_API_KEY`). Without one, the answers are
kept and not scored.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, TypedDict

from llava.errors import ConfigError, DataError
from llava.eval.benchmarks.base import COCO, Layout, Scores, Task, is_blank
from llava.eval.benchmarks.outcomes import Outcome
from llava.eval.judging import reviews
from llava.eval.judging.judge import Judge, base_url
from llava.eval.run.answers import read_texts
from llava.eval.run.files import Record, Row, read_json, read_rows, write_json, write_jsonl
from llava.eval.run.questions import QuestionId

if TYPE_CHECKING:
    from llava.eval.outcomes import Outcomes
    from llava.eval.uncertainty import Metric

MM_VET_JUDGE: Final = "gpt-4-0613"
LLAVA_BENCH_JUDGE: Final = "gpt-4-0314"
MM_VET_ZIP: Final = "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip"
LLAVA_REPO: Final = "https://github.com/haotian-liu/LLaVA"
WILD_PAGE: Final = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"

PROMPT: Final = """Grade how right an answer about an image is, from 0.0 (nothing of it) to 1.0 (all of it) in steps \
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
True answer: {reference}
Answer: {answer}
Grade:"""
# a number from 0 to 1, alone or followed by words, which the official notebook ignores too
GRADE: Final = re.compile(
    r"(?:(?:grade|score|correctness)\W*)*(1(?:\.0*)?|0?\.\d+|0\.?)(?:/1(?:\.0+)?)?"
    r"(?:[.,;:]?\s+(?!\d|(?:to|or|and|of|out)\b|[-–/%]).*|[^\w%]*)",
    re.IGNORECASE,
)


class Grade(TypedDict):
    """Grade of an answer from 0 to 1, and the capabilities that its question tests."""

    grade: float
    capability: list[str]


def make_judge(answers: Path, default_model: str) -> Judge:
    """The judge named by the environment, with its replies cached beside the answers file.

    Raises `ConfigError` without `OPENAI_API_KEY` and `OPENAI_BASE_URL`.
    """
    if not (os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_BASE_URL")):
        raise ConfigError(
            "No judge is configured, so the answers are kept and not scored; set OPENAI_API_KEY, or OPENAI_BASE_URL "
            "(and LLAVA_JUDGE, the model) for another server, and run the same command again."
        )
    model = os.environ.get("LLAVA_JUDGE", default_model)
    return Judge(model, base_url(None), cache=answers.with_name("judge.cache.jsonl"))


def parse_grade(reply: str) -> float | None:
    """The number that begins the first line of a reply, None if there is none from 0 to 1, or a range."""
    match = GRADE.fullmatch(reviews.plain_lines(reply)[0]) if reply.strip() else None
    return None if match is None else float(match[1])


def grade_answers(judge: Judge, references: Mapping[str, Record], rows: Sequence[Record]) -> dict[str, Grade]:
    """Grades by id, 0 for an empty answer. The judge is asked twice for a grade before `DataError` is raised."""
    grades: dict[str, Grade] = {}
    for row in rows:
        key = f"v1_{row['question_id']}"
        if key not in references:
            raise DataError(f"mm-vet.json has no question {key!r}; expected the annotations of release v1.")
        item = references[key]
        prompt = PROMPT.format(question=item["question"], reference=item["answer"], answer=row["text"])
        grade = 0.0 if is_blank(row["text"]) else parse_grade(judge.ask(prompt))
        grade = parse_grade(judge.ask(prompt, use_cache=False)) if grade is None else grade
        if grade is None:
            raise DataError(f"The judge did not grade the answer to {key!r} in two attempts; not scored.")
        grades[key] = {"grade": grade, "capability": list(item["capability"])}
    return grades


def score_grades(grades: Mapping[str, Grade]) -> Scores:
    """100 × the mean grade, in total and per capability."""
    groups: dict[str, list[float]] = {"total": []}
    for item in grades.values():
        for name in ("total", *item["capability"]):
            groups.setdefault(name, []).append(item["grade"])
    means = {name: 100 * sum(values) / len(values) for name, values in groups.items()}
    return {"n": len(grades), "accuracy": means["total"], "capabilities": means}


def write_results(target: Path, answers: Mapping[QuestionId, str]) -> None:
    """Write MM-Vet's `{"v1_<id>": text}`."""
    write_json(target, {f"v1_{key}": text for key, text in answers.items()}, indent=2)


def convert(src: Path, dst: Path) -> str:
    """`convert_mmvet_for_eval`: write the input of MM-Vet's grading notebook."""
    write_results(dst, read_texts(src))
    return ""


class MMVet(Task):
    name: ClassVar[str] = "mm_vet"
    column = "MM-Vet"
    folder = "mm-vet"
    max_new_tokens = 1024
    layouts: ClassVar = {"test": Layout("llava-mm-vet.jsonl", "images", 218, MM_VET_ZIP, {"mm-vet.json": MM_VET_ZIP})}

    def score_rows(self, rows: Sequence[Row], path: Path) -> Scores:
        target = path.with_name("results.json")
        write_results(target, {row["question_id"]: row["text"] for row in rows})
        judge = make_judge(path, MM_VET_JUDGE)
        grades = grade_answers(judge, read_json(self.root / "mm-vet.json"), rows)
        write_json(path.with_name("grades.json"), grades, indent=2)
        outcomes = [
            Outcome(key, item["grade"], [f"capabilities/{name}" for name in ("total", *item["capability"])])
            for key, item in grades.items()
        ]
        return {**score_grades(grades), "judge": judge.settings(), "upload": str(target), "outcomes": outcomes}

    def references(self, rows: Sequence[Record]) -> list[str]:
        annotations = read_json(self.root / "mm-vet.json")
        return [str(annotations[f"v1_{row['question_id']}"]["answer"]) for row in rows]

    @staticmethod
    def table(scores: Scores) -> str:
        return "\n".join(f"{name:<8}{value:>8.1f}" for name, value in scores["capabilities"].items())


class LlavaBench(Task):
    """LLaVA-Bench in the wild. The score is the ratio of model to reference in a pairwise comparison."""

    name: ClassVar[str] = "llava_bench"
    column: ClassVar[str | None] = "LLaVA-Bench"
    folder = "llava-bench-in-the-wild"
    max_new_tokens = 1024
    layouts: ClassVar = {
        "test": Layout("questions.jsonl", "images", 60, WILD_PAGE,
                       dict.fromkeys(("answers_gpt4.jsonl", "context.jsonl"), WILD_PAGE), WILD_PAGE)
    }  # fmt: skip
    review_type: ClassVar[reviews.ReviewType] = reviews.BENCH

    def score_rows(self, rows: Sequence[Row], path: Path) -> Scores:
        judge = make_judge(path, LLAVA_BENCH_JUDGE)
        reference, context = (self.root / name for name in self.layout.labels)
        answered = {row["question_id"] for row in rows}
        questions, subset = path.with_name("questions.part.jsonl"), path.with_name("reference.part.jsonl")
        for source, target in ((self.question_path, questions), (reference, subset)):
            write_jsonl(target, [row for row in read_rows(source) if row["question_id"] in answered])
        output = path.with_name("reviews.jsonl")
        output.unlink(missing_ok=True)  # the judge's cache has the replies to unchanged answers
        files = reviews.ReviewFiles(questions, [subset, path], output, context)
        reviews.review_files(judge, self.review_type, files)
        reviewed = read_rows(output)
        result = reviews.score_reviews(reviewed)
        if result["n_failed"]:
            raise DataError(f"{output} has {result['n_failed']} judgements without scores; not scored. Run again.")
        first, second = result["means"]["all"]
        if not first:
            raise DataError(f"{output}: the mean score of the reference is 0, so the ratio is undefined.")
        outcomes = [
            Outcome(str(row["question_id"]), row["tuple"][1] / 10, [row["category"]], {"reference": row["tuple"][0]})
            for row in reviewed
        ]  # fmt: skip
        accuracy = {"n": len(rows), "accuracy": 100 * second / first}
        return {**accuracy, **result, "judge": judge.settings(), "outcomes": outcomes}

    @classmethod
    def metrics(cls, outcomes: Outcomes) -> list[Metric]:
        """The printed ratio and means of all questions and of each category; they have no upper bound."""
        from llava.eval.uncertainty import Metric, ratio

        found, model, reference = [], 10 * outcomes.scores, outcomes.values["reference"]
        for name, members in {"all": outcomes.scores >= 0, **outcomes.groups}.items():
            sums = outcomes.sums(members, members * model, members * reference)
            found += [
                Metric(f"means/{name}/{label}", sums[:, columns], ratio(scale), None)
                for label, columns, scale in (("ratio", [1, 2], 100.0), ("0", [2, 0], 1.0), ("1", [1, 0], 1.0))
            ]
        return [replace(found[0], name="accuracy"), *found]

    def references(self, rows: Sequence[Record]) -> list[str]:
        reference = next(iter(self.layout.labels))
        texts = {row["question_id"]: row["text"] for row in read_rows(self.root / reference)}
        return [texts[row["question_id"]] for row in rows]

    @staticmethod
    def table(scores: Scores) -> str:
        return reviews.format_means(scores["means"])


class LlavaBenchCoco(LlavaBench):
    """LLaVA-Bench on COCO: 30 images with three questions each. The judge sees captions and boxes."""

    name: ClassVar[str] = "llava_bench_coco"
    column: ClassVar[str | None] = None
    folder = "../coco2014_val_qa_eval"
    layouts: ClassVar = {
        "test": Layout(
            "qa90_questions.jsonl", "val2014", 90, f"{COCO}val2014.zip",
            {"qa90_gpt4_answer.jsonl": f"{LLAVA_REPO}, playground/data/coco2014_val_qa_eval",
             "caps_boxes_coco2014_val_80.jsonl": f"{LLAVA_REPO}, llava/eval/table"},
            f"{LLAVA_REPO}, playground/data/coco2014_val_qa_eval",
        )
    }  # fmt: skip
    review_type = reviews.VISUAL
