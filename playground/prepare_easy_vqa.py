"""Write the easy-VQA benchmark as LLaVA-format files under `playground/data/easy_vqa`.

    python -m playground.prepare_easy_vqa [--output playground/data/easy_vqa] [--turns 6]

| file | content |
|---|---|
| `train/*.png`, `test/*.png` | the 4,000 and 1,000 pictures, copied from the package `easy-vqa` (MIT) |
| `labels.json` | shape and colour of each training picture, as far as its questions tell |
| `pretrain.json` | stage 1: a caption of each picture whose shape and colour are both known |
| `finetune.json` | stage 2: balanced training questions of a picture as conversations of about `--turns` rounds |

Nothing here reads the test questions; `llava eval --tasks easy_vqa` does.
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

from llava.errors import DataError
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
    """What a question and its answer say for certain: `{"shape": …}`, `{"color": …}`, both or neither.

    "what color is the circle?" / "red" tells both; "is there not a red shape?" / "no" tells the colour.
    """
    words = question.rstrip("?").split()
    negated = "not" in words or "no" in words
    affirmed = answer not in YES_NO or (answer == "yes") != negated
    stated = [*words, answer] if affirmed else []
    return {kind: word for kind, values in VALUES.items() for word in stated if word in values}


def label_images(questions: Iterable[Question]) -> dict[int, Labels]:
    """Collect the facts of every picture; two questions that contradict each other are an error."""
    labels: dict[int, Labels] = defaultdict(dict)
    for question, answer, image in questions:
        for kind, value in facts(question, answer).items():
            if labels[image].setdefault(kind, value) != value:
                raise DataError(f"Picture {image} is called {labels[image][kind]} and {value}; reinstall: {INSTALL}")
    return dict(labels)


def balance(questions: Iterable[Question], seed: int = 0) -> list[Question]:
    """As many "yes" as "no" for every question text; open questions stay. The result is in random order.

    Four in five yes/no questions can be guessed from their wording; what is left is worth a look at the picture.
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
    random.Random(seed).shuffle(kept)  # what was left out stood early: without this, "no" would come late
    return kept


def record(image: int, rounds: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """One training example; the first human turn carries the picture."""
    turns: list[dict[str, str]] = []
    for question, answer in rounds:
        prefix = "" if turns else "<image>\n"
        turns += [{"from": "human", "value": prefix + question}, {"from": "gpt", "value": answer}]
    return {"id": image, "image": f"train/{image}.png", "conversations": turns}


def conversations(questions: Iterable[Question], limit: int, seed: int = 0) -> list[dict[str, Any]]:
    """The questions of each picture, cut evenly into conversations of `limit` rounds or somewhat fewer.

    Within one they keep their random order: where an open question comes first its answer helps with yes and no, and
    where it comes later the picture must.
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


def prepare(source: Path, output: Path, turns: int) -> str:
    """Write every file of the table above and return a one-line summary."""
    questions = [tuple(row) for row in json.loads((source / "train/questions.json").read_text(encoding="utf-8"))]
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
    return f"{len(captions)} captions, and {len(balanced)} of {len(questions)} questions on {len(labels)} pictures"


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=EASY_VQA)
    parser.add_argument("--turns", type=int, default=6, help="questions in a stage-2 conversation")
    args = parser.parse_args(argv)
    print(prepare(package_directory("easy_vqa", INSTALL) / "data", args.output, args.turns))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
