"""MMBench and MMBench-CN: circular accuracy where answers are public, and the table to submit elsewhere.

A question is correct in circular accuracy only if it is answered correctly for every rotation of its options. Rotations
are copies of a row whose `index` is larger by a multiple of 1,000,000, or rounds of one row (`--all-rounds`).
"""

from __future__ import annotations

import csv
import functools
import hashlib
import string
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

from llava.errors import ConfigError, DataError
from llava.eval.benchmarks.base import Layout, Reading, Scores, Task, count_unread
from llava.eval.benchmarks.outcomes import Outcome
from llava.eval.benchmarks.parsing import parse_option
from llava.eval.benchmarks.xlsx import write_xlsx
from llava.eval.run.answers import read_results
from llava.eval.run.files import Record, Row, by_key, require_same
from llava.eval.run.images import Base64Images
from llava.eval.run.questions import LETTER_SUFFIX, LETTER_SUFFIX_CN, Question

if TYPE_CHECKING:
    from llava.eval.outcomes import Outcomes
    from llava.eval.uncertainty import Metric

COPY_OFFSET: Final = 1_000_000
SUFFIXES: Final = {"en": LETTER_SUFFIX, "cn": LETTER_SUFFIX_CN}
DROPPED_COLUMNS: Final = ("hint", "category", "source", "image", "comment", "l2-category")
SOURCE: Final = "https://download.openmmlab.com/mmclassification/datasets/mmbench/"

Table = list[dict[str, str]]
Predictions = Mapping[int, Mapping[str, Record]]  # round → index → answer


def read_table(path: Path) -> Table:
    """The rows of the TSV with all cells as strings; options such as `None` and `nan` are not missing values."""
    csv.field_size_limit(1 << 30)  # a cell holds a base64 image
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [{key: cell or "" for key, cell in row.items()} for row in csv.DictReader(file, delimiter="\t")]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"Cannot read {path}: {error}.") from error
    if not rows or not {"index", "question", "A"} <= rows[0].keys():
        raise DataError(f"{path} has no rows with index, question and A; expected an MMBench TSV.")
    invalid = next((row["index"] for row in rows if not row["index"].isdecimal()), None)
    if invalid is not None:
        raise DataError(f"{path} has the index {invalid!r}; expected integers, as in the published TSV.")
    if len({row["index"] for row in rows}) < len(rows):
        raise DataError(f"{path} has two rows with the same index; indices must be unique.")
    return rows


def options_of(row: Mapping[str, str]) -> dict[str, str]:
    """Letters and texts of the options, up to the first empty one."""
    return {letter: row[letter] for letter in takewhile(lambda letter: row.get(letter), string.ascii_uppercase)}


def _image_cells(rows: Table) -> list[str]:
    """The base64 image of each row; in some tables a copy has the index of the row with the image instead."""
    by_index = {row["index"]: row for row in rows}
    cells = [row.get("image", "") for row in rows]
    return [by_index[cell].get("image", "") if cell in by_index else cell for cell in cells]


def _image_name(cell: str) -> str:
    return hashlib.blake2b(cell.encode(), digest_size=16).hexdigest()


def table_images(rows: Table) -> Base64Images:
    """The distinct images of the table, named by their hash."""
    return Base64Images({_image_name(cell): cell for cell in _image_cells(rows) if cell})


def make_questions(
    rows: Table, *, all_rounds: bool = False, single_pred_prompt: bool = False, lang: str = "en"
) -> list[Question]:
    """Questions of all rows, with the rounds of a row in sequence. The suffix is sent to the model but not recorded."""
    if lang not in SUFFIXES:
        raise ConfigError(f"--lang must be one of {', '.join(SUFFIXES)}, got {lang!r}.")
    if all_rounds and any(int(row["index"]) >= COPY_OFFSET for row in rows):
        raise ConfigError("This table already has rotated copies; remove --all-rounds, which would rotate twice.")
    suffix = f"\n{SUFFIXES[lang]}" if single_pred_prompt else ""
    questions = []
    for row, cell in zip(rows, _image_cells(rows)):
        options = options_of(row)
        if not options:
            raise DataError(f"The row with index {row['index']} has no option A; expected an MMBench table.")
        letters, texts = list(options), list(options.values())
        for turn in range(len(options) if all_rounds else 1):
            rotated = texts[turn:] + texts[:turn]
            shown = [f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, rotated)]
            prompt = "\n".join((*filter(None, [row.get("hint")]), row["question"], *shown))
            questions.append(
                Question(
                    int(row["index"]), prompt, (_image_name(cell),) if cell else (), prompt + suffix, round_id=turn,
                    options=tuple(rotated), option_char=tuple(letters[turn:] + letters[:turn]),
                )
            )  # fmt: skip
    return questions


def read_predictions(path: Path, rows: Table) -> Predictions:
    """Answers by round and index. Raises `DataError` unless round 0 has exactly the rows of the table."""
    predictions: dict[int, dict[str, Record]] = {}
    answers: list[Record] = [{"round_id": 0, **row, "index": str(row["question_id"])} for row in read_results(path)]
    for (round_id, index), row in by_key(answers, path, "round_id", "index").items():
        predictions.setdefault(round_id, {})[index] = row
    indices = [row["index"] for row in rows]
    require_same(predictions.get(0, {}), indices, path)
    unknown = {index for answered in predictions.values() for index in answered}.difference(indices)
    if unknown:
        raise DataError(f"{path} has rounds of {len(unknown)} index(es) that are not in the table; not scored.")
    if len(predictions) > 1:  # a question without its last rounds would be easier
        rounds = [(turn, row["index"]) for row in rows for turn in range(len(options_of(row)))]
        require_same([(turn, index) for turn, answered in predictions.items() for index in answered], rounds, path)
    return predictions


def predicted_letter(row: Mapping[str, str], answer: Record) -> str | None:
    """The original letter of the chosen option, mapped back if the round shows the options rotated."""
    shown, original = answer.get("options"), answer.get("option_char")
    if not answer["round_id"] or not shown or not original:
        return parse_option(answer["text"], options_of(row))
    letters = string.ascii_uppercase
    found = parse_option(answer["text"], dict(zip(letters, shown, strict=False)))
    return None if found is None else str(original[letters.index(found)])


def outcome(row: Mapping[str, str], answer: Record) -> Outcome:
    """The outcome of the answer to a row; its unit is all rotations of the question."""
    base, turn = int(row["index"]) % COPY_OFFSET, answer["round_id"]
    correct = predicted_letter(row, answer) == row["answer"]
    vanilla = {} if turn or int(row["index"]) >= COPY_OFFSET else {"vanilla": float(correct)}
    return Outcome(f"{row['index']}/{turn}", correct, [f"categories/{row.get('category', '')}"], vanilla, str(base))


def score_answers(rows: Table, predictions: Predictions) -> Scores:
    """Vanilla and circular accuracy in percent, and circular accuracy per category; copies count as one question.

    An answer from which `parse_option` reads no option is unread and wrong.
    """
    if not all(row.get("answer") for row in rows):
        raise DataError("This MMBench table has no answers, so only the server can score it; use the XLSX submission.")
    correct: dict[int, list[bool]] = {}
    vanilla: dict[int, bool] = {}
    category: dict[int, str] = {}
    unread: list[bool] = []
    for row in rows:
        base = int(row["index"]) % COPY_OFFSET
        category.setdefault(base, row.get("category", ""))
        for round_id, answers in predictions.items():
            if row["index"] in answers:
                letter = predicted_letter(row, answers[row["index"]])
                unread.append(letter is None)
                is_correct = letter == row["answer"]
                correct.setdefault(base, []).append(is_correct)
                if round_id == 0 and int(row["index"]) < COPY_OFFSET:
                    vanilla[base] = is_correct
    circular = {base: all(found) for base, found in correct.items()}
    groups: dict[str, list[bool]] = {}
    for base, found in circular.items():
        groups.setdefault(category[base], []).append(found)
    return {
        "n": len(circular),
        **count_unread(unread),
        "vanilla": _percent(list(vanilla.values())),
        "circular": _percent(list(circular.values())),
        "categories": {name: _percent(found) for name, found in sorted(groups.items())},
    }


def _percent(correct: Sequence[bool]) -> float | None:
    """Percentage of true values, None for an empty list: a table of copies only has no vanilla accuracy."""
    return 100 * sum(correct) / len(correct) if correct else None


def submission(rows: Table, texts: Mapping[str, str]) -> list[list[str]]:
    """Header and rows of the submitted table: `prediction` after the last option, `DROPPED_COLUMNS` removed."""
    columns = [key for key in rows[0] if key not in DROPPED_COLUMNS]
    last = max(columns.index(letter) for letter in columns if letter in string.ascii_uppercase)
    header = [*columns[: last + 1], "prediction", *columns[last + 1 :]]
    return [header, *([texts[row["index"]] if key == "prediction" else row[key] for key in header] for row in rows)]


def write_submission(rows: Table, predictions: Predictions, target: Path) -> None:
    """Write the XLSX submission with the answers of round 0."""
    write_xlsx(target, submission(rows, {index: row["text"] for index, row in predictions[0].items()}))


class MMBench(Task):
    name: ClassVar[str] = "mmbench"
    column = "MMB"
    supports_limit = False
    metric = "circular"
    max_new_tokens = 1024
    folder = "mmbench"
    lang: ClassVar[str] = "en"
    layouts: ClassVar = {
        "dev": Layout("mmbench_dev_20230712.tsv", "", 4377, "", source=SOURCE),
        "test": Layout("mmbench_test_en_20231003.tsv", "", 6666, "", source=SOURCE),
    }

    @functools.cached_property
    def rows(self) -> Table:
        return read_table(self.question_path)

    @property
    def images(self) -> Base64Images:
        return table_images(self.rows)

    def read_questions(self, path: Path) -> Sequence[Question]:
        return make_questions(self.rows, single_pred_prompt=True, lang=self.lang)

    def score_rows(self, rows: Sequence[Row], path: Path) -> Scores:
        predictions = read_predictions(path, self.rows)
        target = path.with_name("upload.xlsx")
        write_submission(self.rows, predictions, target)
        if self.split != "dev":
            unread = count_unread(predicted_letter(row, predictions[0][row["index"]]) is None for row in self.rows)
            return {"n": len(rows), **unread, "upload": str(target), "server": "OpenCompass (opencompass.org.cn)"}
        by_index = {row["index"]: row for row in self.rows}
        outcomes = [
            outcome(by_index[str(row["question_id"])], predictions[row.get("round_id", 0)][str(row["question_id"])])
            for row in rows
        ]
        return {**score_answers(self.rows, predictions), "upload": str(target), "outcomes": outcomes}

    @classmethod
    def metrics(cls, outcomes: Outcomes) -> list[Metric]:
        """Circular accuracies over questions, in total and per category, and vanilla accuracy over unrotated rows."""
        units = outcomes.by_unit()
        circular = [units.mean("circular"), *(units.mean(name, group=name) for name in units.groups)]
        return [*circular, *(outcomes.mean(name, column) for name, column in outcomes.values.items())]

    @classmethod
    def scored_units(cls, outcomes: Outcomes) -> Outcomes:
        return outcomes.by_unit()

    def readings(self, rows: Sequence[Row]) -> list[Reading]:
        by_index = {row["index"]: row for row in self.rows}
        letters = [predicted_letter(by_index[str(row["question_id"])], {"round_id": 0, **row}) for row in rows]
        return [Reading(letter or "", letter is None) for letter in letters]

    def references(self, rows: Sequence[Record]) -> list[str]:
        answers = {row["index"]: row.get("answer", "") for row in self.rows}
        return [answers[str(row["question_id"])] for row in rows]

    @staticmethod
    def table(scores: Scores) -> str:
        if "circular" not in scores:
            return f"Answers: {scores['n']}\nNot scored here: submit {scores['upload']} to {scores['server']}."
        vanilla = "–" if scores["vanilla"] is None else f"{scores['vanilla']:.2f}%"
        lines = [f"Questions: {scores['n']}", f"Vanilla accuracy: {vanilla}"]
        lines.append(f"Circular accuracy: {scores['circular']:.2f}%")
        return "\n".join(lines + [f"  {name:<40}{value:>7.2f} %" for name, value in scores["categories"].items()])


class MMBenchCN(MMBench):
    name: ClassVar[str] = "mmbench_cn"
    column = "MMB-CN"
    folder = "mmbench_cn"
    lang = "cn"
    layouts: ClassVar = {
        "dev": Layout("mmbench_dev_cn_20231003.tsv", "", 4329, "", source=SOURCE),
        "test": Layout("mmbench_test_cn_20231003.tsv", "", 6666, "", source=SOURCE),
    }


def evaluate(annotation_file: Path, result_file: Path) -> str:
    """`eval_mmbench`: score an answers file with a table that has the answers (dev split)."""
    rows = read_table(annotation_file)
    return MMBench.summary(score_answers(rows, read_predictions(result_file, rows)))


def convert(annotation_file: Path, result_dir: Path, upload_dir: Path, experiment: str) -> str:
    """`convert_mmbench_for_submission`: write `UPLOAD_DIR/EXPERIMENT.xlsx` with the answers of the first round."""
    rows = read_table(annotation_file)
    target = upload_dir / f"{experiment}.xlsx"
    write_submission(rows, read_predictions(result_dir / f"{experiment}.jsonl", rows), target)
    return f"{target}"
