"""TextVQA: soft accuracy over the answers of ten people, joined by image and question."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from llava.errors import ConfigError, DataError
from llava.eval.benchmarks.base import Layout, Scores, Task, count_unread, is_blank
from llava.eval.benchmarks.outcomes import Outcome
from llava.eval.benchmarks.parsing import soft_accuracy
from llava.eval.run.answers import read_results
from llava.eval.run.files import Record, Row, read_json, require_same

logger = logging.getLogger(__name__)

OCR = "Reference OCR token:"
ANNOTATIONS = "TextVQA_0.5.1_val.json"
PAGE = "https://textvqa.org/dataset/"


def prompt_processor(prompt: str) -> str:
    """The annotated question inside a prompt, in lower case; it may have several lines."""
    if prompt.startswith("OCR tokens: "):
        head, _, rest = prompt.partition("Question: ")
        question, found, _ = rest.partition(" Short answer:")
        if head and found:
            return question.lower()
    elif "\n" in prompt:
        body = prompt.rpartition("\n")[0]  # the last line asks for a short answer
        if body.startswith(OCR):
            body = body.partition("\n")[2]
        return body.partition(f"\n{OCR} ")[0].lower()
    raise DataError(
        f"Cannot find the TextVQA question in the prompt {prompt[:80]!r}; expected a question and a suffix."
    )


def read_annotations(path: Path) -> Sequence[Record]:
    """The list under `data` of `TextVQA_0.5.1_val.json`."""
    content = read_json(path)
    rows = content.get("data") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all({"image_id", "question", "answers"} <= row.keys() for row in rows):
        raise DataError(
            f"{path} is not a TextVQA annotation file: expected a list 'data' of image_id, question, answers."
        )
    return rows


def annotation_key(item: Record) -> tuple[str, str]:
    return item["image_id"], item["question"].lower()


def answer_key(row: Record) -> tuple[str, str]:
    return row["question_id"], prompt_processor(row["prompt"])


def score_answers(annotations: Sequence[Record], rows: Sequence[Record], path: Path) -> Scores:
    """Mean soft accuracy in percent, and outcomes. Raises `DataError` if `path` answers other questions."""
    human_answers = {annotation_key(item): item["answers"] for item in annotations}
    keys = [answer_key(row) for row in rows]
    require_same(keys, map(annotation_key, annotations), path)
    found = [soft_accuracy(row["text"], human_answers[key]) for key, row in zip(keys, rows, strict=True)]
    unread = count_unread(is_blank(row["text"]) for row in rows)
    outcomes = [Outcome(" ".join(key), score) for key, score in zip(keys, found)]
    return {"n": len(rows), "accuracy": 100 * sum(found) / len(rows), **unread, "outcomes": outcomes}


class TextVQA(Task):
    name: ClassVar[str] = "textvqa"
    column = "TextVQA"
    folder = "textvqa"
    layouts: ClassVar = {
        "val": Layout(
            "llava_textvqa_val_v051_ocr.jsonl", "train_images", 5000, f"{PAGE} (train_val_images.zip)",
            {ANNOTATIONS: PAGE},
        )
    }  # fmt: skip

    def score_rows(self, rows: Sequence[Row], path: Path) -> Scores:
        asked = set(map(answer_key, rows))
        annotations = read_annotations(self.root / ANNOTATIONS)
        return score_answers([item for item in annotations if annotation_key(item) in asked], rows, path)

    def references(self, rows: Sequence[Record]) -> list[str]:
        annotations = read_annotations(self.root / ANNOTATIONS)
        human_answers: dict[tuple[str, str], list[str]] = {
            annotation_key(item): item["answers"] for item in annotations
        }
        return [Counter(human_answers[answer_key(row)]).most_common(1)[0][0] for row in rows]

    @staticmethod
    def table(scores: Scores) -> str:
        return f"{scores['task']}\nSamples: {scores['n']}\nAccuracy: {scores['accuracy']:.2f}%"


def evaluate(annotation_file: Path, result_file: Path | None, result_dir: Path | None) -> str:
    """`eval_textvqa`: score an answers file, every `.jsonl` of a folder, or both."""
    if result_file is None and result_dir is None:
        raise ConfigError("Nothing to score; give --result-file or --result-dir.")
    files = [] if result_file is None else [result_file]
    if result_dir is not None:
        if not result_dir.is_dir():
            raise ConfigError(f"--result-dir {result_dir} is not a folder.")
        for path in sorted(result_dir.iterdir()):
            if path.suffix == ".jsonl":
                files.append(path)
            else:
                logger.warning("Skipping %s: not a .jsonl file.", path.name)
    annotations = read_annotations(annotation_file)
    scores = [score_answers(annotations, read_results(path, "prompt"), path) for path in files]
    return "\n".join(TextVQA.summary({"task": path.stem, **each}) + "\n" for path, each in zip(files, scores))
