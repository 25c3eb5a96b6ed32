"""Attributed gaps as Markdown and as a page: parts, prompts, settings, and the questions gained and lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Final

from llava.eval.reporting.data import Run, format_score, markdown_table
from llava.eval.reporting.diff import ASKABLE, PIXELS, Explanation, Part, byte_diff, first_prompts
from llava.eval.reporting.page import thumbnail
from llava.eval.reporting.rendering import render
from llava.eval.reporting.sides import Side
from llava.eval.run.answers import final_answer
from llava.eval.run.files import Record

HEADER: Final = ("part", "questions", "points", "gained", "lost", "unread", "how known")
COLUMNS: Final = ("setting", "first", "second")
SKIPPED: Final = ("asked", "engine", "seconds", "keys", "shards", "environment.command", "status")
EXAMPLES: Final = 5


def title(explanation: Explanation) -> str:
    """Task, both recorded scores and their difference."""
    before, after = explanation.first.metric, explanation.second.metric
    change = None if before is None or after is None else after - before
    scores = f"{format_score(before)} and {format_score(after)} ({format_score(change, signed=True)})"
    return f"{explanation.first.task.name}: {scores}"


def verdict(explanation: Explanation) -> str:
    """Difference on the common questions with its interval, p values, and the smallest detectable difference."""
    found = explanation.comparison
    if found is None:
        return f"The gap is not explained: {explanation.reason}."
    change = found.difference
    interval = "" if change is None else f" (95 % interval {change.low:+.2f} to {change.high:+.2f})"
    text = (
        f"On {found.questions:,} common questions: {found.second - found.first:+.2f}{interval}, p = {found.p_value:.2g}"
    )
    if found.p_adjusted != found.p_value:
        text += f", {found.p_adjusted:.2g} after Holm's correction"
    text += "" if found.mcnemar is None else f", McNemar's exact p = {found.mcnemar:.2g}"
    text += "" if found.detectable is None else f"; smallest detectable difference {found.detectable:.2f}"
    return f"{text}. {len(found.gained):,} gained, {len(found.lost):,} lost."


def how_known(part: Part) -> str:
    """Whether a part is measured, or the bounds of its causes."""
    notes = [part.note] if part.note else []
    if part.bounds is not None:
        low, high = part.bounds
        can_ask = len(part.causes) > 1 and ASKABLE.issuperset(part.causes)
        how = "not separable without asking again (--ask)" if can_ask else "not separable"
        notes.append(f"{how}; each alone {low:+.1f} to {high:+.1f}")
    return "; ".join(notes) or "measured"


def cells(part: Part) -> list[str]:
    """The formatted values of `HEADER`."""
    counts = [f"{part.gained:,}", f"{part.lost:,}", f"{part.unread[0]:,} → {part.unread[1]:,}"]
    return [part.name, f"{part.questions:,}", f"{part.points:+.2f}", *counts, how_known(part)]


def settings_rows(first: Side, second: Side) -> list[list[str]]:
    """What differs between the manifests: setting, first, second."""
    left, right = _flatten(first.manifest), _flatten(second.manifest)
    return [
        [key, shorten(left.get(key)), shorten(right.get(key))]
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key) and not key.startswith(SKIPPED)
    ]


def _flatten(content: Record, prefix: str = "") -> dict[str, object]:
    """A nested dictionary with its keys joined by periods."""
    flat: dict[str, object] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        flat.update(_flatten(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


def shorten(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}…"


def _prompt_lines(explanation: Explanation) -> list[str]:
    """The byte differences of the first rendered prompts."""
    prompts = first_prompts(explanation.first, explanation.second)
    if prompts is None:
        return []
    return [f"byte {at}: {old.decode(errors='replace')!r} → {new.decode(errors='replace')!r}"
            for at, old, new in byte_diff(*prompts)]  # fmt: skip


def diff_markdown(first: Run, second: Run, explanations: Sequence[Explanation]) -> str:
    """The report of all tasks, and the names of those of one run only."""
    parts = [f"# {first.folder} and {second.folder}"]
    for each in explanations:
        parts += [f"## {title(each)}", verdict(each)]
        if each.parts:
            parts.append(markdown_table(HEADER, [cells(part) for part in each.parts]))
        if lines := _prompt_lines(each):
            parts.append("First prompt, what differs:\n\n" + "\n".join(f"    {line}" for line in lines))
        rows = settings_rows(each.first, each.second)
        parts.append(markdown_table(COLUMNS, rows) if rows else "Equal settings and versions.")
        parts.append(_changed_answers(each))
    for run, other in ((first, second), (second, first)):
        only = [task for task in run.scores if task not in other.scores]
        if only:
            parts.append(f"Only in {run.folder}: {', '.join(only)}.")
    return "\n\n".join(parts)


def _changed_answers(explanation: Explanation) -> str:
    """The number of changed answers, and examples: first those whose score changed."""
    first, second = explanation.first.rows, explanation.second.rows
    common = [key for key in first if key in second]
    changed = [key for key in common if first[key]["text"] != second[key]["text"]]
    text = f"{len(changed)} of {len(common)} answers to the same questions differ."
    order = [*(key for key, _ in explanation.changed), *changed]
    rows = [[shorten(key), shorten(first[key]["text"]), shorten(second[key]["text"])]
            for key in list(dict.fromkeys(order))[:EXAMPLES]]  # fmt: skip
    return f"{text}\n\n" + markdown_table(["question", "first", "second"], rows) if rows else text


def diff_page(first: Run, second: Run, explanations: Sequence[Explanation], count: int) -> str:
    """The page, with at most `count` lost and `count` gained questions of each task."""
    return render(
        "diff.html",
        first=first,
        second=second,
        explanations=explanations,
        count=count,
        columns=COLUMNS,
        heading=title,
        verdict=verdict,
        settings_rows=settings_rows,
        waterfall=_waterfall,
        prompt_pieces=_prompt_pieces,
        changed_questions=_changed_questions,
        card=_card,
    )


def _changed_questions(explanation: Explanation) -> list[tuple[str, list[str]]]:
    """The questions lost and those gained, the largest changes first."""
    lost = [key for key, delta in explanation.changed if delta < 0]
    return [("Lost", lost), ("Gained", [key for key, delta in reversed(explanation.changed) if delta > 0])]


def _waterfall(explanation: Explanation) -> Iterator[dict[str, object]]:
    """A bar for each part, from the score before it to the score after it; offset and width in percent."""
    edges = list(accumulate((part.points for part in explanation.parts), initial=explanation.start))
    low, high = min(edges), max(edges)
    margin = 0.08 * (high - low) or 1.0
    low, width = low - margin, high - low + 2 * margin

    def bar(name: str, detail: str, start: float, end: float, text: str) -> dict[str, object]:
        kind = "total" if not detail else "up" if end >= start else "down"
        left, size = 100 * (min(start, end) - low) / width, 100 * abs(end - start) / width
        return {"name": name, "detail": detail, "kind": kind, "left": left, "width": size, "text": text}

    yield bar("first run", "", edges[0], edges[0], format_score(edges[0]))
    for part, start, end in zip(explanation.parts, edges, edges[1:]):
        yield bar(part.name, _detail(part), start, end, f"{part.points:+.2f}")
    yield bar("second run", "", edges[-1], edges[-1], format_score(edges[-1]))


def _detail(part: Part) -> str:
    sides = f", +{part.gained:,} −{part.lost:,}" if part.gained or part.lost else ""
    unread = f", unread {part.unread[0]:,} → {part.unread[1]:,}" if any(part.unread) else ""
    return f"{part.questions:,} questions{sides}{unread}; {how_known(part)}"


def _prompt_pieces(explanation: Explanation) -> list[tuple[str, str]]:
    """The first prompt as texts with the tags `del` and `ins`, which are removed and added; others have no tag."""
    prompts = first_prompts(explanation.first, explanation.second)
    if prompts is None or prompts[0] == prompts[1]:
        return []
    pieces: list[tuple[str, bytes]] = []
    text, at = prompts[0].encode(), 0
    for start, old, new in byte_diff(*prompts, limit=100):
        pieces += [("", text[at:start]), ("del", old), ("ins", new)]
        at = start + len(old)
    return [(tag, piece.decode(errors="replace")) for tag, piece in (*pieces, ("", text[at:])) if piece]


def _card(explanation: Explanation, key: str) -> dict[str, object]:
    """What the page shows of a question."""
    first, second = explanation.first, explanation.second
    sides = (first, second) if PIXELS in explanation.classes[key] else (first,)
    names = [(side.task, side.images.get(key, "")) for side in sides]
    images = [thumbnail(task, name) for task, name in names if name]
    styles = {0.0: "differs", 1.0: "same"}
    return {
        "images": [source for source in images if source],
        "causes": ", ".join(explanation.classes[key]),
        "prompt": str(first.rows[key]["prompt"]).removeprefix("<image>\n"),
        "answers": [
            (name, styles.get(side.score_of(key), ""), final_answer(side.rows[key]["text"]))
            for name, side in (("first", first), ("second", second))
        ],
        "reference": first.references.get(key),
    }
