"""HTML panels of the error analysis: kinds of answers, accuracy by group, confusion matrix, and yes-bias."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from llava.eval.reporting.errors import KINDS, Analysis, Group, YesBias


def analysis_panel(title: str, analyses: Mapping[str, Analysis]) -> str:
    """The analysis of one benchmark for each run by name."""
    runs = "".join(f"<h3>{escape(name)}</h3>{_run(each)}" for name, each in analyses.items())
    return f'<section><h2>{escape(title)}</h2><div class="panel">{runs}</div></section>'


def _run(analysis: Analysis) -> str:
    figures = [_figure(f"Accuracy by {name}", _group_rows(groups)) for name, groups in analysis.tables.items()]
    if analysis.labels:
        figures.insert(0, _figure("Confusion (rows: reference)", _confusion(analysis)))
    if analysis.bias:
        figures.insert(1, _figure("Yes-bias", _bias_rows(analysis.bias)))
    missing = f"<p>Not recorded by this run: {escape(', '.join(analysis.missing))}.</p>" if analysis.missing else ""
    return f'{_kinds(analysis.total)}<div class="figures">{"".join(figures)}</div>{missing}'


def _figure(caption: str, content: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{content}</figure>"


def _kinds(group: Group) -> str:
    """A stacked bar of the kinds of answers, and its legend with counts."""
    shown = [(kind, group.kinds[kind]) for kind in KINDS if group.kinds[kind]]
    bar = "".join(f'<i class="k-{kind}" style="flex-grow:{count}"></i>' for kind, count in shown)
    legend = "".join(
        f'<li><i class="k-{kind}"></i>{kind} <b>{count:,}</b> <span>{100 * count / group.count:.1f} %</span></li>'
        for kind, count in shown
    )
    return f'<div class="kinds">{bar}</div><ul class="legend">{legend}</ul>'


def _group_rows(groups: Sequence[Group]) -> str:
    """A row for each group: a dot at its accuracy with the interval, on a track from 0 to 100."""
    rows = []
    for group in groups:
        line = ""
        if not math.isnan(group.low):
            line = f'<s style="left:{group.low:.2f}%;width:{group.high - group.low:.2f}%"></s>'
        dot = f'<b style="left:{group.accuracy:.2f}%"></b>'
        interval = "" if math.isnan(group.low) else f" ({group.low:.1f} to {group.high:.1f})"
        hint = f"{group.name}: {group.accuracy:.1f} %{interval}, {group.count:,} questions"
        rows.append(
            f'<div class="row" title="{escape(hint)}"><span>{escape(group.name)}</span>'
            f'<div class="track">{line}{dot}</div><em>{group.accuracy:.1f}</em><small>{group.count:,}</small></div>'
        )
    return "".join(rows)


def _confusion(analysis: Analysis) -> str:
    """The matrix with cells shaded by their share of the row; correct answers are on the diagonal."""
    head = "".join(f"<th>{escape(label)}</th>" for label in (*analysis.labels, "none"))
    body = ""
    for at, (label, row) in enumerate(zip(analysis.labels, analysis.confusion)):
        shares = [count / sum(row) if sum(row) else 0.0 for count in row]
        cells = "".join(
            f'<td class="{"right" if column == at else "off"}" style="--share:{share:.3f}">{count:,}'
            f"<small>{100 * share:.0f} %</small></td>"
            for column, (count, share) in enumerate(zip(row, shares))
        )
        body += f"<tr><th>{escape(label)}</th>{cells}</tr>"
    return f'<div class="wide"><table class="confusion"><tr><th></th>{head}</tr>{body}</table></div>'


def _bias_rows(biases: Mapping[str, YesBias]) -> str:
    """A row for each group: the share of yes among the answers as a bar, among the references as a mark."""
    rows = [
        f'<div class="row bias"><span>{escape(name)}</span><div class="track">'
        f'<u style="width:{100 * bias.yes_ratio:.2f}%"></u>'
        f'<s class="mark" style="left:{100 * bias.true_ratio:.2f}%"></s></div>'
        f"<em>{100 * bias.yes_ratio:.1f}</em><small>{bias.d_prime:.2f}</small>"
        f"<small>{bias.criterion:+.2f}</small></div>"
        for name, bias in biases.items()
    ]
    head = '<div class="row bias head"><span></span><div></div><em>% yes</em><small>d′</small><small>c</small></div>'
    note = "<p>The mark is the share of yes among the references. d′: sensitivity. c below 0: biased towards yes.</p>"
    return head + "".join(rows) + note
