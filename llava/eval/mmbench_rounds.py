"""MMBench's table as questions: options listed under the question, and with `all_rounds` once in every rotation.

A published table already holds rotated copies of its rows; rounds are for tables without copies (spec/eval.md §2.3).
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Mapping

from llava.errors import ConfigError, DataError
from llava.eval.pictures import Cells
from llava.eval.questions import LETTER_SUFFIX, LETTER_SUFFIX_CN, Question
from llava.eval.scorers.mmbench import COPY, Table, options_of

SUFFIXES = {"en": LETTER_SUFFIX, "cn": LETTER_SUFFIX_CN}

Row = Mapping[str, str]


def pictures(rows: Table) -> Cells:
    """The table's pictures, each once, however many rows show it."""
    cells = _cells(rows)
    return Cells({_name(cell): cell for cell in cells if cell})


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


def _question(row: Row, options: Mapping[str, str], turn: int, images: tuple[str, ...], suffix: str) -> Question:
    letters, texts = list(options), list(options.values())
    letters, texts = letters[turn:] + letters[:turn], texts[turn:] + texts[:turn]
    shown = [f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, texts)]
    prompt = "\n".join((*filter(None, [row.get("hint")]), row["question"], *shown))
    return Question(
        int(row["index"]), prompt, images, prompt + suffix, round_id=turn, options=tuple(texts),
        option_char=tuple(letters),
    )  # fmt: skip
