"""Draw the output of a command as an SVG of a terminal, from a log: see images/README.md.

python scripts/images/terminal.py --command "sh scripts/test.sh" --keep "passed|TOTAL" --output images/test.svg < LOG
"""

from __future__ import annotations

import argparse
import html
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ADVANCE, HEIGHT, PAD, BAR = 8.43, 20, 20, 34  # pixels: width of a character, line height, margin, title bar
BACKGROUND, INK, MUTED, ACCENT = "#1e222a", "#d7dae0", "#8b93a1", "#8fc7ff"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def select(lines: Iterable[str], keep: str | None, width: int) -> list[str]:
    """Printable lines that match `keep`, with `…` for those left out, cut to `width` characters."""
    chosen: list[str] = []
    for line in lines:
        plain = ESCAPES.sub("", line.rstrip("\n").rsplit("\r", 1)[-1]).rstrip()
        if keep is None or re.search(keep, plain):
            chosen.append(plain if len(plain) <= width else plain[: width - 1] + "…")
        elif chosen and chosen[-1] != "…":
            chosen.append("…")
    return chosen[:-1] if chosen and chosen[-1] == "…" else chosen


def draw(command: str, lines: Sequence[str]) -> str:
    rows = [f"$ {command}", *lines]
    width = round(ADVANCE * max(map(len, rows)) + 2 * PAD)
    height = BAR + HEIGHT * len(rows) + PAD
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="Liberation Mono, Menlo, Consolas, DejaVu Sans Mono, monospace" font-size="14">',
        f"<title>{html.escape(command)}</title>",
        f'<rect width="{width}" height="{height}" rx="10" fill="{BACKGROUND}"/>',
    ]
    parts += [
        f'<circle cx="{22 + 20 * index}" cy="17" r="6" fill="{color}"/>'
        for index, color in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    ]
    for index, row in enumerate(rows):
        strong = index == 0 or row.startswith("==>")
        color = ACCENT if strong else MUTED if row == "…" else INK
        size = f' textLength="{ADVANCE * len(row):.1f}" lengthAdjust="spacingAndGlyphs"' if row.strip() else ""
        parts.append(
            f'<text x="{PAD}" y="{BAR + HEIGHT * index + 14}" fill="{color}" xml:space="preserve"{size}>'
            f"{html.escape(row, quote=False)}</text>"
        )
    return "\n".join((*parts, "</svg>\n"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", required=True, help="shown after the prompt")
    parser.add_argument("--keep", help="regular expression of the lines to show; default: all")
    parser.add_argument("--width", type=int, default=110, help="longest line in characters (default %(default)s)")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    args.output.write_text(draw(args.command, select(sys.stdin, args.keep, args.width)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
