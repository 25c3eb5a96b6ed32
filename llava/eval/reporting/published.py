"""Published scores (spec/eval.md §9), and how far from one a score may lie and still be the same.

The band is one standard error of a proportion over the benchmark's questions; for MME the ±20 that LLaVA's maintainers
gave for retraining. Answers of the same weights on other hardware differ by far less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

# questions behind a figure: MMBench's are groups of rows, ScienceQA's those with a picture
QUESTIONS: Final = MappingProxyType(
    {
        "VQAv2": 107394, "GQA": 12578, "VizWiz": 8000, "SQA": 2017, "TextVQA": 5000, "POPE": 8910, "MME": 2374,
        "MMB": 1164, "MMB-CN": 1164, "MM-Vet": 218, "SEED": 19242, "LLaVA-Bench": 60,
    }
)  # fmt: skip
COLUMNS: Final = tuple(QUESTIONS)
MME_BAND: Final = 20.0


@dataclass(frozen=True)
class Published:
    """A row of the model zoo. `checkpoint` is its hub name without the owner."""

    checkpoint: str
    method: str
    tower: str
    llm: str
    resolution: int
    scores: Mapping[str, float] = field(hash=False)


def _row(checkpoint: str, method: str, tower: str, llm: str, resolution: int, scores: str) -> Published:
    values = [float(text) for text in scores.split()]
    return Published(checkpoint, method, tower, llm, resolution, MappingProxyType(dict(zip(_ORDER, values))))


_ORDER: Final = ("VQAv2", "GQA", "VizWiz", "SQA", "TextVQA", "POPE", "MME", "MMB", "MMB-CN", "MM-Vet", "SEED",
                 "LLaVA-Bench")  # fmt: skip
_CHAT: Final = "InternVL-Chat-1.0"

ROWS: Final = (
    _row("llava-v1.5-7b", "LLaVA-1.5", "CLIP-L-336px", "V-7B", 336,
         "78.5 62.0 50.0 66.8 58.2 85.9 1510.7 64.3 58.3 30.5 58.6 65.4"),
    _row("llava-v1.5-13b", "LLaVA-1.5", "CLIP-L-336px", "V-13B", 336,
         "80.0 63.3 53.6 71.6 61.3 85.9 1531.3 67.7 63.6 35.4 61.6 72.5"),
    _row("InternVL-Chat-ViT-6B-Vicuna-7B", _CHAT, "IViT-6B-224px", "V-7B", 336,
         "79.3 62.9 52.5 66.2 57.0 86.4 1525.1 64.6 57.6 31.2"),
    _row("InternVL-Chat-ViT-6B-Vicuna-13B", _CHAT, "IViT-6B-224px", "V-13B", 336,
         "80.2 63.9 54.6 70.1 58.7 87.1 1546.9 66.5 61.9 33.7"),
    _row("InternVL-Chat-ViT-6B-Vicuna-13B-448px", _CHAT, "IViT-6B-448px", "V-13B", 448,
         "82.0 64.1 60.1 71.6 64.8 87.2 1579.0 68.2 64.0 36.7"),
)  # fmt: skip


def find(checkpoint: str) -> Published | None:
    """The row of a checkpoint, whatever its case; None for one that is not published."""
    return next((row for row in ROWS if row.checkpoint.lower() == checkpoint.lower()), None)


def band(column: str, score: float) -> float:
    """How far a score of that column may lie from the published `score`."""
    if column == "MME":
        return MME_BAND
    share = min(max(score / 100, 0.0), 1.0)
    return 100 * math.sqrt(share * (1 - share) / QUESTIONS[column])
