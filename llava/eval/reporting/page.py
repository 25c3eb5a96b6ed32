"""The page of a report: one HTML file with its pictures inside, nothing fetched; every text is escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Final

from llava.eval.reporting.data import FIELDS, INSIDE, OUTSIDE, Run, lines, table_of, zoo
from llava.eval.reporting.samples import Sample

STYLE: Final = """
:root { color-scheme: light dark; --page: #fff; --ink: #37352f; --soft: #6f6e6b; --line: #e9e9e7; --tint: #f7f9fb;
        --frame: #f1f1ef; --good: #3d7a59; --off: #b65a05; }
@media (prefers-color-scheme: dark) {
  :root { --page: #191919; --ink: #e6e6e4; --soft: #9b9a97; --line: #373737; --tint: #1f262c; --frame: #252525;
          --good: #6fbf94; --off: #f0a35e; }
  img.chart { filter: invert(0.9) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1300px; padding: 40px 24px 80px; color: var(--ink); background: var(--page);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 30px; margin: 0 0 4px; } h2 { font-size: 21px; margin: 44px 0 12px; }
p { color: var(--soft); margin: 0 0 12px; }
.wide { overflow-x: auto; } img.chart { width: 100%; min-width: 640px; max-width: 860px; display: block; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); }
th, td { padding: 6px 7px; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.number, th.number { text-align: right; } tr.ours td { font-weight: 600; background: var(--tint); }
.inside { color: var(--good); font-weight: 600; } .outside { color: var(--off); font-weight: 600; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 16px; }
.card { border: 1px solid var(--line); border-radius: 8px; overflow: hidden; display: flex; flex-direction: column; }
.card .frame { background: var(--frame); height: 200px; display: flex; align-items: center; justify-content: center;
               color: var(--soft); font-size: 13px; }
.card .frame img { max-width: 100%; max-height: 200px; min-height: 120px; object-fit: contain; }
.card .words { padding: 12px 14px; } .card pre { margin: 0 0 10px; font: inherit; white-space: pre-wrap;
               overflow-wrap: anywhere; max-height: 12em; overflow-y: auto; }
dl { margin: 0; display: grid; grid-template-columns: auto 1fr; gap: 4px 12px; font-size: 14px; }
dt { color: var(--soft); max-width: 150px; overflow-wrap: anywhere; }
dd { margin: 0; overflow-wrap: anywhere; max-height: 9em; overflow-y: auto; }
dd.same { color: var(--good); } dd.differs { color: var(--off); }
"""
LEFT: Final = {"", "model", "tower", "LLM", "run", "task", "split", "verdict"}


def page(runs: Sequence[Run], chart: bytes | None, shown: Mapping[str, Sequence[Sample]]) -> str:
    """The whole page; `shown` are samples by task."""
    names = ", ".join(run.name for run in runs)
    parts = [f"<h1>Evaluation</h1><p>{escape(names)}</p>"]
    header, rows = zoo(runs)
    if any(run.by_column for run in runs):
        parts.append(_table(header, rows, [row[0] for row in rows]))
    if chart is not None:
        encoded = base64.b64encode(chart).decode()
        picture = f'<img class="chart" alt="Scores" src="data:image/png;base64,{encoded}">'
        parts.append(f'<h2>Scores</h2><div class="wide">{picture}</div>')
    compared = [table_of(line) for run in runs for line in lines(run)]
    parts.append("<h2>Ours and published</h2><p>Inside: no further from the published score than its noise band.</p>")
    parts.append(_table(FIELDS, compared, [""] * len(compared)))
    for task, samples in shown.items():
        cards = "".join(_card(sample) for sample in samples)
        parts.append(f'<h2>Answers: {escape(task)}</h2><div class="cards">{cards}</div>')
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>Evaluation: {escape(names)}</title><style>{STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], kinds: Sequence[str]) -> str:
    def cell(tag: str, column: str, text: str) -> str:
        name = "" if column in LEFT else ' class="number"'
        if text in (INSIDE, OUTSIDE):
            name = f' class="{text}"'
        return f"<{tag}{name}>{escape(text)}</{tag}>"

    head = "".join(cell("th", column, column) for column in header)
    body = "".join(
        f'<tr class="{escape(kind)}">' + "".join(map(cell, ["td"] * len(row), header, row)) + "</tr>"
        for kind, row in zip(kinds, rows)
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _card(sample: Sample) -> str:
    frame = f'<img alt="" src="{escape(sample.picture)}">' if sample.picture else "no picture"
    pairs = []
    for run, answer in sample.answers.items():
        same = sample.agrees(answer)
        kind = "" if same is None else ' class="same"' if same else ' class="differs"'
        pairs.append(f"<dt>{escape(run)}</dt><dd{kind}>{escape(answer) or '(empty)'}</dd>")
    if sample.truth:
        pairs.append(f"<dt>truth</dt><dd>{escape(sample.truth)}</dd>")
    question = f"<pre>{escape(sample.prompt)}</pre>"
    return (
        f'<div class="card"><div class="frame">{frame}</div>'
        f'<div class="words">{question}<dl>{"".join(pairs)}</dl></div></div>'
    )
