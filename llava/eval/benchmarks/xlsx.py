"""Excel files with one sheet, for submissions to the MMBench server."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

import xlsxwriter

from llava.errors import DataError
from llava.files import write_errors

_FORBIDDEN: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")  # not allowed in XML 1.0
_WHOLE: Final = re.compile(r"0|-?[1-9]\d{0,14}")  # Excel numbers have 15 digits; longer ones stay text
_MOST: Final = 32_767  # characters of a cell
_CREATED: Final = datetime(2000, 1, 1)  # so that equal rows make equal files


def write_xlsx(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """Write the rows as the only sheet. Integers become numbers; empty cells are omitted.

    Raises `DataError` for a text that is longer than a cell of Excel can be.
    """
    longest = max((len(value) for row in rows for value in row), default=0)
    if longest > _MOST:
        raise DataError(f"{path} cannot hold a text of {longest:,} characters; a cell of Excel has {_MOST:,}.")
    content = io.BytesIO()
    with xlsxwriter.Workbook(content, {"constant_memory": True}) as book:
        book.set_properties({"created": _CREATED})
        sheet = book.add_worksheet("Sheet1")
        for number, row in enumerate(rows):
            for column, value in enumerate(row):
                if _WHOLE.fullmatch(value):
                    sheet.write_number(number, column, int(value))
                elif value:
                    sheet.write_string(number, column, _cell_text(value))
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.getvalue())


def _cell_text(value: str) -> str:
    """A text as XlsxWriter keeps it: it would write `_x000D_` for a carriage return, and read `<r>…</r>` as markup."""
    text = _FORBIDDEN.sub("", value.replace("\r\n", "\n").replace("\r", "\n"))
    return f"{text} " if text.startswith("<r>") and text.endswith("</r>") else text
