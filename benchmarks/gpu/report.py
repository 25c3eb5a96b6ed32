"""Results of a run: lines as they are measured, `gpu.json`, and the table at the end."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from llava.files import atomic_write

Status = Literal["ok", "failed", "skipped", "timeout"]
NOT_ASKED: Final = "not selected"
ENOUGH: Final = 0.7  # lines below this fraction of their floor are listed at the end


@dataclass(frozen=True)
class Line:
    """One measurement or check.

    `floor` is the hardware bound in the same unit: the least time, or the highest rate if the unit ends in "/s".
    `predicted` is an expected value that is no bound, such as the number of kernel launches. `ok` is the result of a
    correctness check, None for a measurement. A line without a value explains why in `note`.
    """

    what: str
    value: float | str | None = None
    unit: str = ""
    floor: float | None = None
    predicted: float | None = None
    ok: bool | None = None
    note: str = ""

    @property
    def share(self) -> float | None:
        """Fraction of the floor reached, 1.0 at the floor."""
        if self.floor is None or not isinstance(self.value, (int, float)) or not (self.value and self.floor):
            return None
        return self.value / self.floor if self.unit.endswith("/s") else self.floor / self.value

    def as_json(self) -> dict[str, Any]:
        value = self.value
        if isinstance(value, float) and not math.isfinite(value):
            value = str(value)  # JSON has no NaN
        found: dict[str, Any] = {"what": self.what, "value": value, "unit": self.unit}
        share = self.share if self.share is None else round(self.share, 4)
        optional = {"floor": self.floor, "predicted": self.predicted, "share": share, "ok": self.ok}
        found |= {name: value for name, value in optional.items() if value is not None}
        return found | ({"note": self.note} if self.note else {})

    def cells(self) -> tuple[str, str, str, str]:
        """What, measured, floor or prediction, and fraction, as text."""
        measured = _amount(self.value, self.unit) if self.value is not None else f"not measured: {self.note}"
        bound = self.floor if self.floor is not None else self.predicted
        share = self.share
        outcome = "" if self.ok is None else "ok" if self.ok else "FAIL"
        return (
            self.what,
            measured + (f" ({self.note})" if self.note and self.value is not None else ""),
            "" if bound is None else _amount(bound, self.unit),
            outcome or ("" if share is None else f"{share:.0%}"),
        )


def _amount(value: float | str, unit: str) -> str:
    number = value if isinstance(value, str) else f"{value:,d}" if isinstance(value, int) else f"{value:.4g}"
    return f"{number} {unit}".strip()


@dataclass
class PartResult:
    """Result of one part."""

    status: Status = "skipped"
    seconds: float = 0.0
    lines: list[Line] = field(default_factory=list)
    reason: str = "not reached"

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "status": self.status,
            "seconds": round(self.seconds, 2),
            "lines": [line.as_json() for line in self.lines],
        }
        return found | (
            {"error" if self.status in ("failed", "timeout") else "reason": self.reason} if self.reason else {}
        )


class Report:
    """The results of all `names`, kept in `file`, which is replaced atomically at each change.

    All parts are listed from the start, so a killed run leaves a valid file with all lines so far.
    """

    def __init__(self, file: Path, names: Sequence[str]) -> None:
        self.file = file
        self.versions: dict[str, Any] = {}
        self.parts = {name: PartResult() for name in names}
        self.write()

    def write(self) -> None:
        content = {
            "versions": self.versions,
            "parts": {name: part.as_json() for name, part in self.parts.items()},
        }
        with atomic_write(self.file) as part, part.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    def begin(self, part: str) -> None:
        """Record that a part runs, with the status to keep if the process dies."""
        self.parts[part].status, self.parts[part].reason = "failed", "the process ended inside this part"
        self.write()

    def add(self, part: str, line: Line) -> None:
        """Keep and print a line."""
        self.parts[part].lines.append(line)
        self.write()
        what, measured, bound, share = line.cells()
        kind = "floor" if line.floor is not None else "predicted"
        print(
            f"  {what}: {measured}" + (f"; {kind} {bound}" if bound else "") + (f"; {share}" if share else ""),
            flush=True,
        )

    def close(self, part: str, status: Status, seconds: float, reason: str = "", *, quiet: bool = False) -> None:
        """Record how a part ended, and print it unless it is `quiet` or ok."""
        result = self.parts[part]
        result.status, result.seconds, result.reason = status, seconds, reason
        self.write()
        if status != "ok" and not quiet:
            print(f"  {status.upper()}: {reason}", flush=True)

    def lines(self) -> Iterator[Line]:
        for part in self.parts.values():
            yield from part.lines

    @property
    def good(self) -> bool:
        """Whether no part failed or timed out and all correctness checks passed."""
        ended = all(part.status in ("ok", "skipped") for part in self.parts.values())
        return ended and all(line.ok is not False for line in self.lines())

    def table(self) -> str:
        """All lines as a Markdown table for benchmarks/README.md."""
        rows = ["| what | measured | floor or prediction | fraction |", "|---|---|---|---|"]
        rows += ["| " + " | ".join(cell.replace("|", "\\|") for cell in line.cells()) + " |" for line in self.lines()]
        return "\n".join(rows)

    def remarks(self) -> list[str]:
        """Summary of failures, skips and results below 70 % of their floor."""
        said = [
            f"FAIL: {line.what}: {' '.join(filter(None, line.cells()[1:3]))}"
            for line in self.lines()
            if line.ok is False
        ]
        for name, part in self.parts.items():
            if part.status != "ok" and part.reason != NOT_ASKED:
                said.append(f"{name} {part.status}: {part.reason}")
        slow = [line for line in self.lines() if (line.share or 1.0) < ENOUGH]
        if slow:
            said.append(f"Below {ENOUGH:.0%} of the floor:")
            said += [f"- {line.what}: {line.share:.0%}" for line in slow]
        return said
