"""MM-Vet: the file its grading notebook reads (spec/eval.md §6)."""

from __future__ import annotations

from pathlib import Path

from llava.eval.files import by_key, read_results, write_json


def convert(src: Path, dst: Path) -> str:
    """Write `{"v1_<id>": text}`."""
    rows = by_key(read_results(src), src, "question_id")
    write_json(dst, {f"v1_{key}": row["text"] for key, row in rows.items()}, indent=2)
    return ""
