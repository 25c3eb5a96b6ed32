"""Compare 8-bit and 4-bit answers with full precision: `python -m benchmarks.agreement CHECKPOINT`.

Asks evenly spaced questions of the easy-VQA test split. Exits with status 1 if fewer than 98 % (8 bit) or 95 % (4 bit)
of the answers agree.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from llava.conversation import get_template, stop_strings, template_for
from llava.engine import Engine, Request, SamplingParams, load_engine
from llava.engine.chat import render_question
from llava.eval.benchmarks.easy_vqa import EasyVQA
from llava.images import open_image
from llava.utils import guarded

LEAST: Final = {8: 98.0, 4: 95.0}


def answers(checkpoint: str, bits: int, task: EasyVQA, count: int) -> list[str]:
    """Greedy answers to `count` questions with weights of `bits` bits; 32 means unquantized."""
    engine = load_engine(checkpoint, load_8bit=bits == 8, load_4bit=bits == 4)
    return [completion.text for completion in engine.generate(requests_for(engine, checkpoint, task, count))]


def requests_for(engine: Engine, checkpoint: str, task: EasyVQA, count: int | None) -> list[Request]:
    """Greedy requests for `count` evenly spaced questions of the task (default: all), in the model's template."""
    config = engine.model.config
    template = get_template(template_for(config, Path(checkpoint).name, None))
    params = SamplingParams(max_new_tokens=task.max_new_tokens, stop=stop_strings(template))
    requests = []
    for question in task.questions(count):
        image = open_image(task.image_folder / question.images[0])
        requests.append(Request(render_question(template, question.prompt, 1, config), [image], params))
    return requests


def agreement(checkpoint: str, count: int, data_root: Path | None = None) -> dict[int, float]:
    """Percentage of answers identical to full precision, by number of bits."""
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
