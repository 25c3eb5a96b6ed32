"""The table of the thirty checks (CHECKS.md) and the tests that are named after them are complete."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_each_check_has_a_test_and_a_row() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in HERE.glob("test_*.py"))
    tested = {int(number) for number in re.findall(r"^def test_check_(\d\d)_", text, re.MULTILINE)}
    rows = re.findall(r"^\| (\d+) \|", (HERE / "CHECKS.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [int(row) for row in rows] == sorted(tested) == list(range(1, 31))
