"""Paired comparison of two runs of `llava eval`: difference, interval, p values, smallest detectable difference.

Both runs answered the same questions. Comparing them question by question detects far smaller differences than
comparing the intervals of both scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llava.errors import DataError
from llava.eval.benchmarks.base import Task
from llava.eval.benchmarks.outcomes import FILE
from llava.eval.benchmarks.registry import TASKS
from llava.eval.outcomes import Outcomes, pair, read_outcomes
from llava.eval.reporting.data import Run
from llava.eval.uncertainty import Interval, Metric, difference, holm, interval, mcnemar, minimum_detectable
from llava.eval.uncertainty import permutation_test as permute


@dataclass(frozen=True)
class PairedComparison:
    """The primary metric of a task in two runs, over the questions that both answered.

    `difference` is second minus first with its 95 % interval, None for fewer than two images. `p_value` is that of
    `permutation_test`, `p_adjusted` that after Holm's correction for all tasks compared. `gained` and `lost` are the
    ids of questions (units of several, where they are scored together) whose score rose and fell. `mcnemar` is the p
    value of McNemar's exact test for them, None where scores are not only right or wrong. `detectable` is the smallest
    true difference that the paired test detects with a power of 80 %, None if no image differs.
    """

    task: str
    metric: str
    first: float
    second: float
    difference: Interval | None
    p_value: float
    p_adjusted: float
    mcnemar: float | None
    gained: Sequence[str]
    lost: Sequence[str]
    questions: int
    detectable: float | None

    @property
    def significant(self) -> bool:
        """Whether the runs differ at 5 % after the correction."""
        return self.p_adjusted < 0.05


def primary_metric(task: type[Task], outcomes: Outcomes) -> Metric:
    """The metric of a task that is compared with published scores; without it, the first metric."""
    metrics = task.metrics(outcomes)
    return next((metric for metric in metrics if metric.name == task.metric), metrics[0])


def compare_outcomes(task: type[Task], first: Outcomes, second: Outcomes) -> PairedComparison:
    """Compare two runs of a task. Raises `DataError` if they have no question in common."""
    before, after = pair(first, second)
    metrics = primary_metric(task, before), primary_metric(task, after)
    change = interval(difference(*metrics))
    units = [task.scored_units(each) for each in (before, after)]
    ids, scores = units[0].ids, [each.scores for each in units]
    gained = [ids[at] for at in (scores[1] > scores[0]).nonzero()[0].tolist()]
    lost = [ids[at] for at in (scores[1] < scores[0]).nonzero()[0].tolist()]
    binary = all(((each == 0) | (each == 1)).all() for each in scores)
    p_value = permute(*metrics)
    detectable = minimum_detectable(change.standard_error, change.clusters) if change else 0.0
    return PairedComparison(
        task.name, metrics[0].name, metrics[0].estimate, metrics[1].estimate, change, p_value, p_value,
        mcnemar(len(gained), len(lost)) if binary else None, gained, lost, len(before.ids), detectable or None,
    )  # fmt: skip


def compare_runs(first: Run, second: Run) -> list[PairedComparison]:
    """Compare every task that both runs scored on the same split, with Holm's correction for their number."""
    found = []
    for task in first.scores:
        splits = [run.scores[task].get("split") for run in (first, second) if task in run.scores]
        if (
            len(splits) == 2
            and splits[0] == splits[1]
            and all(run.scores[task].get("primary_metric") is not None for run in (first, second))
        ):
            outcomes = [read_outcomes(run.folder / task / FILE) for run in (first, second)]
            found.append(compare_outcomes(TASKS[task], *outcomes))
    if not found:
        raise DataError(f"{first.folder} and {second.folder} have no scored benchmark and split in common.")
    adjusted = holm({each.task: each.p_value for each in found})
    return [replace(each, p_adjusted=adjusted[each.task]) for each in found]
