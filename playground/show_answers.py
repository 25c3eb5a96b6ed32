"""Print questions on three test images with the model's and the reference answers, and save them as an image.

    python -m playground.show_answers work_dirs/finetune_quickstart/eval [--output work_dirs/quickstart/answers.png]

The answers are read from the output directory of `llava eval --tasks easy_vqa`. The images are at one, three and five
sixths of the file, independently of the answers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from llava.errors import DataError
from llava.eval.benchmarks.easy_vqa import normalize
from llava.utils import guarded, require
from playground.assets import package_directory
from playground.prepare_easy_vqa import INSTALL

IMAGES = 3
QUESTIONS = 4  # per image, at most


class Answer(NamedTuple):
    image: int
    question: str
    text: str
    truth: str

    @property
    def line(self) -> str:
        verdict = "right" if normalize(self.text) == normalize(self.truth) else "WRONG"
        return f"{self.question}  {self.text}  (truth: {self.truth}, {verdict})"


def read(file: Path, questions: Sequence[Sequence[Any]]) -> list[list[Answer]]:
    """Answers of a file, grouped by image, in order."""
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise DataError(f"Cannot read answers {file}; run llava eval --tasks easy_vqa first.") from error
    answers = []
    for row in rows:
        question, truth, image = questions[int(row["question_id"])]
        answers.append(Answer(image, question, row["text"], truth))
    return [list(group) for _, group in groupby(answers, key=lambda answer: answer.image)]


def choose(groups: Sequence[list[Answer]]) -> list[list[Answer]]:
    count = len(groups)
    return [groups[(2 * k + 1) * count // (2 * IMAGES)][:QUESTIONS] for k in range(min(IMAGES, count))]


def draw(chosen: Sequence[list[Answer]], images: Path, output: Path) -> None:
    require("matplotlib", "playground").use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(chosen), figsize=(4.6 * len(chosen), 5), squeeze=False)
    for axis, answers in zip(axes[0], chosen):
        with Image.open(images / f"{answers[0].image}.png") as image:
            axis.imshow(image.convert("RGB"))
        axis.set_axis_off()
        axis.set_title("\n".join(answer.line for answer in answers), fontsize=8, loc="left")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(output, dpi=110)
    pyplot.close(figure)


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("eval_dir", type=Path, help="--output-dir of llava eval")
    parser.add_argument("--output", type=Path, default=Path("work_dirs/quickstart/answers.png"))
    args = parser.parse_args(argv)
    data = package_directory("easy_vqa", INSTALL) / "data/test"
    questions = json.loads((data / "questions.json").read_text(encoding="utf-8"))
    chosen = choose(read(args.eval_dir / "easy_vqa/answers.jsonl", questions))
    for answers in chosen:
        print(f"test image {answers[0].image}")
        for answer in answers:
            print(f"  {answer.line}")
    draw(chosen, data / "images", args.output)
    print(f"saved as {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
