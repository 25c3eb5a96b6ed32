"""How often 8- and 4-bit answers are those of full precision: `python -m benchmarks.agreement CHECKPOINT`.

The questions are easy-VQA's test questions, evenly spread. Exit status 1 when 8 bits agree on less than 97 % or 4 bits
on less than 90 % of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from PIL import Image

from llava.conversation import get_template, stop_strings, template_for
from llava.engine import Engine, Request, SamplingParams, load_engine
from llava.engine.chat import render_question
from llava.eval.benchmarks.easy_vqa import EasyVQA
from llava.utils import guarded

LEAST: Final = {8: 97.0, 4: 90.0}


def answers(checkpoint: str, bits: int, task: EasyVQA, count: int) -> list[str]:
    """The model's greedy answers to `count` questions, its weights packed to `bits` (32: not at all)."""
    engine = load_engine(checkpoint, load_8bit=bits == 8, load_4bit=bits == 4)
    return [completion.text for completion in engine.generate(requests_for(engine, checkpoint, task, count))]


def requests_for(engine: Engine, checkpoint: str, task: EasyVQA, count: int | None) -> list[Request]:
    """`count` of the task's questions, evenly spread, or all of them, as the model's template has them; greedy."""
    config = engine.model.config
    template = get_template(template_for(config, Path(checkpoint).name, None))
    params = SamplingParams(max_new_tokens=task.max_new_tokens, stop=stop_strings(template))
    requests = []
    for question in task.questions(count):
        with Image.open(task.image_folder / question.images[0]) as file:
            picture = file.convert("RGB")
        requests.append(Request(render_question(template, question.prompt, 1, config), [picture], params))
    return requests


def agreement(checkpoint: str, count: int, data_root: Path | None = None) -> dict[int, float]:
    """Per cent of the answers that are the same as in full precision, by bits."""
    task = EasyVQA(data_root, "test")
    full = answers(checkpoint, 32, task, count)
    found = {}
    for bits in LEAST:
        packed = answers(checkpoint, bits, task, count)
        found[bits] = 100.0 * sum(one == other for one, other in zip(full, packed, strict=True)) / len(full)
    return found


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agreement", description=__doc__)
    parser.add_argument("checkpoint", help="directory of a chat checkpoint")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--data-root", type=Path, help="easy-VQA's data folder (default: the installed package's)")
    arguments = parser.parse_args(argv)
    found = agreement(arguments.checkpoint, arguments.questions, arguments.data_root)
    for bits, share in found.items():
        print(f"{bits} bits: {share:.1f} % of {arguments.questions} answers agree (at least {LEAST[bits]:.0f} wanted)")
    return int(any(share < LEAST[bits] for bits, share in found.items()))


if __name__ == "__main__":
    sys.exit(main())
