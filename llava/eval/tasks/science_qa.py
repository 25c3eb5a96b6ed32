"""ScienceQA: 4,241 multiple-choice questions of the test split, 2,017 of them with a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.eval.answers import Row
from llava.eval.questions import Question, read_science_questions
from llava.eval.scorers import science_qa
from llava.eval.tasks.files import FileTask

SOURCE = "ScienceQA's repository (data/scienceqa)"


class ScienceQA(FileTask):
    name: ClassVar[str] = "science_qa"
    folder = "scienceqa"
    question_file = "llava_test_CQM-A.json"
    images = "images/test"
    sources: ClassVar = dict.fromkeys(("pid_splits.json", "problems.json", "images/test"), SOURCE)

    def read(self, path: Path) -> Sequence[Question]:
        return read_science_questions(path, single_pred_prompt=True)

    def score_rows(self, rows: Sequence[Row], path: Path) -> dict[str, Any]:
        problems = science_qa.read_problems(self.root, self.split)
        answers = science_qa.known(rows, problems, path)
        return science_qa.score([science_qa.Item(pid, problems[pid], row) for pid, row in answers.items()])

    def table(self, score: dict[str, Any]) -> str:
        return science_qa.table(score)
