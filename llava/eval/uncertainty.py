"""Uncertainty of scores: clustered intervals, paired tests of two runs, and smallest detectable differences.

Questions about one image are not independent, so images are the sampling unit: a metric is a function of sums over
images, and its standard error is the jackknife over images (Efron and Stein, 1981; MacKinnon, Nielsen and Webb, 2023,
on clusters; Miller, 2024, arXiv:2411.00640, on evaluations of language models). Metrics with bounds get Wilson's
interval (1927) at the effective sample size of their standard error (Korn and Graubard, 1998; Dean and Pagano, 2015),
which stays within the bounds and is accurate near them; others the t interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
LEVEL: Final = 0.95
POWER: Final = 0.8
RESAMPLES: Final = 9_999
EXACT_UP_TO: Final = 13  # number n of differing images up to which all 2**n swaps are enumerated


@dataclass(frozen=True)
class Metric:
    """A metric as a function of sums over images.

    `sums` has shape (images, k); `value` maps sums (..., k) to scores (...). A row of zeros is an image without
    questions. `bounds` are the lowest and the highest possible score, None if there are none.
    """

    name: str
    sums: Floats
    value: Callable[[Floats], Floats]
    bounds: tuple[float, float] | None = (0.0, 100.0)

    @property
    def estimate(self) -> float:
        return float(self.value(self.sums.sum(axis=0)))


@dataclass(frozen=True)
class Interval:
    """A score with its confidence interval.

    `clusters` is the number of images. `detectable` is the smallest difference from the score of another run on other
    images of this kind that a two-sided test at 5 % detects with a power of 80 % (Bloom, 1995); paired comparison on
    the same questions detects smaller ones (`llava.eval.reporting.paired`).
    """

    value: float
    low: float
    high: float
    standard_error: float
    clusters: int

    @property
    def detectable(self) -> float:
        return math.sqrt(2) * minimum_detectable(self.standard_error, self.clusters)

    def record(self) -> dict[str, float]:
        """The content of score.json."""
        return {**vars(self), "detectable": self.detectable}


def interval(metric: Metric, level: float = LEVEL) -> Interval | None:
    """The confidence interval of a metric, None with fewer than two images.

    If all images score alike, or the score is the lowest or the highest one, the effective sample size is the number of
    images: answers about one image then count as one.
    """
    clusters, error = jackknife(metric)
    if clusters < 2:
        return None
    value, t = metric.estimate, t_quantile(0.5 + level / 2, clusters - 1)
    low, high = value - t * error, value + t * error
    if metric.bounds is not None and metric.bounds[0] <= value <= metric.bounds[1]:
        base, width = metric.bounds[0], metric.bounds[1] - metric.bounds[0]
        share, spread = (value - base) / width, error / width
        size = share * (1 - share) / spread**2 if spread and 0 < share < 1 else clusters
        center = (share + t**2 / (2 * size)) / (1 + t**2 / size)
        half = t / (1 + t**2 / size) * math.sqrt(share * (1 - share) / size + t**2 / (4 * size**2))
        low, high = base + width * max(0.0, center - half), base + width * min(1.0, center + half)
    return Interval(value, min(low, value), max(high, value), error, clusters)


def jackknife(metric: Metric) -> tuple[int, float]:
    """The number of images, and the standard error from leaving out each image in turn."""
    sums = metric.sums[metric.sums.any(axis=1)]
    clusters = len(sums)
    if clusters < 2:
        return clusters, math.nan
    without = metric.value(sums.sum(axis=0) - sums)
    spread = float(without.std())
    return clusters, math.sqrt(clusters - 1) * spread if spread > 1e-12 * abs(metric.estimate) else 0.0


def difference(first: Metric, second: Metric) -> Metric:
    """Second minus first as a metric: the jackknife leaves an image out of both runs, which makes it paired."""
    columns = first.sums.shape[1]

    def value(sums: Floats) -> Floats:
        return second.value(sums[..., columns:]) - first.value(sums[..., :columns])

    return Metric(first.name, np.hstack((first.sums, second.sums)), value, None)


def minimum_detectable(standard_error: float, clusters: int, power: float = POWER) -> float:
    """The true difference that a two-sided 5 % test detects with this power, (t + z) standard errors (Bloom, 1995)."""
    return (t_quantile(0.5 + LEVEL / 2, clusters - 1) + NormalDist().inv_cdf(power)) * standard_error


def permutation_test(first: Metric, second: Metric, seed: int = 0) -> float:
    """Two-sided p value of the difference between two runs: their answers are swapped at random for whole images.

    Exact for any metric, including F1 (approximate randomization: Noreen, 1989; Yeh, 2000), given images that are
    independent. All swaps are counted if few images differ; else `RESAMPLES` random ones, where p counts the observed
    difference as well and so is never 0 (Phipson and Smyth, 2010).
    """
    change = second.sums - first.sums
    change = change[change.any(axis=1)]
    count = len(change)
    if not count:
        return 1.0
    totals = first.sums.sum(axis=0), second.sums.sum(axis=0)
    observed = abs(float(second.value(totals[1]) - first.value(totals[0]))) - 1e-9
    if count <= EXACT_UP_TO:
        swaps = (np.arange(2**count)[:, None] >> np.arange(count) & 1).astype(np.float64)
        return float(np.mean(_swapped(swaps @ change, totals, first, second) >= observed))
    random, extreme, rows = np.random.default_rng(seed), 1, max(1, 2_000_000 // count)
    for start in range(0, RESAMPLES, rows):
        size = (min(rows, RESAMPLES - start), -(-count // 8))
        bits = np.unpackbits(random.integers(0, 256, size, dtype=np.uint8), axis=1, count=count)
        extreme += int((_swapped(bits.astype(np.float64) @ change, totals, first, second) >= observed).sum())
    return extreme / (RESAMPLES + 1)


def _swapped(moved: Floats, totals: tuple[Floats, Floats], first: Metric, second: Metric) -> Floats:
    """Absolute differences after moving sums (swaps, k) from the second run to the first."""
    found: Floats = np.abs(second.value(totals[1] - moved) - first.value(totals[0] + moved))
    return found


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p value of McNemar's test (1947): a question that changed sides is as likely gained as lost.

    It treats questions as independent; with several questions per image, use `permutation_test`.
    """
    total, term, tail = gained + lost, 1, 0
    for k in range(min(gained, lost) + 1):
        tail += term
        term = term * (total - k) // (k + 1)
    return min(1.0, 2 * tail / (1 << total))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P values of several tests, adjusted to control the family-wise error rate (Holm, 1979)."""
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda each: p_values[each])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution: exact for 1 and 2 degrees of freedom, else the series of Abramowitz and
    Stegun, 26.7.5, within 0.2 % at 97.5 %."""
    if freedom == 1:
        return math.tan(math.pi * (probability - 0.5))
    if freedom == 2:
        return (2 * probability - 1) / math.sqrt(2 * probability * (1 - probability))
    z, n = NormalDist().inv_cdf(probability), float(freedom)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n**power for power, term in enumerate(terms, 1))


def divide(parts: Floats, wholes: Floats) -> Floats:
    """Elementwise quotient, 0 where the divisor is 0."""
    found: Floats = np.divide(parts, wholes, out=np.zeros(np.broadcast(parts, wholes).shape), where=wholes != 0)
    return found


def ratio(scale: float) -> Callable[[Floats], Floats]:
    """`scale` times the first sum, divided by the second."""
    return lambda sums: scale * divide(sums[..., 0], sums[..., 1])


def confusion_rates() -> dict[str, Callable[[Floats], Floats]]:
    """Rates as functions of the counts (..., 4) of true and false positives, true and false negatives."""
    return {
        "accuracy": lambda n: divide(n[..., 0] + n[..., 2], n.sum(axis=-1)),
        "precision": lambda n: divide(n[..., 0], n[..., 0] + n[..., 1]),
        "recall": lambda n: divide(n[..., 0], n[..., 0] + n[..., 3]),
        "f1": lambda n: divide(2 * n[..., 0], 2 * n[..., 0] + n[..., 1] + n[..., 3]),
        "yes_ratio": lambda n: divide(n[..., 0] + n[..., 1], n.sum(axis=-1)),
    }


def combine(name: str, metrics: Sequence[Metric], weight: float = 1.0) -> Metric:
    """The weighted sum of metrics over the same images."""
    edges = np.cumsum([0, *(metric.sums.shape[1] for metric in metrics)])

    def value(sums: Floats) -> Floats:
        parts = [metric.value(sums[..., a:b]) for metric, a, b in zip(metrics, edges, edges[1:])]
        return weight * sum(parts[1:], parts[0])

    known = [metric.bounds for metric in metrics if metric.bounds is not None]
    bounds = (weight * sum(low for low, _ in known), weight * sum(high for _, high in known))
    sums = np.hstack([metric.sums for metric in metrics])
    return Metric(name, sums, value, bounds if len(known) == len(metrics) else None)
