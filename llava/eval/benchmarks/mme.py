"""MME: yes/no questions, two a picture (spec/eval.md §4.7). Published: Perception.

A task's score is 100·acc + 100·acc+: of the answers, and of the pictures with both answers right.

Rows are (picture file, question, true answer, given answer). Pairs are formed by picture, not by line (defect M19).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, ClassVar, Final, NamedTuple

from llava.errors import ConfigError, DataError
from llava.eval.benchmarks.base import FileTask, Layout
from llava.eval.run.answers import Row
from llava.eval.run.files import read_results, require_same
from llava.eval.run.questions import Question
from llava.files import write_text

GROUPS: Final = MappingProxyType(
    {
        "Perception": (
            *("existence", "count", "position", "color", "posters"),
            *("celebrity", "scene", "landmark", "artwork", "OCR"),
        ),
        "Cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
    }
)
TASKS: Final = tuple(task for tasks in GROUPS.values() for task in tasks)
SUFFIX: Final = "Answer the question using a single word or phrase."
ENDING: Final = "Please answer yes or no."


class ResultRow(NamedTuple):
    """A line of an official results file."""

    image: str
    question: str
    truth: str
    answer: str


def parse(text: str) -> str:
    """The official rule: `yes`, then `no`, somewhere in the first four characters; else `other`."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def score_task(rows: Sequence[ResultRow], name: str) -> dict[str, Any]:
    """acc, acc+ and score of one task; `DataError` unless every picture has two rows."""
    right: dict[str, list[bool]] = {}
    for row in rows:
        right.setdefault(row.image, []).append(parse(row.answer) == row.truth.lower())
    odd = [image for image, found in right.items() if len(found) != 2]
    if odd or not rows:
        raise DataError(
            f"Task {name} has {len(odd)} picture(s) without exactly two answers, the first {odd[0]}; not scored."
            if odd
            else f"Task {name} has no rows; not scored."
        )
    accuracy = sum(map(sum, right.values())) / len(rows)
    both = sum(map(all, right.values())) / len(right)
    other = sum(parse(row.answer) == "other" for row in rows)
    return {"n": len(rows), "acc": accuracy, "acc+": both, "score": 100 * accuracy + 100 * both, "other": other}


def score(rows: Mapping[str, Sequence[ResultRow]]) -> dict[str, Any]:
    """Scores of all tasks and both groups; `DataError` when a task is missing."""
    missing = [task for task in TASKS if task not in rows]
    if missing:
        raise DataError(f"MME's task(s) {', '.join(missing)} are missing; not scored.")
    tasks = {task: score_task(rows[task], task) for task in TASKS}
    groups = {group: sum(tasks[task]["score"] for task in members) for group, members in GROUPS.items()}
    return {**groups, "tasks": tasks}


def table(result: Mapping[str, Any]) -> str:
    """The official tool's lines, then how many answers were neither yes nor no."""
    lines = []
    for group, members in GROUPS.items():
        lines += [f"=========== {group} ===========", f"total score: {result[group]} \n"]
        lines += [f"\t {task}  score: {result['tasks'][task]['score']}" for task in members]
        lines.append("")
    lines.append(f"answers neither yes nor no: {sum(task['other'] for task in result['tasks'].values())}")
    return "\n".join(lines)


def read_results_dir(folder: Path) -> dict[str, list[ResultRow]]:
    """The official `<task>.txt` files of a folder."""
    found = {}
    for task in TASKS:
        path = folder / f"{task}.txt"
        if path.is_file():
            found[task] = [_row(line, path, number) for number, line in _lines(path)]
    return found


def _row(line: str, path: Path, number: int) -> ResultRow:
    fields = line.split("\t", 3)
    if len(fields) != 4:
        raise DataError(f"{path} line {number} has {len(fields)} of the 4 fields picture, question, truth, answer.")
    return ResultRow(*fields)


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read {path}: {error}.") from error
    return [(number, line.rstrip("\r")) for number, line in enumerate(lines, 1) if line.strip()]


Key = tuple[str, str, str]


def read_truth(folder: Path) -> dict[Key, tuple[str, str]]:
    """By task, picture stem and question (single spaces): the question as written, and its true answer."""
    truth: dict[Key, tuple[str, str]] = {}
    for task in TASKS:
        place = folder / task
        place = place / "questions_answers_YN" if (place / "images").is_dir() else place
        for path in sorted(place.glob("*.txt")):
            for number, line in _lines(path):
                question, tab, answer = line.rpartition("\t")
                if not tab or answer.strip() not in ("Yes", "No"):
                    raise DataError(f"{path} line {number} is not a question, a tab, and Yes or No.")
                truth[task, path.stem, " ".join(question.split())] = (question, answer.strip())
    if not truth:
        raise DataError(f"{folder} holds none of MME's tasks; expected MME_Benchmark_release_version.")
    return truth


def answer_key(question_id: str, prompt: str) -> Key:
    """The key of `read_truth` for an answer; its id is `<task>/<file>` or `<task>/images/<file>`."""
    path = PurePosixPath(question_id)
    question = prompt.removesuffix(SUFFIX).strip()
    question = question if ENDING in question else f"{question} {ENDING}"
    return path.parts[0], path.stem, " ".join(question.split())


def convert(annotation_dir: Path, result_file: Path) -> dict[str, list[ResultRow]]:
    """Rows of every task from an answers file; `DataError` unless it answers exactly the official questions."""
    truth = read_truth(annotation_dir)
    answers = read_results(result_file, "prompt")
    keys = [answer_key(row["question_id"], row["prompt"]) for row in answers]
    require_same(keys, truth, result_file)
    rows: dict[str, list[ResultRow]] = {}
    for key, answer in zip(keys, answers, strict=True):
        text = " ".join(answer["text"].replace("\t", "\n").splitlines())
        rows.setdefault(key[0], []).append(ResultRow(f"{key[1]}.txt", *truth[key], text))
    return rows


def evaluate(
    results_dir: Path | None, annotation_dir: Path | None, result_file: Path | None, output_dir: Path | None
) -> str:
    """Score official task files, or an answers file with the official questions; keep task files in `output_dir`."""
    if (results_dir is None) == (result_file is None) or (annotation_dir is None) != (result_file is None):
        raise ConfigError("Give either --results-dir, or both --annotation-dir and --result-file.")
    if results_dir is not None:
        rows: Mapping[str, Sequence[ResultRow]] = read_results_dir(results_dir)
    else:
        assert annotation_dir is not None and result_file is not None
        rows = convert(annotation_dir, result_file)
    if output_dir is not None:
        for task, lines in rows.items():
            write_text(output_dir / f"{task}.txt", "".join("\t".join(line) + "\n" for line in lines))
    return table(score(rows))


# --- MME --------------------------------------------------------------------------------------------------------------


PAGE = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation, on request"


class Mme(FileTask):
    name: ClassVar[str] = "mme"
    column = "MME"
    folder = "MME"
    layouts: ClassVar = {"test": Layout("llava_mme.jsonl", "MME_Benchmark_release_version", 2374, PAGE)}
    splits = tuple(layouts)

    def questions(self, limit: int | None = None) -> Sequence[Question]:
        if limit is not None:
            raise ConfigError("MME is scored by pairs of questions, so it takes no --limit.")
        return super().questions()

    def score_rows(self, rows: Sequence[Row], path: Path) -> dict[str, Any]:
        return score(convert(self.image_folder, path))

    def primary_metric(self, score: dict[str, Any]) -> float | None:
        return float(score["Perception"])

    def references(self, rows: Sequence[Row]) -> list[str]:
        truth = read_truth(self.image_folder)
        return [truth[answer_key(row["question_id"], row["prompt"])][1] for row in rows]

    def table(self, score: dict[str, Any]) -> str:
        return table(score)
