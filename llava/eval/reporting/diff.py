"""Attribution of the gap between two runs of a benchmark.

The gap is the second run's recorded score minus the first's. It is the sum of these parts, in this order:

1. `scorer`: the gap minus the gap after the scorer of this version has scored the answers of both runs.
2. `questions of one run`: the change when the questions that only one run answered are excluded.
3. The other questions are grouped by what differs in them, and the second run's answers replace the first's one group
   after the other: `prompts` (hash of the rendered prompt), `pixels` (hash of the preprocessed images), `decoding`,
   `unread answers` (equal inputs, and the rule reads no answer in one of the two), and the rest, which is `weights` if
   the checkpoints differ.

A group with one difference is measured. If several things differ in the same questions, only their joint part is known.
The part of each alone is within the bounds (all these answers wrong, or all right); hybrids of both runs separate them
(`llava.eval.reporting.ask`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from itertools import accumulate
from typing import Final, NamedTuple

import numpy as np

from llava.eval.benchmarks.base import Task
from llava.eval.outcomes import Mask, Outcomes, pair
from llava.eval.reporting.paired import PairedComparison, compare_outcomes, primary_metric
from llava.eval.reporting.sides import Side, rescore
from llava.eval.run.files import Record

PROMPTS: Final = "prompts"
PIXELS: Final = "pixels"
DECODING: Final = "decoding"
WEIGHTS: Final = "weights"
NUMERICS: Final = "numerics"
SERVER: Final = "server"
SCORER: Final = "scorer"
MISSING: Final = "questions of one run"
UNREAD: Final = "unread answers"
NOTHING: Final = "nothing recorded differs"
INPUTS: Final = {PROMPTS: "prompt_hash", PIXELS: "image_hashes"}
ORDER: Final = (PROMPTS, PIXELS, DECODING, UNREAD, NUMERICS, WEIGHTS, SERVER, NOTHING, SCORER)
UNKNOWN: Final = " (not recorded)"
MODELS: Final = (WEIGHTS, f"{SERVER}{UNKNOWN}")
ASKABLE: Final = {PROMPTS, PIXELS, DECODING, *MODELS}  # causes that hybrids of both runs separate
ASKED: Final = "asked again"
Classes = Mapping[str, tuple[str, ...]]  # causes by question
# hybrids in the order of substitution: the cause that each adds, and answers by question; the last is the second run
Ask = Callable[[Side, Side, Classes], Sequence[tuple[str, Mapping[str, Record]]]]
NUMERIC_KEYS: Final = ("dtype", "attention", "device", "quantization")
SEPARATE: Final = 8  # equal bytes between two changes of a prompt
_WORDS: Final = re.compile(rb"\s+|\w+|[\xc0-\xff][\x80-\xbf]*|[^\w\s]")  # no character is split
_NEUTRAL: Final[tuple[object, ...]] = (None, 0, 1, -1, [], {})
_GREEDY: Final = ("top_p", "seed")  # do not matter at temperature 0


@dataclass(frozen=True)
class Part:
    """A part of the gap in points. `causes` are joint if there are several; `bounds` are then those of each alone."""

    causes: tuple[str, ...]
    questions: int
    points: float
    gained: int = 0
    lost: int = 0
    unread: tuple[int, int] = (0, 0)
    bounds: tuple[float, float] | None = None
    note: str = ""

    @property
    def name(self) -> str:
        return " + ".join(self.causes)


class _Step(NamedTuple):
    """Questions whose outcomes are replaced, and the causes that this measures."""

    causes: tuple[str, ...]
    outcomes: Outcomes
    questions: set[str]
    note: str = ""


@dataclass(frozen=True)
class Explanation:
    """The gap between two runs of one benchmark and its parts.

    `changed` are questions and changes of their scores, the largest losses first. `classes` are the causes of each
    common question, `comparison` is the paired test over them, `start` the first run's score.
    """

    first: Side
    second: Side
    parts: Sequence[Part] = ()
    changed: Sequence[tuple[str, float]] = ()
    classes: Classes = field(default_factory=dict)
    comparison: PairedComparison | None = None
    start: float = 0.0
    reason: str = ""

    @property
    def name(self) -> str:
        return self.first.task.name


def explain(first: Side, second: Side, ask: Ask | None = None) -> Explanation:
    """The parts of the gap; none, with the reason, if the answers cannot be scored here.

    `ask` answers the questions with several causes by hybrids of the runs, which separates these causes.
    """
    task, today = first.task, is_rescored(first, second)
    before, after = first.outcomes(today), second.outcomes(today)
    if before is None or after is None:
        return Explanation(first, second, reason=first.unscored or second.unscored or "no outcomes are recorded")
    left, right = pair(before, after)
    classes = {question: causes(first, second, question) for question in left.ids}
    hybrids = ask(first, second, classes) if ask and today else []
    asked = set(left.ids).intersection(*(rows for _, rows in hybrids)) if hybrids else set()
    scores = [_score(task, outcomes) for outcomes in (before, after, left, right)]
    parts = [_scorer_part(first, second, scores[0], scores[1])]
    alone = len(before.ids) + len(after.ids) - 2 * len(left.ids)
    parts.append(Part((MISSING,), alone, scores[1] - scores[3] + scores[2] - scores[0]))
    steps = [
        _Step(names, right, {key for key in classes if classes[key] == names} - asked, _note(first, second, names))
        for names in sorted(set(classes.values()), key=_rank)
    ]
    for cause, rows in hybrids:
        outcomes = rescore(task, [{**first.rows[key], **(rows[key] if key in asked else {})} for key in left.ids])[0]
        hybrid = pair(left, Outcomes.of(outcomes, left.ids))[1]
        steps.append(_Step((cause,), hybrid, asked, _note(first, second, (cause,), ASKED)))
    parts += _class_parts(task, first, second, left, [step for step in steps if step.questions])
    change = (right.scores - left.scores).tolist()
    changed = sorted(((each, delta) for each, delta in zip(left.ids, change) if delta), key=lambda item: item[1])
    kept = [part for part in parts if part.questions or abs(part.points) > 1e-9]
    tested = compare_outcomes(type(task), before, after)
    start = scores[0] if first.metric is None else first.metric
    return Explanation(first, second, kept, changed, classes, tested, start)


def _scorer_part(first: Side, second: Side, before: float, after: float) -> Part:
    """What re-scoring removes from the gap; nothing for a run without a recorded score."""
    shifts = [0.0 if side.metric is None else side.metric - now for side, now in ((first, before), (second, after))]
    altered = sum(
        key in side.recorded and side.recorded[key].score != outcome.score
        for side in (first, second)
        for key, outcome in side.rescored.items()
    )
    return Part((SCORER,), altered, shifts[1] - shifts[0], note=_scorer_note(first, second))


def _scorer_note(first: Side, second: Side) -> str:
    """What is recorded about the scorers, and whether the current one was used."""
    notes = []
    for name, side in (("first", first), ("second", second)):
        scorer = side.score.get("scorer")
        if not side.rescored:
            notes.append(f"the {name} run was not re-scored ({side.unscored})")
        elif not isinstance(scorer, dict):
            notes.append(f"the scorer of the {name} run is not recorded")
        else:
            now = side.score["scorer_now"]
            notes += [f"{key} of the {name} run differ from today's" for key in now if scorer.get(key) != now[key]]
    return "; ".join(notes)


def _note(first: Side, second: Side, names: Sequence[str], how: str = "") -> str:
    """`how` a part is known, and the prompt profiles if they differ and the prompts are among its causes."""
    before, after = first.prompt_profile, second.prompt_profile
    if PROMPTS not in names or before == after:
        return how
    how = how or ("measured" if len(names) == 1 else "")
    return "; ".join(filter(None, (how, f"prompt profiles {before} and {after}")))


def causes(first: Side, second: Side, question: str) -> tuple[str, ...]:
    """What differs in a question of both runs, in the order of the parts."""
    before, after = first.facts(question), second.facts(question)
    found = []
    for name, key in INPUTS.items():
        if key in before and key in after and _server(first) == _server(second):
            found += [name] if before[key] != after[key] else []
        elif not _same_inputs(first, second, name):
            found.append(f"{name}{UNKNOWN}")
    decoding = _decoding_differs(first, second, before, after)
    if decoding is not False:
        found.append(DECODING if decoding else f"{DECODING}{UNKNOWN}")
    if not found and (first.is_unread(question) or second.is_unread(question)):
        return (UNREAD,)
    return (*found, *_run_causes(first, second)) or (NOTHING,)


def _server(side: Side) -> bool:
    """Whether a server rendered the prompts, so that the hashes are those of the texts and files sent to it."""
    return str(side.identity.get("checkpoint", "")).startswith("api:")


def _same_inputs(first: Side, second: Side, name: str) -> bool:
    """Whether manifests of older versions prove that the inputs were equal: questions, template, preprocessing."""
    keys = {PROMPTS: ("questions", "template", "follow_up"), PIXELS: ("questions", "image_aspect_ratio", "checkpoint")}
    before, after = first.identity, second.identity
    return bool(before) and all(before.get(key) == after.get(key) for key in keys[name]) and not _server(first)


def _decoding_differs(first: Side, second: Side, before: Record, after: Record) -> bool | None:
    """Whether decoding settings that matter to an answer differ, None if that is unknown.

    At temperature 0, top-p and seed do not matter, and a token limit only if the answer under the lower one reached it.
    """
    left, right = (dict(side.identity.get("decoding") or {}) for side in (first, second))
    if not left or not right:
        return None
    ignored = {key for key in left.keys() ^ right.keys() if (left | right)[key] in _NEUTRAL}  # newer settings, unused
    if left.get("temperature") == right.get("temperature") == 0:
        ignored.update(_GREEDY)
    left, right = ({key: each[key] for key in each if key not in ignored} for each in (left, right))
    if left == right:
        return False
    limits = left.pop("max_new_tokens", None), right.pop("max_new_tokens", None)
    if left != right or left.get("temperature") != 0 or None in limits:
        return True
    reason = (before if limits[0] < limits[1] else after).get("finish_reason")
    return None if reason is None else reason == "length"


def _run_causes(first: Side, second: Side) -> list[str]:
    """What differs between the runs besides inputs: numerics, weights, and a scorer that cannot be run here."""
    before, after = first.identity, second.identity
    found = [NUMERICS] if before and after and any(before.get(k) != after.get(k) for k in NUMERIC_KEYS) else []
    if _server(first) or _server(second):
        found.append(f"{SERVER}{UNKNOWN}")
    elif "checkpoint" not in before or "checkpoint" not in after:
        found.append(f"{WEIGHTS}{UNKNOWN}")
    elif before["checkpoint"] != after["checkpoint"]:
        found.append(WEIGHTS)
    return found if is_rescored(first, second) or _same_scorer(first, second) else [*found, f"{SCORER}{UNKNOWN}"]


def is_rescored(first: Side, second: Side) -> bool:
    """Whether the answers of both runs could be scored by the scorer of this version."""
    return bool(first.rescored and second.rescored)


def _same_scorer(first: Side, second: Side) -> bool:
    """Whether both runs record the same code, labels and judge."""
    left, right = ({**(side.score.get("scorer") or {}), "judge": side.score.get("judge")} for side in (first, second))
    return "code" in left and all(left.get(key) == right.get(key) for key in ("code", "labels", "judge"))


def _score(task: Task, outcomes: Outcomes) -> float:
    """The published metric of outcomes."""
    return primary_metric(type(task), outcomes).estimate


def substitute(first: Outcomes, second: Outcomes, mask: Mask) -> Outcomes:
    """The outcomes of the second run where `mask`, else those of the first; both are about the same questions."""
    values = {name: np.where(mask, second.values[name], column) for name, column in first.values.items()}
    return replace(first, scores=np.where(mask, second.scores, first.scores), values=values)


def _rank(names: tuple[str, ...]) -> tuple[int, list[int]]:
    """Sort key of a group of causes: single causes first, in the order of `ORDER`."""
    return min(len(names), 2), [ORDER.index(name.removesuffix(UNKNOWN)) for name in names]


def _class_parts(task: Task, first: Side, second: Side, left: Outcomes, steps: Sequence[_Step]) -> Iterator[Part]:
    """The part of each step: its outcomes replace those before it."""
    state, score = left, _score(task, left)
    for step in steps:
        mask = np.array([question in step.questions for question in left.ids])
        low, high = (_score(task, replace(state, scores=np.where(mask, value, state.scores))) for value in (0.0, 1.0))
        change = (step.outcomes.scores - state.scores)[mask]
        state, before = substitute(state, step.outcomes, mask), score
        score = _score(task, state)
        joint = len(step.causes) > 1 or step.causes[0].endswith(UNKNOWN)
        yield Part(
            step.causes, len(step.questions), score - before, int((change > 0).sum()), int((change < 0).sum()),
            (sum(map(first.is_unread, step.questions)), sum(map(second.is_unread, step.questions))),
            (low - before, high - before) if joint else None, step.note,
        )  # fmt: skip


def first_prompts(first: Side, second: Side) -> tuple[str, str] | None:
    """The rendered prompts of the first question, None unless both runs recorded them for the same one."""
    prompts = [
        {key: text for key in side.rows if (text := side.facts(key).get("first_prompt"))} for side in (first, second)
    ]
    key = next((key for key in prompts[0] if key in prompts[1]), None)
    return None if key is None else (prompts[0][key], prompts[1][key])


def byte_diff(before: str, after: str, limit: int = 6) -> list[tuple[int, bytes, bytes]]:
    """Byte offset, old and new bytes of each change between two prompts, at most `limit` of them."""
    words: list[list[bytes]] = [_WORDS.findall(text.encode()) for text in (before, after)]
    ends = [[0, *accumulate(map(len, each))] for each in words]
    found: list[list[int]] = []  # start and end in both prompts, in words
    for tag, a, b, c, d in SequenceMatcher(None, words[0], words[1], autojunk=False).get_opcodes():
        if tag != "equal" and found and ends[0][a] - ends[0][found[-1][1]] < SEPARATE:
            found[-1][1::2] = b, d
        elif tag != "equal":
            found.append([a, b, c, d])
    left, right = before.encode(), after.encode()
    return [(ends[0][a], left[ends[0][a] : ends[0][b]], right[ends[1][c] : ends[1][d]]) for a, b, c, d in found[:limit]]
