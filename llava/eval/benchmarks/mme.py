"""MME: yes/no questions, two per image. Published: the Perception score.

The score of a task is 100·acc + 100·acc+, the accuracy over answers and over images with both answers correct.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple

from llava.errors import ConfigError, DataError
from llava.eval.benchmarks.base import Layout, Reading, Scores, Task, count_unread
from llava.eval.benchmarks.outcomes import Outcome
from llava.eval.run.answers import read_results
from llava.eval.run.files import Record, Row, require_same
from llava.eval.run.questions import SHORT_SUFFIX
from llava.files import write_text

if TYPE_CHECKING:
    from llava.eval.outcomes import Outcomes
    from llava.eval.uncertainty import Metric

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
ENDING: Final = "Please answer yes or no."
PAGE: Final = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation, on request"

Key = tuple[str, str, str]  # task, image stem, question with single spaces


class ResultRow(NamedTuple):
    """A line of an official results file."""

    image: str
    question: str
    reference: str
    answer: str


def _numbered_lines(path: Path) -> list[tuple[int, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read {path}: {error}.") from error
    return [(number, line.rstrip("\r")) for number, line in enumerate(lines, 1) if line.strip()]


def read_references(folder: Path) -> dict[Key, tuple[str, str]]:
    """The official questions and their answers (Yes or No) of `MME_Benchmark_release_version`."""
    references: dict[Key, tuple[str, str]] = {}
    for task in TASKS:
        directory = folder / task
        directory = directory / "questions_answers_YN" if (directory / "images").is_dir() else directory
        for path in sorted(directory.glob("*.txt")):
            for number, line in _numbered_lines(path):
                question, tab, answer = line.rpartition("\t")
                if not tab or answer.strip() not in ("Yes", "No"):
                    raise DataError(f"{path} line {number} must have a question, a tab, and Yes or No.")
                references[task, path.stem, " ".join(question.split())] = (question, answer.strip())
    if not references:
        raise DataError(f"{folder} has none of MME's tasks; expected MME_Benchmark_release_version.")
    return references


def answer_key(row: Record) -> Key:
    """The key of the question that a record answers; its id is `<task>/<file>` or `<task>/images/<file>`."""
    path = PurePosixPath(str(row["question_id"]))
    question = row["prompt"].removesuffix(SHORT_SUFFIX).strip()
    question = question if ENDING in question else f"{question} {ENDING}"
    return path.parts[0] if path.parts else "", path.stem, " ".join(question.split())


def official_questions(annotation_dir: Path, rows: Sequence[Record]) -> list[str]:
    """The official question that each record answers, which ends with `ENDING`. Raises `DataError` if there is none."""
    references = read_references(annotation_dir)
    unknown = next((row for row in rows if answer_key(row) not in references), None)
    if unknown is not None:
        raise DataError(f"{annotation_dir} has no question {unknown['prompt']!r} of {unknown['question_id']}.")
    return [references[answer_key(row)][0] for row in rows]


def result_rows(annotation_dir: Path, result_file: Path) -> dict[str, list[ResultRow]]:
    """Rows of every task from an answers file. Raises `DataError` unless it answers exactly the official questions."""
    references = read_references(annotation_dir)
    answers = read_results(result_file, "prompt")
    keys = list(map(answer_key, answers))
    require_same(keys, references, result_file)
    rows: dict[str, list[ResultRow]] = {}
    for key, answer in zip(keys, answers, strict=True):
        text = " ".join(answer["text"].replace("\t", "\n").splitlines())
        rows.setdefault(key[0], []).append(ResultRow(f"{key[1]}.txt", *references[key], text))
    return rows


def read_results_dir(folder: Path) -> dict[str, list[ResultRow]]:
    """The official `<task>.txt` files of a folder."""
    tasks: dict[str, list[ResultRow]] = {}
    for task in TASKS:
        path = folder / f"{task}.txt"
        for number, line in _numbered_lines(path) if path.is_file() else []:
            fields = line.split("\t", 3)
            if len(fields) != 4:
                raise DataError(f"{path} line {number} has {len(fields)} of 4 fields: image, question, label, answer.")
            tasks.setdefault(task, []).append(ResultRow(*fields))
    return tasks


def parse(text: str) -> str:
    """The official rule: `yes`, then `no`, within the first four characters; else `other`."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def outcome(key: Key, row: ResultRow) -> Outcome:
    """The outcome of an answer; its unit is both questions about the image."""
    values = {"yes": float(parse(row.answer) == "yes"), "label": float(row.reference == "Yes")}
    correct = parse(row.answer) == row.reference.lower()
    return Outcome("/".join(key), correct, [f"tasks/{key[0]}"], values, f"{key[0]}/{key[1]}")


def score_task(rows: Sequence[ResultRow], name: str) -> Scores:
    """acc, acc+ and score of one task. Raises `DataError` unless every image has two rows."""
    if not rows:
        raise DataError(f"Task {name} has no rows; not scored.")
    correct: dict[str, list[bool]] = {}
    for row in rows:
        correct.setdefault(row.image, []).append(parse(row.answer) == row.reference.lower())
    unpaired = [image for image, pair in correct.items() if len(pair) != 2]
    if unpaired:
        raise DataError(
            f"Task {name} has {len(unpaired)} image(s) without exactly two answers, first {unpaired[0]}; not scored."
        )
    accuracy = sum(map(sum, correct.values())) / len(rows)
    both = sum(map(all, correct.values())) / len(correct)
    other = sum(parse(row.answer) == "other" for row in rows)
    return {"n": len(rows), "acc": accuracy, "acc+": both, "score": 100 * accuracy + 100 * both, "other": other}


def score_tasks(rows: Mapping[str, Sequence[ResultRow]]) -> Scores:
    """Scores of all tasks and both groups. Raises `DataError` if a task is missing."""
    missing = [task for task in TASKS if task not in rows]
    if missing:
        raise DataError(f"MME's task(s) {', '.join(missing)} are missing; not scored.")
    tasks = {task: score_task(rows[task], task) for task in TASKS}
    groups = {group: sum(tasks[task]["score"] for task in members) for group, members in GROUPS.items()}
    unread = count_unread(parse(row.answer) == "other" for task in TASKS for row in rows[task])
    return {**groups, **unread, "tasks": tasks}


class Mme(Task):
    name: ClassVar[str] = "mme"
    column = "MME"
    supports_limit = False
    metric = "Perception"
    folder = "MME"
    layouts: ClassVar = {"test": Layout("llava_mme.jsonl", "MME_Benchmark_release_version", 2374, PAGE)}

    def score_rows(self, rows: Sequence[Row], path: Path) -> Scores:
        found = result_rows(self.image_folder, path)
        ordered = {task: iter(lines) for task, lines in found.items()}  # each in the order of the answers
        keys = list(map(answer_key, rows))
        outcomes = [outcome(key, next(ordered[key[0]])) for key in keys]
        return {**score_tasks(found), "outcomes": outcomes}

    @classmethod
    def metrics(cls, outcomes: Outcomes) -> list[Metric]:
        """Both sums, and acc, acc+ and score of every task: accuracies over answers and over images."""
        from llava.eval.uncertainty import combine, ratio

        pairs, scores, parts = outcomes.by_unit(), {}, []
        for task in outcomes.groups:
            of_answers, of_images = (each.mean(task, group=task) for each in (outcomes, pairs))
            scores[task] = combine(f"{task}/score", [of_answers, of_images])
            parts += [replace(of_answers, name=f"{task}/acc", value=ratio(1.0), bounds=(0.0, 1.0))]
            parts += [replace(of_images, name=f"{task}/acc+", value=ratio(1.0), bounds=(0.0, 1.0)), scores[task]]
        sums = [combine(group, [scores[f"tasks/{task}"] for task in members]) for group, members in GROUPS.items()]
        return [*sums, *parts]

    def readings(self, rows: Sequence[Row]) -> list[Reading]:
        labels = [parse(" ".join(row["text"].replace("\t", "\n").splitlines())) for row in rows]
        return [Reading(label, label == "other") for label in labels]

    def references(self, rows: Sequence[Record]) -> list[str]:
        references = read_references(self.image_folder)
        return [references[answer_key(row)][1] for row in rows]

    @staticmethod
    def table(scores: Scores) -> str:
        """The lines of the official tool."""
        lines = []
        for group, members in GROUPS.items():
            lines += [f"=========== {group} ===========", f"total score: {scores[group]} \n"]
            lines += [f"\t {task}  score: {scores['tasks'][task]['score']}" for task in members]
            lines.append("")
        return "\n".join(lines)


def evaluate(
    results_dir: Path | None, annotation_dir: Path | None, result_file: Path | None, output_dir: Path | None
) -> str:
    """`eval_mme`: score official task files or an answers file; write the task files to `output_dir`."""
    if (results_dir is None) == (result_file is None) or (annotation_dir is None) != (result_file is None):
        raise ConfigError("Give either --results-dir, or both --annotation-dir and --result-file.")
    if results_dir is not None:
        rows = read_results_dir(results_dir)
    else:
        assert annotation_dir is not None and result_file is not None
        rows = result_rows(annotation_dir, result_file)
    if output_dir is not None:
        for task, lines in rows.items():
            write_text(output_dir / f"{task}.txt", "".join("\t".join(line) + "\n" for line in lines))
    return Mme.summary(score_tasks(rows))
