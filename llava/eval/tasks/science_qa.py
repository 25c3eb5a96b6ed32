"""ScienceQA: 4,241 multiple-choice questions of the test split, 2,017 of them with a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.eval.answers import Row
from llava.eval.questions import Question, read_science_questions
from llava.eval.scorers import science_qa
from llava.eval.tasks.files import EVAL_ZIP, FileTask, Layout

SOURCE = "https://github.com/lupantech/ScienceQA, data/scienceqa"


class ScienceQA(FileTask):
    name: ClassVar[str] = "science_qa"
    column = "SQA"
    folder = "scienceqa"
    layouts: ClassVar = {
        "test": Layout(
            "llava_test_CQM-A.json", "images/test", 4241, SOURCE,
            dict.fromkeys(("pid_splits.json", "problems.json"), SOURCE),
            f"{EVAL_ZIP}; or build it: python scripts/convert_sqa_to_llava.py convert_to_questions",
        )
    }  # fmt: skip
    splits = tuple(layouts)

    def read(self, path: Path) -> Sequence[Question]:
        return read_science_questions(path, single_pred_prompt=True)

    def score_rows(self, rows: Sequence[Row], path: Path) -> dict[str, Any]:
        problems = science_qa.read_problems(self.root, self.split)
        answers = science_qa.known(rows, problems, path)
        return science_qa.score([science_qa.Item(pid, problems[pid], row) for pid, row in answers.items()])

    def headline(self, score: dict[str, Any]) -> float | None:
        found = score["img_accuracy"]
        return None if found is None else float(found)

    def truths(self, rows: Sequence[Row]) -> list[str]:
        problems = science_qa.read_problems(self.root, self.split)
        return [science_qa.OPTIONS[problems[row["question_id"]]["answer"]] for row in rows]

    def table(self, score: dict[str, Any]) -> str:
        return science_qa.table(score)
