"""MMBench: the table to submit, and circular accuracy where answers are public (spec/eval.md §4.8, §6).

A question counts as right in circular accuracy only if it is answered rightly with its options in every order: the
copies of a row have its `index` plus a multiple of 1,000,000, or (`--all-rounds`) the answers several `round_id`.
"""

from __future__ import annotations

import csv
import string
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

from llava.errors import DataError
from llava.eval.files import by_key, read_results, require_same
from llava.eval.scorers.choices import read_option
from llava.eval.xlsx import write_xlsx

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
