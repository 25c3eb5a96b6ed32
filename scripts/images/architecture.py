"""Draw images/architecture.svg: the model, its two training stages, serving and evaluation."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

OUTPUT = Path(__file__).resolve().parents[2] / "images" / "architecture.svg"
WIDTH, HEIGHT = 1200, 690
INK, MUTED, LINE, PANEL = "#1f2430", "#5b6472", "#8a93a3", "#f6f7f9"
FILLS = {
    "tower": ("#dbe7ff", "#3b6fd4"),
    "projector": ("#ffe6cc", "#d9730d"),
    "llm": ("#dff3e3", "#2f8a4b"),
    "plain": ("#ffffff", "#b4bcc8"),
    "engine": ("#ece3fa", "#7a52b8"),
}


def text(
    x: float, y: float, content: str, size: int = 15, color: str = INK, anchor: str = "middle", weight: int = 400
) -> str:
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{content}</text>'
    )


def frame(x: float, y: float, w: float, h: float, fill: str, stroke: str) -> str:
    size = f'x="{x}" y="{y}" width="{w}" height="{h}"'
    return f'<rect {size} rx="8" fill="{fill}" stroke="{stroke}" stroke-width="1.5"/>'


def box(x: float, y: float, w: float, h: float, title: str, subtitle: str = "", kind: str = "plain") -> str:
    """A rounded box with a title and an optional second line."""
    fill, stroke = FILLS[kind]
    middle = y + h / 2 + 5
    lines = [text(x + w / 2, middle - (9 if subtitle else 0), title, weight=600)]
    if subtitle:
        lines.append(text(x + w / 2, middle + 12, subtitle, 13, MUTED))
    return frame(x, y, w, h, fill, stroke) + "".join(lines)


def arrow(*points: tuple[float, float]) -> str:
    path = " L".join(f"{x},{y}" for x, y in points)
    return f'<path d="M{path}" fill="none" stroke="{LINE}" stroke-width="2" marker-end="url(#head)"/>'


def panel(x: float, y: float, w: float, h: float, title: str) -> str:
    background = f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="12" fill="{PANEL}"/>'
    return background + text(x + 20, y + 32, title, 18, anchor="start", weight=700)


def tokens(x: float, y: float, kinds: str) -> str:
    """A row of token squares: i image, t text."""
    squares = []
    for index, kind in enumerate(kinds):
        fill, stroke = FILLS["projector" if kind == "i" else "plain"]
        squares.append(
            f'<rect x="{x + 17 * index}" y="{y}" width="13" height="13" rx="3" fill="{fill}" stroke="{stroke}"/>'
        )
    return "".join(squares)


def model() -> list[str]:
    return [
        panel(20, 20, 1160, 270, "Model"),
        box(45, 75, 135, 66, "Image", "336 or 448 px"),
        arrow((180, 108), (228, 108)),
        box(232, 75, 205, 66, "Vision tower", "InternViT-6B or CLIP", "tower"),
        arrow((437, 108), (485, 108)),
        box(489, 75, 160, 66, "Projector", "two-layer MLP", "projector"),
        arrow((569, 141), (569, 176)),
        box(45, 180, 135, 66, "Prompt", "question, history"),
        arrow((180, 213), (228, 213)),
        box(232, 180, 205, 66, "Template, tokenizer", "vicuna_v1"),
        arrow((437, 213), (485, 213)),
        frame(489, 180, 190, 66, *FILLS["plain"]),
        tokens(503, 194, "ttiiiiiitt"),
        text(584, 232, "token embeddings", 13, MUTED),
        arrow((679, 213), (727, 213)),
        box(731, 122, 220, 124, "Language model", "Vicuna-7B or -13B", "llm"),
        arrow((951, 184), (999, 184)),
        box(1003, 151, 150, 66, "Answer", "streamed text"),
        text(661, 112, "576 or 1,024 image tokens", 13, MUTED, "start"),
    ]


def training() -> list[str]:
    parts = [panel(20, 310, 370, 360, "Training")]
    for y, title, subtitle, trained in (
        (362, "Stage 1: 558K captions", "projector only, batch 256", ("projector",)),
        (515, "Stage 2: 665K conversations", "projector and language model, batch 128", ("projector", "llm")),
    ):
        parts += [
            text(40, y + 14, title, 15, anchor="start", weight=600),
            text(40, y + 35, subtitle, 13, MUTED, "start"),
        ]
        for x, kind, name in ((40, "tower", "Tower"), (154, "projector", "Projector"), (268, "llm", "LLM")):
            learns = kind in trained
            parts.append(box(x, y + 50, 102, 58, name, "trained" if learns else "frozen", kind if learns else "plain"))
    return parts


def serving() -> list[str]:
    return [
        panel(410, 310, 400, 360, "Serving"),
        box(430, 365, 110, 56, "Browser"),
        arrow((540, 393), (574, 393)),
        box(578, 365, 100, 56, "Web page", "Gradio"),
        arrow((628, 421), (628, 452)),
        box(430, 456, 110, 56, "API client", "openai"),
        arrow((540, 484), (574, 484)),
        box(578, 456, 210, 56, "Controller", "registry, /v1 API", "engine"),
        arrow((640, 512), (540, 556)),
        arrow((720, 512), (720, 556)),
        box(430, 560, 175, 78, "Worker", "engine and model", "llm"),
        box(622, 560, 166, 78, "Worker", "vLLM, SGLang, …", "llm"),
    ]


def evaluation() -> list[str]:
    steps = (
        ("Questions", "question file of a benchmark", "plain"),
        ("Engine", "continuous batching, prefix cache", "engine"),
        ("Answers", "answers.jsonl and manifest", "plain"),
        ("Scorer", "score, comparison with published", "plain"),
    )
    parts = [panel(830, 310, 350, 360, "Evaluation")]
    for index, (title, subtitle, kind) in enumerate(steps):
        y = 358 + 77 * index
        parts.append(box(860, y, 290, 54, title, subtitle, kind))
        if index + 1 < len(steps):
            parts.append(arrow((1005, y + 54), (1005, y + 73)))
    return parts


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args(argv)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="Liberation Sans, Arial, Helvetica, sans-serif">\n'
        "<title>Architecture of InternVL-Chat: model, training, serving, evaluation</title>\n"
        '<defs><marker id="head" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0,0 L10,5 L0,10 z" fill="{LINE}"/></marker></defs>\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>\n'
    )
    shapes = [*model(), *training(), *serving(), *evaluation()]
    args.output.write_text(head + "\n".join(shapes) + "\n</svg>\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
