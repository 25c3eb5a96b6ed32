"""Coverage of the confidence intervals, and errors of the paired tests: `python -m benchmarks.coverage`.

Simulates benchmarks in the shape of each task, in which images differ in difficulty, scores them by the task's own
metrics, and counts how often the 95 % interval contains the true score. The last columns are the band that takes
questions as independent (± one standard error of a proportion; ±20 for MME), and 1.96 times it.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from llava.eval.benchmarks.mme import GROUPS
from llava.eval.benchmarks.registry import TASKS, make_task
from llava.eval.outcomes import Outcomes, pair
from llava.eval.reporting.data import QUESTIONS, noise_band
from llava.eval.reporting.paired import compare_outcomes, primary_metric
from llava.eval.run.files import Row, write_jsonl
from llava.eval.uncertainty import Floats, difference, interval, jackknife, minimum_detectable

LEVEL = 0.95
Codes = NDArray[np.intp]
Truth = Mapping[str, float]  # true scores by the names of metrics
MME_IMAGES = {
    **dict.fromkeys(("existence", "count", "position", "color"), 30), "posters": 147, "celebrity": 170,
    **dict.fromkeys(("scene", "landmark", "artwork"), 200), "OCR": 20, "commonsense_reasoning": 70,
    **dict.fromkeys(("numerical_calculation", "text_translation", "code_reasoning"), 20),
}  # fmt: skip
POPE_FALSE_ALARMS = {"random": 0.03, "popular": 0.07, "adversarial": 0.12}


@dataclass(frozen=True)
class Shape:
    """A task with simulated answers: `draw` scores them anew, `truth` are the scores of the simulated model."""

    task: str
    outcomes: Outcomes
    truth: Truth
    draw: Callable[[Generator, Outcomes], Outcomes]
    note: str = ""


def beta(random: Generator, mean: float, correlation: float, size: int) -> Floats:
    """Probabilities of images such that answers about one image have this correlation."""
    spread = 1 / correlation - 1
    return random.beta(mean * spread, (1 - mean) * spread, size)


def table(images: Codes, units: Codes | None = None, groups: Mapping[str, Codes] | None = None) -> Outcomes:
    """Outcomes without scores; a group is given by its positions."""
    count = len(images)
    masks = {name: np.isin(np.arange(count), at) for name, at in (groups or {}).items()}
    units = np.arange(count) if units is None else units
    return Outcomes(list(map(str, range(count))), images, units, np.zeros(count), masks, {})


def spread_over(questions: int, images: int, seed: int = 0) -> Codes:
    """Image of each question: every image has one, the others are spread unevenly, as annotators do."""
    random = np.random.default_rng(seed)
    weights = random.gamma(4.0, size=images)
    return np.concatenate((np.arange(images), random.choice(images, questions - images, p=weights / weights.sum())))


def mean_shape(
    task: str, questions: int, images: int, mean: float, correlation: float, parts: Mapping[str, float] | None = None,
    soft: Sequence[float] = (1.0,), note: str = "",
) -> Shape:  # fmt: skip
    """A mean of scores; `parts` are groups with their share of the questions, `soft` the scores of a right answer."""
    clusters = spread_over(questions, images)
    random, groups = np.random.default_rng(1), {}
    for name, share in (parts or {}).items():
        groups[name] = random.choice(questions, max(2, int(share * questions)), replace=False)

    def draw(random: Generator, outcomes: Outcomes) -> Outcomes:
        right = random.random(questions) < beta(random, mean, correlation, images)[clusters]
        return replace(outcomes, scores=right * random.choice(soft, questions))

    score = 100 * mean * float(np.mean(soft))
    names = [TASKS[task].overall, *groups]
    return Shape(task, table(clusters, groups=groups), dict.fromkeys(names, score), draw, note)


def pope() -> Shape:
    """500 images with six questions in each of three categories, half of them about absent objects; 90 are missing."""
    images, category, label = (each.ravel() for each in np.indices((500, 3, 6)))
    keep = ~((category == 0) & (images % 50 < 9) & (label == 5))  # 90 questions of the random set
    images, category, label = images[keep], category[keep], label[keep] % 2
    names, hits, hard = list(POPE_FALSE_ALARMS), (0.6, 0.88), 0.25
    groups = {f"categories/{name}": np.flatnonzero(category == at) for at, name in enumerate(names)}
    empty = table(images, groups=groups)
    alarms = np.array(list(POPE_FALSE_ALARMS.values()))[category]

    def draw(random: Generator, outcomes: Outcomes) -> Outcomes:
        difficult = (random.random(500) < hard)[images]
        chance = np.where(label, np.where(difficult, *hits), alarms * np.where(difficult, 2.2, 0.6))
        yes = (random.random(len(images)) < chance).astype(float)
        return replace(outcomes, scores=(yes == label).astype(float), values={"yes": yes, "label": label.astype(float)})

    truth, hit = {}, hard * hits[0] + (1 - hard) * hits[1]
    for at, name in enumerate(names):
        share, alarm = float(label[category == at].mean()), POPE_FALSE_ALARMS[name]
        saying = hit * share + alarm * (1 - share)
        rates = {"accuracy": hit * share + (1 - alarm) * (1 - share), "precision": hit * share / saying, "recall": hit}
        rates |= {"f1": 2 * hit * share / (saying + share), "yes_ratio": saying}
        truth |= {f"categories/{name}/{rate}": value for rate, value in rates.items()}
    mean = 100 * sum(truth[f"categories/{name}/f1"] for name in names) / 3
    return Shape("pope", empty, {"mean_f1": mean, **truth}, draw, "18 questions an image")


def mme() -> Shape:
    """Pairs of questions about 1,187 images in 14 tasks of 20 to 200 images."""
    correlation, names = 0.2, list(MME_IMAGES)
    means = dict(zip(names, np.linspace(0.95, 0.6, len(names))))
    tasks = np.repeat(np.arange(len(names)), [2 * count for count in MME_IMAGES.values()])
    images = np.arange(len(tasks)) // 2
    groups = {f"tasks/{name}": np.flatnonzero(tasks == at) for at, name in enumerate(names)}

    def draw(random: Generator, outcomes: Outcomes) -> Outcomes:
        chance = np.concatenate([beta(random, means[name], correlation, MME_IMAGES[name]) for name in names])
        return replace(outcomes, scores=(random.random(len(images)) < chance[images]).astype(float))

    both = {name: mean**2 + correlation * mean * (1 - mean) for name, mean in means.items()}
    scores = {name: 100 * (means[name] + both[name]) for name in names}
    truth = {group: sum(scores[name] for name in members) for group, members in GROUPS.items()}
    for name in names:
        found = {"acc": means[name], "acc+": both[name], "score": scores[name]}
        truth |= {f"tasks/{name}/{key}": value for key, value in found.items()}
    return Shape("mme", table(images, images, groups), truth, draw, "pairs; tasks of 20 to 200 images")


def mmbench() -> Shape:
    """1,164 questions about 1,050 images, each asked in two to four rotations that must all be answered."""
    mean, correlation, questions = 0.72, 0.6, 1164
    of_question = spread_over(questions, 1050)
    turns = np.random.default_rng(2).choice([2, 3, 4], questions, p=[0.08, 0.08, 0.84])
    units = np.repeat(np.arange(questions), turns)
    images = of_question[units]
    first = np.concatenate(([True], np.diff(units) > 0))
    part = np.flatnonzero(units % 20 == 0)  # a category of 59 questions
    empty = table(images, units, {"categories/one of 20": part})

    def draw(random: Generator, outcomes: Outcomes) -> Outcomes:
        right = random.random(len(units)) < beta(random, mean, correlation, 1050)[images]
        return replace(outcomes, scores=right.astype(float), values={"vanilla": np.where(first, right, np.nan)})

    spread = 1 / correlation - 1
    power = {k: math.prod((mean * spread + i) / (spread + i) for i in range(k)) for k in (2, 3, 4)}  # E[p ** k]
    chances = np.array([power[k] for k in turns])
    truth = {"circular": 100 * chances.mean(), "categories/one of 20": 100 * chances[::20].mean()}
    return Shape("mmbench", empty, {**truth, "vanilla": 100 * mean}, draw, "circular, 2 to 4 rotations")


def mm_vet() -> Shape:
    """Grades in tenths, many of them 0 or 1, for 218 questions about 200 images."""
    images = spread_over(218, 200)

    def draw(random: Generator, outcomes: Outcomes) -> Outcomes:
        return replace(outcomes, scores=random.binomial(10, beta(random, 0.35, 0.5, 200)[images]) / 10)

    ocr = np.flatnonzero(np.arange(218) % 3 == 0)
    empty = table(images, groups={"capabilities/ocr": ocr})
    return Shape("mm_vet", empty, {"accuracy": 35.0, "capabilities/ocr": 35.0}, draw, "grades in tenths")


def llava_bench(task: str, questions: int, images: int) -> Shape:
    """Ratios of scores from 1 to 10 by a judge; the score of an easy image rises on both sides."""
    clusters = np.arange(questions) * images // questions

    def draw(random: Generator, outcomes: Outcomes) -> Outcomes:
        chance = beta(random, 0.65, 0.1, images)[clusters]
        model, reference = 1 + random.binomial(9, chance), 7 + random.binomial(3, 0.3 + 0.5 * chance)
        return replace(outcomes, scores=model / 10, values={"reference": reference * 1.0})

    first, second = 7 + 3 * (0.3 + 0.5 * 0.65), 1 + 9 * 0.65
    truth = {"accuracy": 100 * second / first, "means/all/0": first, "means/all/1": second}
    return Shape(task, table(clusters), truth, draw, "ratio of a judge's scores")


def shapes() -> list[Shape]:
    """One benchmark per task. Images of SEED-Bench, TextVQA and MMBench are the counts assumed here."""
    soft = (1.0,) * 7 + (0.9, 0.6, 0.3)
    types = {"groups/query/accuracy": 0.53, "groups/compare/accuracy": 0.05}
    return [
        mean_shape("vqav2", 107394, 36807, 0.9, 0.1, soft=soft, note="soft accuracy"),
        mean_shape("gqa", 12578, 398, 0.633, 0.05, types, note="31.6 questions an image"),
        mean_shape("vizwiz", 8000, 8000, 0.6, 0.1, soft=soft, note="one question an image"),
        mean_shape("science_qa", 4241, 4241, 0.7, 0.1, {"img_accuracy": 0.4756}, note="one question an image"),
        mean_shape("textvqa", 5000, 3166, 0.7, 0.2, soft=soft, note="soft accuracy"),
        pope(),
        mme(),
        mmbench(),
        mean_shape("seed", 19242, 9000, 0.62, 0.1, {"types/smallest": 0.005, "kinds/video": 0.26}, note="12 types"),
        llava_bench("llava_bench", 60, 24),
        llava_bench("llava_bench_coco", 90, 30),
        mm_vet(),
        mean_shape("easy_vqa", 9673, 1000, 0.88, 0.1, {"open/accuracy": 0.3, "per_answer/red": 0.03}),
        mean_shape("gqa", 100, 50, 0.97, 0.1, note="--limit 100, near 100 %"),
    ]


def band(shape: Shape, score: float) -> float:
    """The band that takes questions as independent."""
    column = TASKS[shape.task].column
    if column in QUESTIONS and "limit" not in shape.note:
        return noise_band(column, score)
    share = min(max(score / 100, 0.0), 1.0)
    return 100 * math.sqrt(share * (1 - share) / len(shape.outcomes.ids))


def simulate(shape: Shape, count: int, seed: int = 0) -> tuple[dict[str, float], float, float]:
    """Coverage of each metric's interval, of the old band, and of 1.96 times the old band."""
    random, task = np.random.default_rng(seed), TASKS[shape.task]
    hits, old = dict.fromkeys(shape.truth, 0), np.zeros(2)
    for _ in range(count):
        outcomes = shape.draw(random, shape.outcomes)
        found = {metric.name: interval(metric) for metric in task.metrics(outcomes)}
        for name, true in shape.truth.items():
            each = found[name]
            hits[name] += each is not None and each.low <= true <= each.high
        name = primary_metric(task, outcomes).name
        error = abs(found[name].value - shape.truth[name])  # type: ignore[union-attr]
        old += error <= band(shape, found[name].value) * np.array([1, 1.96])  # type: ignore[union-attr]
    return {name: hit / count for name, hit in hits.items()}, *(old / count)


def paired_rates(count: int, seed: int = 0, size: int = 500, questions: int = 18) -> dict[str, float]:
    """Shares of pairs of runs found different at 5 %: equal models, and models apart by the detectable difference.

    Both runs answer half of the questions alike, but find other images difficult: 30 % have probabilities of their own.
    """
    random, images = np.random.default_rng(seed), np.repeat(np.arange(size), questions)
    empty, task = table(images), TASKS["gqa"]

    def runs(gap: float) -> tuple[Outcomes, Outcomes]:
        first, other = (beta(random, 0.7 - gap / 2, 0.15, size) for _ in range(2))
        second = np.where(random.random(size) < 0.3, other, first)
        same, draws = random.random(len(images)) < 0.5, random.random((2, len(images)))
        draws[1] = np.where(same, draws[0], draws[1])
        gained = random.random(len(images)) < gap / (0.3 + gap / 2)  # of the answers that would be wrong
        answers = draws[0] < first[images], (draws[1] < second[images]) | gained
        return pair(*(replace(empty, scores=right.astype(float)) for right in answers))

    def spread(gap: float) -> float:
        metrics = [[primary_metric(task, each) for each in runs(gap)] for _ in range(20)]
        return float(np.mean([jackknife(difference(*each))[1] for each in metrics]))

    gap = minimum_detectable(spread(0), size) / 100
    gap, rates = minimum_detectable(spread(gap), size) / 100, {}
    for name, apart in (("equal models", 0.0), ("models apart by the detectable difference", gap)):
        found = [compare_outcomes(task, *runs(apart)) for _ in range(count)]
        inside = [each.difference is not None and each.difference.low <= 0 <= each.difference.high for each in found]
        rates[f"{name}, permutation test"] = float(np.mean([each.p_value < 0.05 for each in found]))
        rates[f"{name}, interval of the difference"] = 1 - float(np.mean(inside))
        rates[f"{name}, McNemar"] = float(np.mean([each.mcnemar is not None and each.mcnemar < 0.05 for each in found]))
    return rates


def rescoring_seconds(folder: Path, count: int = 10_000) -> float:
    """Seconds to score a finished run of POPE with this number of answers and all intervals."""
    labels: dict[str, list[Row]] = {name: [] for name in POPE_FALSE_ALARMS}
    questions: list[Row] = []
    for number in range(count):
        name = list(labels)[number % 3]
        row = {"image": f"{number // 18}.jpg", "text": f"Is there a thing {number} in the image?"}
        labels[name].append({**row, "label": "yes" if number % 2 else "no"})
        questions.append({**row, "question_id": number, "category": name})
    for name, rows in labels.items():
        write_jsonl(folder / "coco" / f"coco_pope_{name}.json", rows)
    write_jsonl(folder / "llava_pope_test.jsonl", questions)
    (folder / "val2014" / "images").mkdir(parents=True)
    texts = ("Yes", "No", "No", "Yes", "yes", "There is none.", "Yes, there is.")
    answers = [
        {"question_id": row["question_id"], "prompt": row["text"], "text": texts[at % 7], "metadata": {}}
        for at, row in enumerate(questions)
    ]
    write_jsonl(folder / "run" / "answers.jsonl", answers)
    start = time.perf_counter()
    scores = make_task("pope", folder).score(folder / "run" / "answers.jsonl")
    seconds = time.perf_counter() - start
    assert scores["answers"] == count and len(scores["intervals"]) == 22
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__)
    parser.add_argument("tasks", nargs="*", help="default: all")
    parser.add_argument("--count", type=int, default=2000, help="simulated benchmarks of each shape (%(default)s)")
    parser.add_argument("--pairs", type=int, default=1000, help="simulated pairs of runs (%(default)s)")
    args = parser.parse_args(argv)
    print("| benchmark | questions, images | 95 % interval | lowest and highest of all metrics | old band | 1.96 x |")
    print("|---|---|---|---|---|---|")
    inside = True
    for shape in shapes():
        if args.tasks and shape.task not in args.tasks:
            continue
        coverage, old, wide = simulate(shape, args.count)
        first, others = coverage[TASKS[shape.task].metric], sorted(coverage.values())
        inside &= 0.94 <= first <= 0.96 or "limit" in shape.note
        size = f"{len(shape.outcomes.ids):,}, {shape.outcomes.images.max() + 1:,}"
        ends = f"{others[0]:.1%} {others[-1]:.1%}" if len(others) > 1 else ""
        label = f"{shape.task} ({shape.note})" if shape.note else shape.task
        print(f"| {label} | {size} | {first:.1%} | {ends} | {old:.1%} | {wide:.1%} |", flush=True)
    if args.pairs and not args.tasks:
        for name, rate in paired_rates(args.pairs).items():
            print(f"{name}: {rate:.1%} of {args.pairs} found different")
    with tempfile.TemporaryDirectory() as folder:
        print(f"scoring 10,000 answers to POPE with all intervals: {rescoring_seconds(Path(folder)):.2f} s")
    return 0 if inside else 1


if __name__ == "__main__":
    raise SystemExit(main())
