"""What a recipe needs before it is paid for: `llava estimate RECIPE.sh --gpus 8 --gpu-memory 80 [FLAG ...]`.

Prints the memory of one GPU by part and the hours of the run. Flags go to the recipe as in training. Models that are on
this disk are read, those of the published recipes are known by name. docs/Scaling.md explains every term.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from llava.errors import ConfigError, LlavaError
from llava.train import sizes
from llava.train.flops import Shape, Trainable, step_flops
from llava.utils import guarded

GIB: Final = 2**30
LIVE: Final = 10**9  # parameters that ZeRO-3 holds gathered at a time: stage3_max_live_parameters of the shipped file
CONTEXT: Final = 1.5 * GIB  # the driver's own, NCCL's buffers
FRAGMENTED: Final = 0.05  # of what tensors take, lost between the allocator's blocks
# By ZeRO stage, what makes the published 13B runs (stage 1 5.5 h, stage 2 20 h, on 8 x A100) last as long as they did.
# One number a stage; the published 7B runs (3.5 h and 10 h) are no part of it and are what the tests hold it against.
MFU: Final = {0: 0.35, 1: 0.35, 2: 0.35, 3: 0.228}
ADAPTED: Final = 7  # linear layers of a decoder layer that carry an adapter


@dataclass(frozen=True)
class Setup:
    """One run as its memory sees it. `width` is bytes a number in compute; `supervised` a share of the positions."""

    shape: Shape
    learns: Trainable
    rows: int
    text: float
    images: float = 1.0
    supervised: float = 0.2
    width: int = 2
    bits: int = 16
    stage: int = 0
    engine: bool = False
    offload: bool = False
    gpus: int = 1
    checkpointing: bool = False
    dropout: bool = False
    accumulation: int = 1
    foreach: bool = True

    @property
    def positions(self) -> float:
        """Of the language model, in one micro-batch, images expanded."""
        return self.rows * (self.text + self.images * self.shape.image_tokens)

    @property
    def trainable(self) -> int:
        shape, learns = self.shape, self.learns
        language = learns.adapters or (shape.language_weights if learns.language else 0)
        return language + learns.projector * shape.projector_weights + learns.tower * shape.tower_weights


def weights(setup: Setup) -> float:
    """Bytes of all weights on one GPU, masters apart; packed decoders take their bits and their scales."""
    shape = setup.shape
    decoder = shape.layers * shape.layer_weights
    packed = {4: 0.5 + 1 / 64, 8: 1.0, 16: float(setup.width)}[setup.bits]
    frozen = {
        "decoder": decoder * packed,
        "rest": (shape.language_weights - decoder) * setup.width,
        "projector": shape.projector_weights * setup.width,
        "tower": shape.tower_weights * setup.width,
    }
    total = sum(frozen.values())
    if not setup.engine:  # what learns is its own float32 master
        total += setup.trainable * (4 - (0 if setup.learns.adapters else setup.width))
    elif setup.learns.adapters:
        total += setup.learns.adapters * setup.width
    if setup.stage == 3:
        gathered = min(LIVE, total / setup.width) * setup.width
        return (0 if setup.offload else total / setup.gpus) + gathered
    return total


def gradients(setup: Setup) -> float:
    """Bytes of gradients: 16 bits under DeepSpeed, shared out from stage 2 on; float32 elsewhere."""
    width = setup.width if setup.engine else 4
    return setup.trainable * width / (setup.gpus if setup.stage >= 2 else 1)


def optimizer(setup: Setup) -> float:
    """Bytes of Adam's two moments and, under DeepSpeed, of the masters."""
    if setup.offload:
        return 0.0
    return setup.trainable * (12 / (setup.gpus if setup.stage else 1) if setup.engine else 8)


def step_room(setup: Setup) -> float:
    """Bytes of the optimizer's temporaries while it steps."""
    if setup.offload:
        return 0.0
    if setup.engine:
        return setup.trainable * 4 / (setup.gpus if setup.stage else 1)
    if setup.foreach:
        return setup.trainable * 4.0
    shape = setup.shape
    largest = shape.vocabulary * shape.hidden if setup.learns.language and not setup.learns.adapters else 0
    return 2 * 4.0 * largest


def layer_activations(setup: Setup) -> float:
    """Bytes that one decoder layer saves for the backward pass, for all positions.

    Norms save their input (a float32 copy in 16 bit); attention query, key, value and output; the MLP gate and up
    projection. Layers whose weights learn save what they multiply as well.
    """
    shape, width = setup.shape, setup.width
    adapters = bool(setup.learns.adapters)
    full = setup.learns.language and not adapters
    hidden, intermediate = shape.hidden, shape.intermediate
    a_position = 2 * 4 * hidden + width * (4 * hidden + 2 * intermediate)
    if full or adapters:  # inputs of q, k, v together, of o, of gate and up together, of down
        a_position += width * (3 * hidden + intermediate)
    if full:  # the normed rows, for the gradient of a norm's weight
        a_position += width * 2 * hidden
    if adapters and setup.dropout:  # each adapter drops out on its own: a copy and a mask
        a_position += (4 + 1) * (6 * hidden + intermediate) - width * (3 * hidden + intermediate)
    return setup.positions * a_position


def saved(setup: Setup) -> float:
    """Bytes that forward leaves for backward: of every layer, or with checkpointing the layers' inputs."""
    shape, width = setup.shape, setup.width
    positions = setup.positions
    around = positions * width * 3 * shape.hidden  # the rows before and after the splice, the last norm
    pictures = setup.rows * setup.images * shape.image_tokens * width * (shape.tower_hidden + 3 * shape.hidden)
    layer = positions * width * shape.hidden if setup.checkpointing else layer_activations(setup)
    return around + pictures + shape.layers * layer


def activations(setup: Setup) -> float:
    """What forward leaves and, with checkpointing, the layer that backward computes again."""
    if not setup.checkpointing:
        return saved(setup)
    gradients_inside = setup.positions * setup.width * 2 * setup.shape.intermediate
    return saved(setup) + layer_activations(setup) + gradients_inside


def logits(setup: Setup) -> float:
    """Bytes of three float32 tables at the supervised positions: log-softmax, its gradient, and that of the logits."""
    return setup.positions * setup.supervised * setup.shape.vocabulary * 12


def tower(setup: Setup) -> float:
    """Bytes of the tower at work: one layer when it is frozen, all that it saves when it learns."""
    shape, width = setup.shape, setup.width
    positions = setup.rows * setup.images * shape.tower_positions
    one = positions * width * (2 * shape.tower_hidden + 2 * shape.tower_intermediate)
    if not setup.learns.tower:
        return one
    saved = positions * width * (9 * shape.tower_hidden + 2 * shape.tower_intermediate)
    return one + saved if setup.checkpointing else shape.tower_layers * saved


def parts(setup: Setup) -> dict[str, float]:
    """Bytes by part; not all of them exist at the same moment, see `peak`."""
    return {
        "weights": weights(setup),
        "gradients": gradients(setup),
        "optimizer": optimizer(setup),
        "activations": activations(setup),
        "logits": logits(setup),
        "tower at work": tower(setup),
    }


def peak(setup: Setup) -> float:
    """Bytes at the worst moment: the tower at work, the loss, backward's first layer, or the optimizer's step.

    Gradients of earlier micro-batches, and the flat buffers of ZeRO, are there all the time; otherwise they come as
    activations go.
    """
    part = parts(setup)
    kept = part["gradients"] if setup.accumulation > 1 or setup.engine else 0.0
    head = 0.0
    if setup.learns.language and not setup.learns.adapters and not kept:
        head = 4.0 * setup.shape.vocabulary * setup.shape.hidden
    tower_saved = part["tower at work"] if setup.learns.tower else 0.0
    moments = [
        part["tower at work"],
        saved(setup) + tower_saved + max(part["logits"], part["logits"] / 3 + head),
        part["activations"] + tower_saved + head,
    ]
    moments = [kept + moment for moment in moments] + [part["gradients"] + step_room(setup)]
    return part["weights"] + part["optimizer"] + max(moments)


def needed(setup: Setup) -> float:
    """Bytes to have on a GPU: the peak, what the allocator loses, and the driver's own."""
    return peak(setup) * (1 + FRAGMENTED) + CONTEXT


def hours(setup: Setup, samples: float, epochs: float, flops: float, mfu: float) -> float:
    """Hours of a run at `flops`, the peak of one GPU, of which `mfu` is reached."""
    tokens = setup.positions / setup.rows
    work = step_flops(
        setup.shape,
        setup.learns,
        tokens=tokens,
        length=tokens,
        images=setup.images,
        supervised=tokens * setup.supervised,
    )
    return work * samples * epochs / (flops * setup.gpus * mfu) / 3600


def setup_of(flags: Namespace, gpus: int, data: sizes.Data) -> Setup:
    """The setup behind the flags of a run."""
    stage, offload = sizes.zero_of(flags.deepspeed)
    shape = sizes.shape_of_flags(flags)
    frozen = flags.tune_mm_mlp_adapter or flags.freeze_llm
    adapters = 0
    if flags.lora_enable:
        widths = 2 * (2 * shape.hidden + shape.hidden + shape.key_value) + 3 * (shape.hidden + shape.intermediate)
        adapters = shape.layers * flags.lora_r * widths
    learns = Trainable(not frozen, not flags.freeze_mm_mlp_adapter, flags.unfreeze_mm_vision_tower, adapters)
    return Setup(
        shape,
        learns,
        rows=flags.per_device_train_batch_size,
        text=min(data.text, flags.model_max_length),
        images=data.images if flags.vision_tower else 0.0,
        supervised=data.learned / (data.text + data.images * shape.image_tokens),
        width=2 if flags.bf16 or flags.fp16 else 4,
        bits=flags.bits,
        stage=stage,
        engine=bool(flags.deepspeed),
        offload=offload,
        gpus=gpus,
        checkpointing=flags.gradient_checkpointing,
        dropout=flags.lora_dropout > 0,
        accumulation=flags.gradient_accumulation_steps,
        foreach=bool(flags.fp16),  # otherwise CUDA uses fused AdamW (llava.arguments.use_fused_adamw)
    )


def longest(setup: Setup, data: sizes.Data, limit: int) -> Setup:
    """The same run in its worst micro-batch: every row as long as the longest, and with an image."""
    text = float(min(data.longest, limit))
    worst = replace(setup, text=text, images=min(1.0, setup.images * 2))
    learned = text * data.learned / data.text
    return replace(worst, supervised=min(1.0, learned * setup.rows / worst.positions))


def remedies(flags: Namespace, setup: Setup) -> list[str]:
    """Three changes that make a run smaller, the least harmful first."""
    rows = setup.rows
    found = []
    if rows > 1:
        found.append(
            f"BATCH={rows // 2} (--per_device_train_batch_size {rows // 2}; accumulation keeps the global batch)"
        )
    if not setup.checkpointing:
        found.append("--gradient_checkpointing True")
    if setup.stage < 3 and setup.bits == 16:
        found.append("--deepspeed scripts/zero3.json")
    elif not setup.offload and setup.bits == 16:
        found.append("--deepspeed scripts/zero3_offload.json, which needs as much memory of the host")
    if not setup.learns.adapters and setup.learns.language:
        found.append("--lora_enable True")
    if setup.bits == 16:
        found.append("--lora_enable True --bits 4 --deepspeed scripts/zero2.json")
    found.append(f"--model_max_length {flags.model_max_length // 2}")
    return found[:3]


def advice(*groups: Any, gpus: int) -> str:
    """For a run that is out of memory: what it was estimated to need, and three smaller settings."""
    flags = Namespace(**{name: value for group in groups for name, value in vars(group).items()})
    try:
        data = sizes.data_of(flags)
        setup = setup_of(flags, gpus, data)
    except LlavaError:
        return "Give a smaller --per_device_train_batch_size, --gradient_checkpointing True, or a higher ZeRO stage."
    need = needed(longest(setup, data, flags.model_max_length)) / GIB
    return f"The longest batch needs about {need:.0f} GiB. Smaller, one at a time: {'; '.join(remedies(flags, setup))}."


def command_of(recipe: Path, gpus: int, more: Sequence[str]) -> Namespace:
    """The flags that a recipe would run with on so many GPUs; nodes have eight."""
    nodes = max(1, gpus // 8)
    if not re.search(r"_(common|llava)\.sh", recipe.read_text(errors="replace")):  # others may do anything when started
        raise ConfigError(f"{recipe} is no recipe of training; give one such as scripts/finetune.sh, or a copy of it.")
    if gpus > 8 and gpus % 8:
        raise ConfigError(f"--gpus {gpus} is neither at most 8 nor a multiple of 8, the GPUs of a node.")
    many = {"GPUS": str(min(gpus, 8)), "NNODES": str(nodes), "MASTER_ADDR": "node-0"}
    words: list[str] = []
    for variables in (many, {"GPUS": str(gpus)}):  # recipes for srun take the GPUs of all nodes
        environment = {**os.environ, "MODEL_VERSION": "vicuna-7b", "PROMPT_VERSION": "v1", **variables}
        done = subprocess.run(
            ["sh", str(recipe), "--dry-run", *more], capture_output=True, text=True, env=environment, check=False
        )
        if done.returncode and variables is many and "srun" not in recipe.read_text() and gpus > 8:
            continue
        if done.returncode:
            raise ConfigError(f"{recipe} cannot be run on {gpus} GPUs: {done.stderr.strip() or 'no reason given'}")
        words = shlex.split(done.stdout)
        if words[:1] != ["srun"]:
            break
    from llava.arguments import make_parser

    start = next((index + 1 for index, word in enumerate(words) if word.startswith("llava/train/")), None)
    if start is None:
        raise ConfigError(
            f"{recipe} prints no training command for --dry-run; give a recipe such as scripts/finetune.sh."
        )
    return make_parser().parse_args(words[start:])


def page(flags: Namespace, setup: Setup, data: sizes.Data, args: Namespace) -> str:
    """The estimate as text."""
    worst = longest(setup, data, flags.model_max_length)
    together = setup.gpus * setup.rows * setup.accumulation
    lines = [
        f"{setup.gpus} GPUs x {setup.rows} rows x {setup.accumulation} accumulated = global batch {together}; ZeRO "
        f"stage {setup.stage}{', offloaded' if setup.offload else ''}; {setup.trainable / 1e9:.3g} B parameters learn.",
        "",
    ]
    lines.append(f"  {'GiB on each GPU':<28}{'mean batch':>12}{'longest rows':>14}")
    for name, value in parts(setup).items():
        lines.append(f"  {name:<28}{value / GIB:>12.1f}{parts(worst)[name] / GIB:>14.1f}")
    lines.append(f"  {'needed at the peak':<28}{needed(setup) / GIB:>12.1f}{needed(worst) / GIB:>14.1f}")
    fits = needed(worst) <= args.gpu_memory * 1e9
    lines += ["", f"It {'fits' if fits else 'does not fit'} {args.gpu_memory:g} GB."]
    if not fits:
        lines += ["Smaller, one at a time:", *(f"  {text}" for text in remedies(flags, setup))]
    mfu = args.mfu or MFU[setup.stage]
    time = hours(setup, data.samples, flags.num_train_epochs, sizes.peak_of(args.gpu), mfu)
    lines.append(
        f"{time:.1f} hours for {data.samples} samples ({data.source}) on {args.gpu} at {100 * mfu:.3g} % of the peak "
        f"({'--mfu' if args.mfu else 'as the published runs reach with this stage'})."
    )
    return "\n".join(lines)


def make_arguments(*, flags: bool = False) -> argparse.ArgumentParser:
    """The command's parser; its help, where the `flags` of training are listed, takes seconds to make."""
    epilog = None
    if flags:
        from llava.arguments import make_parser

        epilog = f"FLAG is one of training's: {' '.join(sorted(make_parser()._option_string_actions))}"
    parser = argparse.ArgumentParser(prog="llava estimate", description=__doc__, epilog=epilog)
    parser.add_argument("recipe", type=Path, metavar="RECIPE.sh", help="a recipe of scripts_internvl/ or scripts/")
    parser.add_argument("--gpus", type=int, default=8, help="in all (default: %(default)s)")
    parser.add_argument("--gpu", default="A100", help="their kind, for the hours (default: %(default)s)")
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="of one, in GB (default: %(default)s)")
    parser.add_argument("--mfu", type=float, help="share of the peak that is reached (default: as published)")
    return parser


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    args, more = make_arguments(flags="-h" in words or "--help" in words).parse_known_args(words)
    if not args.recipe.is_file():
        raise ConfigError(f"There is no recipe {args.recipe}; the published ones are in scripts_internvl and scripts.")
    if args.gpus < 1 or args.gpu_memory <= 0 or not (args.mfu is None or 0 < args.mfu <= 1):
        raise ConfigError("--gpus takes a number from 1, --gpu-memory GB above 0, and --mfu a share above 0, up to 1.")
    flags = command_of(args.recipe, args.gpus, more)
    data = sizes.data_of(flags)
    setup = setup_of(flags, args.gpus, data)
    print(page(flags, setup, data, args))  # noqa: T201 - a program
    worst = needed(longest(setup, data, flags.model_max_length))
    return int(worst > args.gpu_memory * 1e9)


if __name__ == "__main__":
    sys.exit(main())
