"""Convert the easy-VQA benchmark to LLaVA's format in `playground/data/easy_vqa`.

    python -m playground.prepare_easy_vqa [--output playground/data/easy_vqa] [--turns 6] [--hold-out "teal triangle"]

| file | content |
|---|---|
| `train/*.png`, `test/*.png` | the 4,000 and 1,000 images, copied from the package `easy-vqa` (MIT) |
| `labels.json` | shape and color of each training image, as far as its questions reveal them |
| `pretrain.json` | stage 1: a caption of each image whose shape and color are known |
| `finetune.json` | stage 2: balanced training questions, in conversations of about `--turns` rounds per image |

The test questions are not read here; `llava eval --tasks easy_vqa` reads them.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llava.errors import ConfigError, DataError
from llava.utils import guarded
from playground.assets import EASY_VQA, package_directory, staged

INSTALL = "pip install easy-vqa==1.0"
SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
VALUES = {"shape": SHAPES, "color": COLORS}
YES_NO = {"yes": "no", "no": "yes"}
Question = tuple[str, str, int]
Labels = dict[str, str]


def facts(question: str, answer: str) -> Labels:
    """Facts implied by a question and its answer: `{"shape": …}`, `{"color": …}`, both or none.

    "what color is the circle?" / "red" implies both; "is there not a red shape?" / "no" implies the color.
    """
    words = question.rstrip("?").split()
    negated = "not" in words or "no" in words
    affirmed = answer not in YES_NO or (answer == "yes") != negated
    stated = [*words, answer] if affirmed else []
    return {kind: word for kind, values in VALUES.items() for word in stated if word in values}


def label_images(questions: Iterable[Question]) -> dict[int, Labels]:
    """Facts of each image; raises `DataError` for contradicting questions."""
    labels: dict[int, Labels] = defaultdict(dict)
    for question, answer, image in questions:
        for kind, value in facts(question, answer).items():
            if labels[image].setdefault(kind, value) != value:
                raise DataError(
                    f"The {kind} of image {image} is both {labels[image][kind]} and {value}; reinstall: {INSTALL}"
                )
    return dict(labels)


def hold_out(questions: Iterable[Question], labels: dict[int, Labels], pair: str) -> list[Question]:
    """The questions about images that are known not to show a pair of color and shape, such as "teal triangle"."""
    color, _, shape = pair.partition(" ")
    if color not in COLORS or shape not in SHAPES:
        raise ConfigError(
            f"--hold-out must be a color and a shape, such as 'teal triangle', got {pair!r}; colors: "
            f"{', '.join(COLORS)}; shapes: {', '.join(SHAPES)}."
        )
    found = {"color": color, "shape": shape}
    shown = {
        image
        for image, known in labels.items()
        if any(known.get(kind, value) != value for kind, value in found.items())
    }
    return [row for row in questions if row[2] in shown]


def balance(questions: Iterable[Question], seed: int = 0) -> list[Question]:
    """Shuffle the questions and drop some, so that each yes/no question has as many "yes" as "no" answers.

    Without balancing, four in five of these questions can be answered from their text alone.
    """
    pool = list(questions)
    random.Random(seed).shuffle(pool)
    counts = Counter((question, answer) for question, answer, _ in pool)
    kept = []
    for question, answer, image in pool:
        opposite = YES_NO.get(answer)
        if opposite is None or counts[question, answer] <= counts[question, opposite]:
            kept.append((question, answer, image))
        else:
            counts[question, answer] -= 1
    random.Random(seed).shuffle(kept)  # the dropped questions came first
    return kept


def record(image: int, rounds: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """A training record; the image is in the first human turn."""
    turns: list[dict[str, str]] = []
    for question, answer in rounds:
        prefix = "" if turns else "<image>\n"
        turns += [{"from": "human", "value": prefix + question}, {"from": "gpt", "value": answer}]
    return {"id": image, "image": f"train/{image}.png", "conversations": turns}


def conversations(questions: Iterable[Question], limit: int, seed: int = 0) -> list[dict[str, Any]]:
    """Split the questions of each image evenly into conversations of at most `limit` rounds, in random order.

    The order matters: after an open question its answer helps with yes/no questions, before it the image must.
    """
    by_image: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, image in questions:
        by_image[image].append((question, answer))
    cuts = []
    for image, rounds in sorted(by_image.items()):
        parts = math.ceil(len(rounds) / limit)
        cuts += [(image, rounds[part::parts]) for part in range(parts)]
    even = [cut for cut in cuts if len(cut[1]) >= limit * 2 // 3]
    random.Random(seed).shuffle(even)
    return [record(image, rounds) for image, rounds in even]


def prepare(source: Path, output: Path, turns: int, pair: str | None = None) -> str:
    """Write the files of the table above, without images of a `pair` to hold out; returns a one-line summary."""
    questions = [tuple(row) for row in json.loads((source / "train/questions.json").read_text(encoding="utf-8"))]
    if pair:
        questions = hold_out(questions, label_images(questions), pair)
    labels = label_images(questions)
    complete = {image: found for image, found in labels.items() if len(found) == len(VALUES)}
    balanced = balance(questions)
    captions = [(image, f"a {found['color']} {found['shape']}") for image, found in sorted(complete.items())]
    files = {
        "labels.json": {str(image): found for image, found in labels.items()},
        "pretrain.json": [record(image, [("", text)]) for image, text in captions],
        "finetune.json": conversations(balanced, turns),
    }
    with staged(output) as stage:
        for split in ("train", "test"):
            shutil.copytree(source / split / "images", stage / split, ignore=shutil.ignore_patterns(".*"))
        for name, content in files.items():
            (stage / name).write_text(json.dumps(content, indent=0), encoding="utf-8")
    return f"{len(captions)} captions, and {len(balanced)} of {len(questions)} questions on {len(labels)} images"


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=EASY_VQA)
    parser.add_argument("--turns", type=int, default=6, help="questions per stage-2 conversation")
    parser.add_argument(
        "--hold-out", metavar="'COLOR SHAPE'", help="leave images of this pair out of the training data"
    )
    args = parser.parse_args(argv)
    print(prepare(package_directory("easy_vqa", INSTALL) / "data", args.output, args.turns, args.hold_out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
