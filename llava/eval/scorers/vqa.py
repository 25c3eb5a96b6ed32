"""VQAv2 and VizWiz: submissions to their servers, and the same soft accuracy where labels are public (§4.1, §6)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.errors import DataError
from llava.eval.files import by_key, read_json, read_results, read_rows, require_same, write_json
from llava.eval.scorers.normalizer import normalize, soft_accuracy

logger = logging.getLogger(__name__)

JOIN_LIST = "llava_vqav2_mscoco_test2015.jsonl"


def _texts(path: Path) -> dict[Any, str]:
    return {key: row["text"] for key, row in by_key(read_results(path), path, "question_id").items()}


def submit_vqav2(dir: Path, ckpt: str, split: str) -> str:
    """Write `answers_upload/SPLIT/CKPT.json`: normalised answers for all of test2015, empty where SPLIT has none."""
    target = dir / "answers_upload" / split / f"{ckpt}.json"
    write_vqav2(dir / JOIN_LIST, dir / "answers" / split / ckpt / "merge.jsonl", target)
    return f"{target}"


def write_vqav2(join_list: Path, source: Path, target: Path) -> None:
    """`DataError`, and no file, when an answer is to none of the questions of the list."""
    answers = _texts(source)
    asked = [row["question_id"] for row in read_rows(join_list, "question_id")]
    strange = answers.keys() - set(asked)
    if strange:
        raise DataError(
            f"{source} answers {len(strange)} question(s) that {join_list.name} does not have; nothing written."
        )
    write_json(target, [{"question_id": each, "answer": normalize(answers.get(each, ""))} for each in asked])
    logger.warning("%d of %d questions have an answer, the others an empty one.", len(answers), len(asked))


def submit_vizwiz(annotation_file: Path, result_file: Path, result_upload_file: Path) -> str:
    """Write `[{"image", "answer"}]`; `DataError`, and no file, unless every question has its answer."""
    write_vizwiz(annotation_file, result_file, result_upload_file)
    return f"{result_upload_file}"


def write_vizwiz(questions_file: Path, source: Path, target: Path, *, partly: bool = False) -> None:
    """The upload; with `partly`, of the questions that are answered."""
    answers = _texts(source)
    questions = read_rows(questions_file, "question_id", "image")
    if partly:
        questions = [row for row in questions if row["question_id"] in answers]
    require_same(answers, [row["question_id"] for row in questions], source)
    upload = [{"image": row["image"], "answer": normalize(answers[row["question_id"]])} for row in questions]
    write_json(target, upload)


def score(people: Mapping[Any, Sequence[str]], answers: Mapping[Any, str]) -> dict[str, Any]:
    """Mean soft accuracy in percent of answers by id, against the answers of people by the same ids."""
    total = sum(soft_accuracy(answers[key], given) for key, given in people.items())
    return {"n": len(people), "accuracy": 100 * total / len(people)}


def read_people(path: Path) -> dict[Any, list[str]]:
    """People's answers: VQAv2's by `question_id`, VizWiz's by running number, as its question file counts them."""
    content = read_json(path)
    rows = content["annotations"] if isinstance(content, dict) and "annotations" in content else content
    if not isinstance(rows, list) or not rows or not all("answers" in row for row in rows):
        raise DataError(f"{path} has no 'answers'; expected the annotations of a split whose labels are public (val).")
    return {row.get("question_id", n): [each["answer"] for each in row["answers"]] for n, row in enumerate(rows)}


def evaluate(annotation_file: Path, result_file: Path) -> str:
    """Score an answers file of a labelled split; `DataError` unless it answers exactly its questions."""
    people, answers = read_people(annotation_file), _texts(result_file)
    require_same(answers, people, result_file)
    result = score(people, answers)
    return f"Samples: {result['n']}\nAccuracy: {result['accuracy']:.2f}%"
