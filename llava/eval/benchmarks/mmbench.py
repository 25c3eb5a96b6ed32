"""MMBench: the table to submit, and circular accuracy where answers are public (spec/eval.md §4.8, §6).

A question counts as right in circular accuracy only if it is answered rightly with its options in every order: the
copies of a row have its `index` plus a multiple of 1,000,000, or (`--all-rounds`) the answers several `round_id`.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import string
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar, Final

from llava.errors import ConfigError, DataError
from llava.eval.benchmarks.base import FileTask, Layout
from llava.eval.benchmarks.parsing import read_option
from llava.eval.benchmarks.xlsx import write_xlsx
from llava.eval.run.answers import Row
from llava.eval.run.files import by_key, read_results, require_same
from llava.eval.run.images import Base64Images, ImageSource
from llava.eval.run.questions import LETTER_SUFFIX, LETTER_SUFFIX_CN, Question

COPY: Final = 1_000_000
DROPPED: Final = ("hint", "category", "source", "image", "comment", "l2-category")

Table = list[dict[str, str]]


def read_table(path: Path) -> Table:
    """The rows of the TSV, every cell as its text: `None` and `nan` are options like others (defect R15)."""
    csv.field_size_limit(1 << 30)  # a cell holds a picture in base64
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [{key: cell or "" for key, cell in row.items()} for row in csv.DictReader(file, delimiter="\t")]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"Cannot read {path}: {error}.") from error
    if not rows or not {"index", "question", "A"} <= rows[0].keys():
        raise DataError(f"{path} has no rows with index, question and A; expected an MMBench TSV.")
    strange = next((row["index"] for row in rows if not row["index"].isdecimal()), None)
    if strange is not None:
        raise DataError(f"{path} has the index {strange!r}; expected whole numbers, as in the published TSV.")
    if len({row["index"] for row in rows}) < len(rows):
        raise DataError(f"{path} has two rows with the same index; expected each once.")
    return rows


def options_of(row: Mapping[str, str]) -> dict[str, str]:
    """Letters and texts of a row's options, up to the first empty one."""
    return {letter: row[letter] for letter in takewhile(lambda letter: row.get(letter), string.ascii_uppercase)}


def read_predictions(path: Path, rows: Table) -> dict[int, dict[str, Mapping[str, Any]]]:
    """Answers by round and index; `DataError` unless every row has one in round 0, and no other row has any."""
    found: dict[int, dict[str, Mapping[str, Any]]] = {}
    answers = [{"round_id": 0, **row, "index": str(row["question_id"])} for row in read_results(path)]
    for (round_id, index), row in by_key(answers, path, "round_id", "index").items():
        found.setdefault(round_id, {})[index] = row
    require_same(found.get(0, {}), (row["index"] for row in rows), path)
    strange = {index for answered in found.values() for index in answered} - {row["index"] for row in rows}
    if strange:
        raise DataError(f"{path} has rounds of {len(strange)} index(es) that the table does not have; not scored.")
    return found


def submission(rows: Table, texts: Mapping[str, str]) -> list[list[str]]:
    """Header and rows of the submitted table: `prediction` after the last option, what the server needs not dropped."""
    kept = [key for key in rows[0] if key not in DROPPED]
    last = max(kept.index(letter) for letter in kept if letter in string.ascii_uppercase)
    header = [*kept[: last + 1], "prediction", *kept[last + 1 :]]
    return [header] + [
        [texts[row["index"]] if key == "prediction" else row[key] for key in header]  # a column for a column
        for row in rows
    ]


def convert(annotation_file: Path, result_dir: Path, upload_dir: Path, experiment: str) -> str:
    """Write `UPLOAD_DIR/EXPERIMENT.xlsx` with the answers of the first round."""
    rows = read_table(annotation_file)
    first = read_predictions(result_dir / f"{experiment}.jsonl", rows)[0]
    target = upload_dir / f"{experiment}.xlsx"
    write_submission(rows, first, target)
    return f"{target}"


def write_submission(rows: Table, first: Mapping[str, Mapping[str, Any]], target: Path) -> None:
    """The server's table with the answers of one round, by index."""
    write_xlsx(target, submission(rows, {index: row["text"] for index, row in first.items()}))


def chosen(row: Mapping[str, str], answer: Mapping[str, Any]) -> str | None:
    """The original letter an answer means; a rotated round shows its options under other letters."""
    shown, original = answer.get("options"), answer.get("option_char")
    if not answer["round_id"] or not shown or not original:
        return read_option(answer["text"], options_of(row))
    letters = string.ascii_uppercase
    found = read_option(answer["text"], dict(zip(letters, shown, strict=False)))
    return None if found is None else str(original[letters.index(found)])


def score(rows: Table, answers: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Vanilla and circular accuracy in percent, and circular per category, over the questions (copies are one)."""
    if not all(row.get("answer") for row in rows):
        raise DataError("This MMBench table has no answers, so only the server can score it; use the XLSX submission.")
    right: dict[int, list[bool]] = {}
    vanilla: dict[int, bool] = {}
    category: dict[int, str] = {}
    for row in rows:
        base = int(row["index"]) % COPY
        category.setdefault(base, row.get("category", ""))
        for round_id, answered in answers.items():
            if row["index"] not in answered:
                continue
            found = chosen(row, answered[row["index"]]) == row["answer"]
            right.setdefault(base, []).append(found)
            if round_id == 0 and int(row["index"]) < COPY:
                vanilla[base] = found
    circular = {base: all(found) for base, found in right.items()}
    groups: dict[str, list[bool]] = {}
    for base, found in circular.items():
        groups.setdefault(category[base], []).append(found)
    return {
        "n": len(circular),
        "vanilla": _percent(list(vanilla.values())),
        "circular": _percent(list(circular.values())),
        "categories": {name: _percent(found) for name, found in sorted(groups.items())},
    }


def _percent(right: Sequence[bool]) -> float | None:
    """None of nothing: a table of copies only has no vanilla accuracy."""
    return 100 * sum(right) / len(right) if right else None


def table(result: Mapping[str, Any]) -> str:
    vanilla = "–" if result["vanilla"] is None else f"{result['vanilla']:.2f}%"
    lines = [f"Questions: {result['n']}", f"Vanilla accuracy: {vanilla}"]
    lines.append(f"Circular accuracy: {result['circular']:.2f}%")
    return "\n".join(lines + [f"  {name:<40}{value:>7.2f} %" for name, value in result["categories"].items()])


def evaluate(annotation_file: Path, result_file: Path) -> str:
    """Score an answers file against a table that has the answers (the dev split)."""
    rows = read_table(annotation_file)
    return table(score(rows, read_predictions(result_file, rows)))


# --- MMBench's table as questions -------------------------------------------------------------------------------------


SUFFIXES = {"en": LETTER_SUFFIX, "cn": LETTER_SUFFIX_CN}


def pictures(rows: Table) -> Base64Images:
    """The table's pictures, each once, however many rows show it."""
    cells = _cells(rows)
    return Base64Images({_name(cell): cell for cell in cells if cell})


def _cells(rows: Table) -> list[str]:
    """Each row's picture in base64; some tables give a copy the index of the row that has it instead."""
    by_index = {row["index"]: row for row in rows}
    texts = [row.get("image", "") for row in rows]
    return [by_index[text].get("image", "") if text in by_index else text for text in texts]


def _name(cell: str) -> str:
    return hashlib.blake2b(cell.encode(), digest_size=16).hexdigest()


def questions(
    rows: Table, *, all_rounds: bool = False, single_pred_prompt: bool = False, lang: str = "en"
) -> list[Question]:
    """Questions of all rows, the rounds of a row after one another; the suffix is asked, and not recorded."""
    if lang not in SUFFIXES:
        raise ConfigError(f"--lang is {lang!r}; choose from {', '.join(SUFFIXES)}.")
    if all_rounds and any(int(row["index"]) >= COPY for row in rows):
        raise ConfigError("This table holds rotated copies already; leave out --all-rounds, which would rotate twice.")
    suffix = f"\n{SUFFIXES[lang]}" if single_pred_prompt else ""
    found = []
    for row, cell in zip(rows, _cells(rows)):
        options = options_of(row)
        if not options:
            raise DataError(f"The row with index {row['index']} has no option A; expected an MMBench table.")
        for turn in range(len(options) if all_rounds else 1):
            found.append(_question(row, options, turn, (_name(cell),) if cell else (), suffix))
    return found


def _question(
    row: Mapping[str, str], options: Mapping[str, str], turn: int, images: tuple[str, ...], suffix: str
) -> Question:
    letters, texts = list(options), list(options.values())
    letters, texts = letters[turn:] + letters[:turn], texts[turn:] + texts[:turn]
    shown = [f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, texts)]
    prompt = "\n".join((*filter(None, [row.get("hint")]), row["question"], *shown))
    return Question(
        int(row["index"]), prompt, images, prompt + suffix, round_id=turn, options=tuple(texts),
        option_char=tuple(letters),
    )  # fmt: skip


# --- MMBench and MMBench-CN -------------------------------------------------------------------------------------------


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
    def rows(self) -> Table:
        return read_table(self.question_path)

    @property
    def pictures(self) -> ImageSource:
        return pictures(self.rows)

    def questions(self, limit: int | None = None) -> Sequence[Question]:
        if limit is not None:
            raise ConfigError("MMBench is scored over all orders of a question's options, so it takes no --limit.")
        return super().questions()

    def read(self, path: Path) -> Sequence[Question]:
        return questions(self.rows, single_pred_prompt=True, lang=self.lang)

    def score_rows(self, rows: Sequence[Row], path: Path) -> dict[str, Any]:
        predictions = read_predictions(path, self.rows)
        target = path.with_name("upload.xlsx")
        write_submission(self.rows, predictions[0], target)
        if self.split != "dev":
            return {"n": len(rows), "upload": str(target), "server": "OpenCompass (opencompass.org.cn)"}
        return {**score(self.rows, predictions), "upload": str(target)}

    def primary_metric(self, score: dict[str, Any]) -> float | None:
        found = score.get("circular")
        return None if found is None else float(found)

    def references(self, rows: Sequence[Row]) -> list[str]:
        answers = {row["index"]: row.get("answer", "") for row in self.rows}
        return [answers[str(row["question_id"])] for row in rows]

    def table(self, score: dict[str, Any]) -> str:
        if "circular" not in score:
            return f"Answers: {score['n']}\nNot scored here: submit {score['upload']} to {score['server']}."
        return table(score)


class MMBenchCN(MMBench):
    name: ClassVar[str] = "mmbench_cn"
    column = "MMB-CN"
    folder = "mmbench_cn"
    lang = "cn"
    layouts: ClassVar = {
        "dev": Layout("mmbench_dev_cn_20231003.tsv", "", 4329, "", source=SOURCE),
        "test": Layout("mmbench_test_cn_20231003.tsv", "", 6666, "", source=SOURCE),
    }
