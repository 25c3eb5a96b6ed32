"""Local tasks of lmms-eval: its benchmarks on the questions, labels and images of `llava eval`.

`llava eval prepare TASK --lmms-eval PYTHON` writes the task `local_NAME` for each benchmark. It includes the
configuration of the lmms-eval installed for `PYTHON`, so that its prompt, generation settings and metrics apply, and
replaces only the dataset.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

from llava.errors import ConfigError
from llava.eval.benchmarks.base import Task
from llava.eval.benchmarks.mme import Mme, official_questions
from llava.eval.benchmarks.profiles import plain_question
from llava.eval.benchmarks.science_qa import read_problems
from llava.eval.benchmarks.textvqa import ANNOTATIONS, annotation_key, answer_key, read_annotations
from llava.eval.benchmarks.vqa import SoftAccuracyTask
from llava.eval.run.files import Record, Row, read_rows, write_jsonl
from llava.eval.run.questions import Question
from llava.files import write_text

Columns = Callable[[Task, Sequence[Record]], Iterable[Row]]  # of answer records without answers
FIND: Final = "import importlib.util as u; print(u.find_spec('lmms_eval').submodule_search_locations[0])"
VISUALS: Final = '''"""Images of the local tasks, upright and in RGB."""

from PIL import Image, ImageOps


def image(doc):
    return [ImageOps.exif_transpose(Image.open(doc["image"])).convert("RGB")] if doc["image"] else []
'''
TASK: Final = """# {source} of lmms-eval with the data of llava eval
include: {config}
task: local_{name}
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
process_docs: null
doc_to_visual: !function visuals.image
"""


def _pope(task: Task, rows: Sequence[Record]) -> Iterable[Row]:
    categories = {row["question_id"]: row["category"] for row in read_rows(task.question_path)}
    return [{"category": categories[row["question_id"]]} for row in rows]


def _people(task: Task, rows: Sequence[Record]) -> Iterable[Row]:
    """The human answers of VQAv2 and VizWiz."""
    assert isinstance(task, SoftAccuracyTask)
    people = task.human_answers()
    kinds = {"question_type": "", "answer_type": "", "category": ""}
    return [{"answers": _answers(task, people[row["question_id"]]), **kinds} for row in rows]


def _answers(task: Task, texts: Sequence[str]) -> Sequence[object]:
    """Human answers as in the datasets of lmms-eval: for VQAv2 objects with an id, by which it tells them apart."""
    return [{"answer": text, "answer_id": n} for n, text in enumerate(texts)] if task.name == "vqav2" else texts


def _textvqa(task: Task, rows: Sequence[Record]) -> Iterable[Row]:
    found = {annotation_key(item): item for item in read_annotations(task.root / ANNOTATIONS)}
    items = [found[answer_key(row)] for row in rows]
    return [{"question": item["question"], "answers": item["answers"], "ocr_tokens": []} for item in items]


def _science_qa(task: Task, rows: Sequence[Record]) -> Iterable[Row]:
    problems = read_problems(task.root, task.split)
    keys = ("question", "choices", "answer", "hint")
    return [{key: problems[row["question_id"]][key] for key in keys} for row in rows]


def _mme(task: Task, rows: Sequence[Record]) -> Iterable[Row]:
    assert isinstance(task, Mme)
    asked = official_questions(task.image_folder, rows)
    return [{"question": text, "category": row["question_id"].split("/")[0]} for text, row in zip(asked, rows)]


# task: configuration below the tasks of lmms-eval, and the columns beside question, answer and image
TASKS: Final[Mapping[str, tuple[str, Columns]]] = MappingProxyType(
    {
        "vqav2": ("vqav2/vqav2_val.yaml", _people),
        "gqa": ("gqa/gqa.yaml", lambda task, rows: [{}] * len(rows)),
        "vizwiz": ("vizwiz_vqa/vizwiz_vqa_val.yaml", _people),
        "science_qa": ("scienceqa/scienceqa.yaml", _science_qa),
        "textvqa": ("textvqa/textvqa_val.yaml", _textvqa),
        "pope": ("pope/pope.yaml", _pope),
        "mme": ("mme/mme.yaml", _mme),
    }
)


def documents(task: Task, questions: Sequence[Question]) -> list[Row]:
    """The rows of the dataset of a task, with absolute paths of images."""
    rows = [{"question_id": each.question_id, "prompt": each.prompt} for each in questions]
    answers = task.references(rows)
    if not all(answers):
        raise ConfigError(f"The split {task.split} of {task.name} has no public labels; use --split val.")
    columns = TASKS[task.name][1](task, rows)
    folder = task.image_folder.absolute()
    return [
        {
            "question_id": each.question_id, "question": plain_question(each.prompt), "answer": answer,
            "image": str(folder / each.images[0]) if each.images else None, **more,
        }
        for each, answer, more in zip(questions, answers, columns, strict=True)
    ]  # fmt: skip


def task_folder(python: str) -> Path:
    """The folder of tasks of the lmms-eval installed for an interpreter. Raises `ConfigError` if there is none."""
    try:
        command = [python, "-c", FIND]
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"--lmms-eval {python}: cannot find lmms-eval; give the python of the environment that it is installed in."
        ) from error
    return Path(found) / "tasks"


def write_tasks(tasks: Sequence[Task], python: str, folder: Path, limit: int | None) -> list[str]:
    """Write a local task for each benchmark and return their names."""
    unknown = [task.name for task in tasks if task.name not in TASKS]
    if unknown:
        raise ConfigError(f"--lmms-eval has no local task for {', '.join(unknown)}; choose from {', '.join(TASKS)}.")
    source = task_folder(python)
    write_text(folder / "visuals.py", VISUALS)
    for task in tasks:
        config, data = source / TASKS[task.name][0], (folder / f"{task.name}.jsonl").absolute()
        if not config.is_file():
            raise ConfigError(f"This lmms-eval has no {config}; the local tasks are tested with version 0.7.3.")
        write_jsonl(data, documents(task, task.questions(limit)))
        facts = {"source": config.stem, "config": json.dumps(str(config)), "data": json.dumps(str(data))}
        write_text(folder / f"local_{task.name}.yaml", TASK.format(name=task.name, **facts))
    return [f"local_{task.name}" for task in tasks]
