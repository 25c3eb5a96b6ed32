"""How a run asks its questions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llava.engine.sequence import SamplingParams
from llava.eval.run.images import ImageFolder, ImageSource
from llava.eval.run.questions import Question

Asked = tuple[int, str, str | None]  # position, answer, why there is none


@dataclass(frozen=True)
class RunSettings:
    """`template` is a registered name; `params` apply to every question, its seed aside.

    `chunk` (k, n) asks only the k-th of n equal parts. `pictures` replaces `image_folder`. `files` are the data whose
    hashes the manifest keeps, `quantization` says how the weights were loaded. With `follow_up` each question is asked
    twice, the second time with the first answer and this text after it (ScienceQA's answer prompter).
    """

    model_path: str
    model_id: str
    template: str
    params: SamplingParams
    image_folder: Path = Path()
    num_workers: int = 4
    resume: bool = False
    overwrite: bool = False
    chunk: tuple[int, int] = (0, 1)
    pictures: ImageSource | None = None
    files: tuple[Path, ...] = ()
    quantization: str | None = None
    follow_up: str | None = None

    @property
    def source(self) -> ImageSource:
        return self.pictures or ImageFolder(self.image_folder)


class Answerer(Protocol):
    """A model in this process (`local_model`) or behind a server (`remote_model`)."""

    batch_size: int

    def identity(self, settings: RunSettings) -> dict[str, Any]:
        """What decides the answers beside questions and decoding; only equal ones may share an answers file."""

    def ask(self, questions: Sequence[Question], order: Iterable[int], settings: RunSettings) -> Iterator[Asked]:
        """Ask the questions at the positions of `order`, near it in time; yield answers as they come."""
