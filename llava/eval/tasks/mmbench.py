"""MMBench and MMBench-CN: multiple choice with the options in several orders; the dev splits have public answers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.errors import ConfigError
from llava.eval import mmbench_rounds
from llava.eval.answers import Row
from llava.eval.pictures import PictureSource
from llava.eval.questions import Question
from llava.eval.scorers import mmbench
from llava.eval.tasks.files import FileTask, Layout

SOURCE = "https://download.openmmlab.com/mmclassification/datasets/mmbench/"


class MMBench(FileTask):
    """`dev` and `test` of the table; pictures are inside it."""

    name: ClassVar[str] = "mmbench"
    column = "MMB"
    max_new_tokens = 1024
    folder = "mmbench"
    lang: ClassVar[str] = "en"
    layouts: ClassVar = {
        "dev": Layout("mmbench_dev_20230712.tsv", "", 4377, "", source=SOURCE),
        "test": Layout("mmbench_test_en_20231003.tsv", "", 6666, "", source=SOURCE),
    }
    splits = ("dev", "test")

    @functools.cached_property
    def rows(self) -> mmbench.Table:
        return mmbench.read_table(self.question_path)

    @property
    def pictures(self) -> PictureSource:
        return mmbench_rounds.pictures(self.rows)

    def questions(self, limit: int | None = None) -> Sequence[Question]:
        if limit is not None:
            raise ConfigError("MMBench is scored over all orders of a question's options, so it takes no --limit.")
        return super().questions()

    def read(self, path: Path) -> Sequence[Question]:
        return mmbench_rounds.questions(self.rows, single_pred_prompt=True, lang=self.lang)

    def score_rows(self, rows: Sequence[Row], path: Path) -> dict[str, Any]:
        predictions = mmbench.read_predictions(path, self.rows)
        target = path.with_name("upload.xlsx")
        mmbench.write_submission(self.rows, predictions[0], target)
        if self.split != "dev":
            return {"n": len(rows), "upload": str(target), "server": "OpenCompass (mmbench.opencompass.org.cn)"}
        return {**mmbench.score(self.rows, predictions), "upload": str(target)}

    def headline(self, score: dict[str, Any]) -> float | None:
        found = score.get("circular")
        return None if found is None else float(found)

    def truths(self, rows: Sequence[Row]) -> list[str]:
        answers = {row["index"]: row.get("answer", "") for row in self.rows}
        return [answers[str(row["question_id"])] for row in rows]

    def table(self, score: dict[str, Any]) -> str:
        if "circular" not in score:
            return f"Answers: {score['n']}\nNot scored here: submit {score['upload']} to {score['server']}."
        return mmbench.table(score)


class MMBenchCN(MMBench):
    name: ClassVar[str] = "mmbench_cn"
    column = "MMB-CN"
    folder = "mmbench_cn"
    lang = "cn"
    layouts: ClassVar = {
        "dev": Layout("mmbench_dev_cn_20231003.tsv", "", 4329, "", source=SOURCE),
        "test": Layout("mmbench_test_cn_20231003.tsv", "", 6666, "", source=SOURCE),
    }
