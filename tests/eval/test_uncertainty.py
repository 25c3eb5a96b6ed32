"""Intervals, paired tests and their corrections, against closed forms, enumeration and simulated benchmarks."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from benchmarks import coverage
from llava.errors import DataError
from llava.eval.benchmarks.outcomes import Outcome
from llava.eval.benchmarks.registry import TASKS
from llava.eval.outcomes import Outcomes, pair
from llava.eval.reporting.paired import compare_outcomes
from llava.eval.uncertainty import (
    Interval,
    Metric,
    difference,
    divide,
    holm,
    interval,
    jackknife,
    mcnemar,
    minimum_detectable,
    permutation_test,
    ratio,
    t_quantile,
)


def outcomes(scores: list[float], images: list[int], **fields: object) -> Outcomes:
    rows = [Outcome(str(at), score, **fields) for at, score in enumerate(scores)]  # type: ignore[arg-type]
    return Outcomes.of(rows, [f"{image}.jpg" for image in images])


def accuracy(scores: list[float], images: list[int]) -> Metric:
    return outcomes(scores, images).mean("accuracy")


def found(metric: Metric) -> Interval:
    result = interval(metric)
    assert result is not None
    return result


def test_t_quantiles_match_the_published_table() -> None:
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 23: 2.069, 30: 2.042, 120: 1.980}
    for freedom, value in table.items():
        assert t_quantile(0.975, freedom) == pytest.approx(value, rel=2e-3)
    assert t_quantile(0.5, 7) == 0 and t_quantile(0.995, 10) == pytest.approx(3.169, rel=1e-3)


def test_the_standard_error_of_a_mean_is_that_of_the_means_of_images() -> None:
    """Equal clusters: the deviation of image means by the root of their number, whatever is inside."""
    scores, images = [1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1, 1], [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    means = np.array(scores).reshape(4, 3).mean(axis=1) * 100
    clusters, error = jackknife(accuracy(scores, images))
    assert clusters == 4 and error == pytest.approx(means.std(ddof=1) / 2)
    assert jackknife(accuracy(scores * 6, images * 6)) == (4, pytest.approx(error))  # more questions, the same images


def test_the_jackknife_of_a_ratio_is_its_linearization_for_many_images() -> None:
    random = np.random.default_rng(0)
    counts = random.integers(1, 9, 4000)
    right = random.binomial(counts, 0.6)
    sums = np.stack((right, counts), axis=1).astype(float)
    residuals = right - counts * right.sum() / counts.sum()
    expected = 100 * math.sqrt((residuals**2).sum()) / counts.sum()
    assert jackknife(Metric("ratio", sums, ratio(100)))[1] == pytest.approx(expected, rel=1e-3)


def test_intervals_stay_inside_the_bounds_and_hold_at_them() -> None:
    """All of 20 images right: Wilson's 20 / (20 + t²), not a point; 18 answers an image count as one."""
    t = t_quantile(0.975, 19)
    for copies in (1, 18):
        images = [image for image in range(20) for _ in range(copies)]
        each = found(accuracy([1.0] * len(images), images))
        assert (each.high, each.standard_error) == (100, 0)
        assert each.low == pytest.approx(100 * 20 / (20 + t**2))
        assert found(accuracy([0.0] * len(images), images)).high == pytest.approx(100 - each.low)
    near = found(accuracy([1.0] * 29 + [0.0], list(range(30))))
    assert 0 < near.low < near.value < near.high < 100 and near.value - near.low > near.high - near.value


def test_without_two_images_there_is_no_interval() -> None:
    assert interval(accuracy([1, 0, 1], [0, 0, 0])) is None
    assert found(accuracy([1, 0], [0, 1])).low == pytest.approx(0, abs=1)  # two images say next to nothing


def test_a_full_score_that_hangs_on_one_image_has_an_interval() -> None:
    """Without the only image that has an object, recall and F1 are 0, though both answers are right."""
    rows = [Outcome(str(label), 1.0, ["categories/random"], {"yes": label, "label": label}) for label in (1.0, 0.0)]
    metrics = {each.name: each for each in TASKS["pope"].metrics(Outcomes.of(rows, ["1", "2"]))}
    for name, full in (("mean_f1", 100), ("pooled/recall", 1), ("categories/random/precision", 1)):
        each = found(metrics[name])
        assert each.value == each.high == full and 0 < each.low < full and each.standard_error > 0


def test_unbounded_metrics_have_the_t_interval() -> None:
    sums = np.array([[9, 8.0], [7, 9], [8, 8], [9, 9]])
    each = found(Metric("ratio", sums, ratio(100), None))
    assert each.high - each.value == pytest.approx(t_quantile(0.975, 3) * each.standard_error)
    assert each.detectable == pytest.approx(math.sqrt(2) * minimum_detectable(each.standard_error, 4))


def test_mcnemar_is_the_binomial_test_of_the_changed_questions() -> None:
    for gained, lost in ((0, 0), (5, 0), (3, 9), (9, 3), (12, 14)):
        total = gained + lost
        tail = sum(math.comb(total, k) for k in range(min(gained, lost) + 1)) / 2**total
        assert mcnemar(gained, lost) == pytest.approx(min(1, 2 * tail))
    assert mcnemar(5, 0) == 0.0625 and mcnemar(6, 0) < 0.05
    assert 0.13 < mcnemar(20000, 20300) < 0.14  # VQAv2, without overflow


def test_holm_adjusts_by_rank_and_never_lowers() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0} and holm({}) == {}


def f1(sums: np.ndarray) -> np.ndarray:
    return divide(2 * sums[..., 0], 2 * sums[..., 0] + sums[..., 1] + sums[..., 2])


def test_few_images_are_permuted_exhaustively_also_for_f1() -> None:
    random = np.random.default_rng(3)
    first, second = (random.integers(0, 6, (7, 3)).astype(float) for _ in range(2))
    metrics = [Metric("f1", sums, f1, (0, 1)) for sums in (first, second)]
    observed = abs(float(f1(second.sum(0)) - f1(first.sum(0))))
    extreme = 0
    for swaps in itertools.product((False, True), repeat=7):
        mask = np.array(swaps)[:, None]
        left, right = np.where(mask, second, first).sum(0), np.where(mask, first, second).sum(0)
        extreme += abs(float(f1(right) - f1(left))) >= observed - 1e-9
    assert permutation_test(*metrics) == pytest.approx(extreme / 2**7)


def test_the_permutation_test_sees_images_and_not_questions() -> None:
    """One image with 50 changed answers is one observation: p is 1; as many images are significant."""
    images = [image for image in range(30) for _ in range(50)]
    before, after = [0.0] * 1500, [1.0] * 50 + [0.0] * 1450
    assert permutation_test(accuracy(before, images), accuracy(after, images)) == 1
    assert mcnemar(50, 0) < 1e-10
    apart = list(range(1500))
    assert permutation_test(accuracy(before, apart), accuracy(after, apart)) == 1e-4  # the lowest of 9,999 swaps
    assert permutation_test(accuracy(before, apart), accuracy(before, apart)) == 1


def test_pairing_narrows_the_interval() -> None:
    random = np.random.default_rng(5)
    before = (random.random(400) < 0.6).astype(float)
    after = np.where(random.random(400) < 0.03, 1 - before, before)
    metrics = [accuracy(list(scores), list(range(400))) for scores in (before, after)]
    change = found(difference(*metrics))
    assert change.value == pytest.approx(metrics[1].estimate - metrics[0].estimate)
    assert change.standard_error == pytest.approx((100 * (after - before)).std(ddof=1) / 20, rel=1e-9)
    assert change.standard_error < 0.5 * found(metrics[0]).standard_error


def test_runs_are_paired_by_question_and_not_by_position() -> None:
    first = Outcomes.of([Outcome(each, each in "ab") for each in "abc"], ["1", "1", "2"])
    second = Outcomes.of([Outcome(each, each in "dc") for each in "dcba"], ["9", "8", "8", "8"])
    before, after = pair(first, second)
    assert before.ids == after.ids == ["a", "b", "c"]
    assert after.scores.tolist() == [0, 0, 1] and after.images.tolist() == before.images.tolist() == [0, 0, 1]
    result = compare_outcomes(TASKS["gqa"], first, second)
    assert (result.gained, result.lost, result.questions) == (["c"], ["a", "b"], 3)
    assert result.mcnemar == 1.0 and result.p_value == 1.0 and not result.significant
    with pytest.raises(DataError, match="no question in common"):
        pair(first, Outcomes.of([Outcome("x", 1)], ["1"]))


def test_rotations_are_compared_as_one_question() -> None:
    rows = [Outcome(f"{q}/{turn}", 1.0, ["categories/x"], unit=str(q)) for q in range(40) for turn in range(4)]
    first = Outcomes.of(rows, [row.unit for row in rows])
    wrong = [dataclasses.replace(row, score=float(not (row.id.endswith("/2") and int(row.unit) < 8))) for row in rows]
    result = compare_outcomes(TASKS["mmbench"], first, Outcomes.of(wrong, [row.unit for row in wrong]))
    assert (result.metric, result.first, result.second) == ("circular", 100, 80)
    assert result.lost == [f"{q}/0" for q in range(8)] and result.mcnemar == mcnemar(0, 8)
    assert result.p_value == mcnemar(0, 8) and result.detectable is not None and 15 < result.detectable < 25
    same = compare_outcomes(TASKS["mmbench"], first, first)
    assert (same.p_value, same.mcnemar, same.detectable, same.significant) == (1, 1, None, False)


SHAPES = {(shape.task, shape.note): shape for shape in coverage.shapes() if len(shape.outcomes.ids) < 20_000}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=[" ".join(key) for key in SHAPES])
def test_intervals_cover_the_true_scores_of_simulated_benchmarks(shape: coverage.Shape) -> None:
    """120 benchmarks each: at 95 %, fewer than 105 hits have a chance below 1 in 1,000."""
    covered, old, _ = coverage.simulate(shape, 120, seed=11)
    assert covered[TASKS[shape.task].metric] >= 105 / 120
    if shape.task in ("pope", "gqa", "mme") and "limit" not in shape.note:
        assert old < 0.8  # the band of independent questions


def test_paired_tests_reject_equal_models_rarely_and_find_the_detectable_difference() -> None:
    rates = coverage.paired_rates(80, seed=4, size=60, questions=5)
    assert rates["equal models, permutation test"] <= 0.15
    assert rates["equal models, interval of the difference"] <= 0.15
    assert rates["models apart by the detectable difference, permutation test"] >= 0.6
