"""easy-VQA: 9,673 test questions about 1,000 drawings of one coloured shape, 13 answers, scored by exact match.

The data is in the PyPI package `easy-vqa` (MIT). Questions are asked as they are, without a suffix.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.errors import DataError
from llava.eval.answers import Row, complete_answers
from llava.eval.questions import Question, spread
from llava.eval.scorers import easy_vqa as scorer
from llava.eval.tasks.base import Need, Task

INSTALL = "pip install easy-vqa==1.0"


def package_data() -> Path:
    """The data folder of the installed package, which is never imported; `DataError` when it is absent."""
    spec = importlib.util.find_spec("easy_vqa")
    locations = spec.submodule_search_locations if spec is not None else None
    if not locations:
        raise DataError(f"The easy-VQA data is not installed; run: {INSTALL}, or give --data-root.")
    return Path(locations[0]) / "data"


class EasyVQA(Task):
    """`data_root` holds `{train,test}/questions.json` and `{train,test}/images/N.png`; default: the package's."""

    name: ClassVar[str] = "easy_vqa"
    splits: ClassVar[tuple[str, ...]] = ("test", "train")
    max_new_tokens: ClassVar[int] = 16

    @property
    def root(self) -> Path:
        return self.data_root if self.data_root is not None else package_data()

    @property
    def image_folder(self) -> Path:
        return self.root / self.split / "images"

    def needs(self) -> Sequence[Need]:
        source = f"PyPI ({INSTALL})"
        rows = {"test": 9673, "train": 38575}
        splits = sorted(rows, key=lambda split: split != self.split)  # its own first
        files = [Need(self.root / split / "questions.json", source, rows[split]) for split in splits]
        return [*files, Need(self.image_folder, source)]

    def questions(self, limit: int | None = None) -> Sequence[Question]:
        rows = spread(self._read(self.split), limit)
        return [Question(index, question, (f"{image}.png",)) for index, (question, _, image) in rows]

    def score(self, answers: Path, limit: int | None = None) -> dict[str, Any]:
        rows = spread(self._read(self.split), limit)
        given = complete_answers(answers, self.questions(limit))
        items = [scorer.Item(question, truth, answer["text"]) for (_, (question, truth, _)), answer in zip(rows, given)]
        training = [(question, truth) for _, (question, truth, _) in self._read("train")]
        return {"task": self.name, "split": self.split, **scorer.score(items, training)}

    def headline(self, score: dict[str, Any]) -> float | None:
        found = score["overall"]["accuracy"]
        return None if found is None else float(found)

    def truths(self, rows: Sequence[Row]) -> list[str]:
        known = self._read(self.split)
        return [known[int(row["question_id"])][1][1] for row in rows]

    def table(self, score: dict[str, Any]) -> str:
        return scorer.table(score)

    def _read(self, split: str) -> list[tuple[int, tuple[str, str, int]]]:
        """Question numbers with (question, answer, image number), in official order."""
        path = self.root / split / "questions.json"
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
            return [
                (index, (str(question), str(answer), int(image)))
                for index, (question, answer, image) in enumerate(rows)
            ]
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"Cannot read {path} ({error}); reinstall the data: {INSTALL}.") from error
