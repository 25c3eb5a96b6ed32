"""Images and questions of a benchmark: a task, a question file, an annotation file, or a folder of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.annotations import SUFFIXES, read_records
from llava.data.check_records import read_datasets
from llava.data.near_duplicates import Source
from llava.data.question_overlap import drop_instructions
from llava.data.records import Record
from llava.data.training_set import TrainingSet
from llava.errors import ConfigError, DataError
from llava.eval.benchmarks.registry import TASKS, make_task
from llava.eval.run.images import ImageFolder, ImageSource
from llava.eval.run.questions import Question, read_questions

IMAGE_SUFFIXES: Final = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass
class Asked:
    """A question of a benchmark: its id, its text without instructions, and its images by index."""

    question_id: str
    text: str
    images: tuple[int, ...]


@dataclass
class Benchmark:
    """Names of images, and questions, that training data should not contain; `load` returns an image by its index."""

    name: str
    images: Sequence[str]
    load: Callable[[int], Source]
    questions: Sequence[Asked] = ()


def read_benchmark(word: str, image_folder: Path | None, eval_data: Path) -> Benchmark:
    """The benchmark that `word` names: a task, a path, or FILE=FOLDER with the folder of its images.

    `image_folder` is the default for files, `eval_data` the parent folder of all tasks.
    """
    name, _, given = word.partition("=")
    path, folder = Path(name), Path(given) if given else None
    if folder is not None and not (path.is_file() and folder.is_dir()):
        raise ConfigError(f"--against {word}: expected FILE=FOLDER with an existing file and folder.")
    if name in TASKS and not path.exists():
        return _read_task(name, TASKS[name].default_root(eval_data), next(iter(TASKS[name].layouts)))
    if not path.exists():
        raise ConfigError(f"--against {word}: no such file or folder, nor one of the tasks {', '.join(TASKS)}.")
    if folder is None and (found := _find_task(path)):
        return _read_task(*found)
    if path.is_dir():
        names = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if not names:
            raise DataError(f"--against {word}: the folder has neither images nor the questions of a task.")
        return Benchmark(name, [str(path / each) for each in names], lambda index: path / names[index])
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--against {word}: expected a task, a folder, or a file ending in {', '.join(SUFFIXES)}.")
    if path.suffix.lower() == ".jsonl" and _has_questions(path):
        return _from_questions(name, read_questions(path), ImageFolder(folder or image_folder or path.parent))
    training = TrainingSet(read_datasets(path, folder or image_folder))
    return Benchmark(name, [training.name(index) for index in range(len(training))], training.load, _turns(training))


def _find_task(path: Path) -> tuple[str, Path, str] | None:
    """Task, root and split of a task's folder or question file."""
    for name, task in TASKS.items():
        for split, layout in task.layouts.items():
            parents = path.absolute().parents
            root = path if path.is_dir() else parents[min(layout.questions.count("/"), len(parents) - 1)]
            is_task = (root / layout.questions).is_file() and (path.is_dir() or path.samefile(root / layout.questions))
            named = root.name == getattr(task, "folder", None)  # easy-VQA, a package, has none
            if is_task and (named or (layout.images and (root / layout.images).is_dir())):
                return name, root, split
    return None


def _has_questions(path: Path) -> bool:
    """Whether the first record is a question, not a conversation."""
    first = read_records(path)[0]
    return isinstance(first, dict) and {"question_id", "text"} <= first.keys()


def _read_task(name: str, root: Path | None, split: str) -> Benchmark:
    task = make_task(name, root, split)
    for file in task.required_files():
        if file.missing and file.path in (task.question_path, task.image_folder):
            raise DataError(f"{name} requires {file.path}, which is missing; its source is {file.source}.")
    return _from_questions(name, task.read_questions(task.question_path), task.images)


def _from_questions(name: str, questions: Sequence[Question], source: ImageSource) -> Benchmark:
    names = list(dict.fromkeys(image for question in questions for image in question.images))
    places = {image: index for index, image in enumerate(names)}
    texts = drop_instructions([question.prompt.replace(DEFAULT_IMAGE_TOKEN, "").strip() for question in questions])
    asked = [
        Asked(str(question.question_id), text, tuple(places[image] for image in question.images))
        for question, text in zip(questions, texts)
    ]
    if isinstance(source, ImageFolder):
        paths = [source.path / image for image in names]
        return Benchmark(name, list(map(str, paths)), paths.__getitem__, asked)
    return Benchmark(name, names, lambda index: source.read(names[index]), asked)


def _turns(training: TrainingSet) -> list[Asked]:
    """The human turns of an annotation file as questions."""
    found = [
        (training.place(number), text, tuple(training.images_of(number)))
        for number, record in training.records()
        for text in human_texts(record)
    ]
    texts = drop_instructions([text for _, text, _ in found])
    return [Asked(place, text, images) for (place, _, images), text in zip(found, texts)]


def human_texts(record: Record) -> list[str]:
    return [turn.text.replace(DEFAULT_IMAGE_TOKEN, "").strip() for turn in record.turns if turn.role == "human"]
