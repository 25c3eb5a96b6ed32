"""TextVQA: soft accuracy over ten people's answers (spec/eval.md §4.2). The picture and the question are the key."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.errors import ConfigError, DataError
from llava.eval.benchmarks.base import FileTask, Layout
from llava.eval.benchmarks.parsing import soft_accuracy
from llava.eval.run.answers import Row
from llava.eval.run.files import read_json, read_results, require_same

logger = logging.getLogger(__name__)

OCR = "Reference OCR token:"


def question_of(prompt: str) -> str:
    """The annotated question inside a prompt, in lower case; it may have several lines itself (defect M10)."""
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
        f"No TextVQA question can be told from the prompt {prompt[:80]!r}; expected a question and a suffix."
    )


def score(annotations: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], path: Path) -> dict[str, Any]:
    """Mean soft accuracy in percent; `DataError` when the answers of `path` are to other questions."""
    people = {(item["image_id"], item["question"].lower()): item["answers"] for item in annotations}
    keys = [(row["question_id"], question_of(row["prompt"])) for row in rows]
    require_same(keys, ((item["image_id"], item["question"].lower()) for item in annotations), path)
    total = sum(soft_accuracy(row["text"], people[key]) for key, row in zip(keys, rows, strict=True))
    return {"n": len(rows), "accuracy": 100 * total / len(rows)}


def evaluate_file(annotations: Sequence[Mapping[str, Any]], result_file: Path) -> dict[str, Any]:
    """`score` of an answers file."""
    return score(annotations, read_results(result_file, "prompt"), result_file)


def read_annotations(path: Path) -> Sequence[Mapping[str, Any]]:
    """The list under `data` of `TextVQA_0.5.1_val.json`."""
    content = read_json(path)
    rows = content.get("data") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all({"image_id", "question", "answers"} <= row.keys() for row in rows):
        raise DataError(f"{path} is no TextVQA annotation file: no list 'data' of image_id, question and answers.")
    return rows


def evaluate(annotation_file: Path, result_file: Path | None, result_dir: Path | None) -> str:
    """The published lines for one answers file, every `.jsonl` of a folder, or both."""
    if result_file is None and result_dir is None:
        raise ConfigError("Nothing to score: give --result-file or --result-dir.")
    files = [] if result_file is None else [result_file]
    if result_dir is not None:
        if not result_dir.is_dir():
            raise ConfigError(f"--result-dir {result_dir} is no folder.")
        inside = sorted(result_dir.iterdir())
        files += [path for path in inside if path.suffix == ".jsonl"]
        for path in inside:
            if path.suffix != ".jsonl":
                logger.warning("Skipping %s: not a .jsonl file.", path.name)
    annotations = read_annotations(annotation_file)
    return "\n".join(table(path.stem, evaluate_file(annotations, path)) for path in files)


def table(name: str, result: Mapping[str, Any]) -> str:
    return f"{name}\nSamples: {result['n']}\nAccuracy: {result['accuracy']:.2f}%\n"


# --- TextVQA ----------------------------------------------------------------------------------------------------------


ANNOTATIONS = "TextVQA_0.5.1_val.json"
PAGE = "https://org/dataset/"


class TextVQA(FileTask):
    name: ClassVar[str] = "textvqa"
    column = "TextVQA"
    folder = "textvqa"
    layouts: ClassVar = {
        "val": Layout(
            "llava_textvqa_val_v051_ocr.jsonl", "train_images", 5000, f"{PAGE} (train_val_images.zip)",
            {ANNOTATIONS: PAGE},
        )
    }  # fmt: skip
    splits = tuple(layouts)

    def score_rows(self, rows: Sequence[Row], path: Path) -> dict[str, Any]:
        given = {(row["question_id"], question_of(row["prompt"])) for row in rows}
        annotations = read_annotations(self.root / ANNOTATIONS)
        asked = [item for item in annotations if (item["image_id"], item["question"].lower()) in given]
        return score(asked, rows, path)

    def references(self, rows: Sequence[Row]) -> list[str]:
        people = {
            (item["image_id"], item["question"].lower()): Counter(item["answers"]).most_common(1)[0][0]
            for item in read_annotations(self.root / ANNOTATIONS)
        }
        return [people[row["question_id"], question_of(row["prompt"])] for row in rows]

    def table(self, score: dict[str, Any]) -> str:
        return table(self.name, score)
