"""Estimate memory and duration of a recipe: `llava estimate RECIPE.sh --gpus 8 --gpu-memory 80 [FLAG ...]`.

Prints the memory of one GPU by component and the hours of the run. FLAGs go to the recipe as in training. Models on
this disk are read, those of the published recipes are known by name. docs/Scaling.md explains every term.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from llava.arguments import DataArguments, ModelArguments, TrainingArguments, make_parser
from llava.errors import ConfigError, LlavaError
from llava.model.language_model.lm_head import CHUNK_BYTES_CUDA
from llava.train import estimate_inputs as inputs
from llava.train.estimate_inputs import DatasetStats, RecipeFlags
from llava.train.flops import Shape, Trainable, step_flops
from llava.utils import guarded

GIB: Final = 2**30
MAX_LIVE_PARAMETERS: Final = 10**9  # stage3_max_live_parameters of scripts/zero3.json
CONTEXT_BYTES: Final = 1.5 * GIB  # CUDA context and NCCL buffers
FRAGMENTATION: Final = 0.05  # of allocated memory
# MFU by ZeRO stage: one number per stage, fitted to the published 13B runs (stage 1 5.5 h, stage 2 20 h, on 8 x A100).
# The published 7B runs (3.5 h and 10 h) are not part of the fit; the tests compare the estimate with them.
MFU: Final = {0: 0.35, 1: 0.35, 2: 0.35, 3: 0.228}


@dataclass(frozen=True)
class RunConfig:
    """A run as far as its memory depends on it.

    `text_tokens` and `images` are per sample, `supervised` is a fraction of the positions, `dtype_bytes` the size of a
    number in the compute dtype. `foreach` is the unfused optimizer. With a `budget` of positions in a micro-batch,
    `batch_size` is a mean.
    """

    shape: Shape
    trainable: Trainable
    batch_size: float
    text_tokens: float
    images: float = 1.0
    supervised: float = 0.2
    dtype_bytes: int = 2
    bits: int = 16
    zero_stage: int = 0
    deepspeed: bool = False
    offload: bool = False
    gpus: int = 1
    gradient_checkpointing: bool = False
    lora_dropout: bool = False
    accumulation_steps: int = 1
    foreach: bool = True
    budget: int | None = None

    @property
    def sample_positions(self) -> float:
        """Positions of the language model in one sample, with images expanded."""
        return self.text_tokens + self.images * self.shape.image_tokens

    @property
    def positions(self) -> float:
        """Positions of the language model in one micro-batch."""
        return self.batch_size * self.sample_positions

    @property
    def trainable_parameters(self) -> int:
        shape, trainable = self.shape, self.trainable
        language = trainable.adapters or (shape.language_weights if trainable.language else 0)
        language += trainable.tower_adapters
        return language + trainable.projector * shape.projector_weights + trainable.tower * shape.tower_weights

    @property
    def full(self) -> bool:
        """Whether the language model itself is trained, not adapters."""
        return self.trainable.language and not self.trainable.adapters

    @property
    def optimizer_shards(self) -> int:
        """Number of GPUs that share the optimizer state."""
        return self.gpus if self.zero_stage else 1


def weight_bytes(run: RunConfig) -> float:
    """Bytes of all weights on one GPU without DeepSpeed's masters; quantized decoders with their scales."""
    shape, dtype_bytes = run.shape, run.dtype_bytes
    decoder = shape.layers * shape.layer_weights
    bytes_per_weight = {4: 0.5 + 1 / 64, 8: 1.0, 16: float(dtype_bytes)}[run.bits]
    rest = shape.language_weights - decoder + shape.projector_weights + shape.tower_weights
    total = decoder * bytes_per_weight + rest * dtype_bytes
    if not run.deepspeed:  # trainable weights are their own float32 masters
        total += run.trainable_parameters * (4 - (0 if run.trainable.adapters else dtype_bytes))
    elif run.trainable.adapters:
        total += (run.trainable.adapters + run.trainable.tower_adapters) * dtype_bytes
    if run.zero_stage == 3:
        gathered = min(MAX_LIVE_PARAMETERS, total / dtype_bytes) * dtype_bytes
        return (0 if run.offload else total / run.gpus) + gathered
    return total


def gradient_bytes(run: RunConfig) -> float:
    """Bytes of gradients, which are accumulated in float32; sharded from stage 2 on, and with offload on the host."""
    if run.offload:
        return 0.0
    return run.trainable_parameters * 4 / (run.gpus if run.zero_stage >= 2 else 1)


def optimizer_bytes(run: RunConfig) -> float:
    """Bytes of Adam's two moments and, with DeepSpeed, of the float32 masters."""
    if run.offload:
        return 0.0
    return run.trainable_parameters * (12 / run.optimizer_shards if run.deepspeed else 8)


def optimizer_step_bytes(run: RunConfig) -> float:
    """Bytes of the optimizer's temporaries in its step."""
    if run.offload:
        return 0.0
    if run.deepspeed:
        return run.trainable_parameters * 4 / run.optimizer_shards
    if run.foreach:
        return run.trainable_parameters * 4.0
    return 2 * 4.0 * run.shape.vocabulary * run.shape.hidden if run.full else 0.0


def layer_activation_bytes(run: RunConfig) -> float:
    """Bytes that one decoder layer saves for the backward pass of a micro-batch.

    Norms save their input (a float32 copy in 16 bit); attention query, key, value and output; the MLP gate and up
    projection. Trainable linear layers save their input, too; layers without adapters, outside ZeRO-3, only that of o.
    """
    shape, dtype_bytes = run.shape, run.dtype_bytes
    adapters = run.trainable.adapters > 0
    hidden, intermediate = shape.hidden, shape.intermediate
    per_position = 2 * 4 * hidden + dtype_bytes * (4 * hidden + 2 * intermediate)
    if run.full and run.zero_stage != 3:
        per_position += dtype_bytes * hidden
    elif run.full or adapters:  # inputs of q, k, v together, of o, of gate and up together, of down
        per_position += dtype_bytes * (3 * hidden + intermediate)
    if run.full and run.zero_stage == 3:  # the normalized rows, for the gradient of a norm's weight
        per_position += dtype_bytes * 2 * hidden
    if adapters and run.lora_dropout:  # each adapter has its own dropout: a copy and a mask
        per_position += (4 + 1) * (6 * hidden + intermediate) - dtype_bytes * (3 * hidden + intermediate)
    return run.positions * per_position


def saved_activation_bytes(run: RunConfig) -> float:
    """Bytes that the forward pass saves for the backward pass; with checkpointing only the inputs of the layers."""
    shape, dtype_bytes = run.shape, run.dtype_bytes
    embeddings = run.positions * dtype_bytes * 3 * shape.hidden  # before and after the splice, and the last norm
    images = run.batch_size * run.images * shape.image_tokens * dtype_bytes * (shape.tower_hidden + 3 * shape.hidden)
    if run.gradient_checkpointing:
        return embeddings + images + shape.layers * run.positions * dtype_bytes * shape.hidden
    # the second norm and the MLP of the last layer, which only supervised positions pass
    spared = run.positions * (1 - run.supervised) * (4 * shape.hidden + dtype_bytes * 2 * shape.intermediate)
    return embeddings + images + shape.layers * layer_activation_bytes(run) - spared


def activation_bytes(run: RunConfig) -> float:
    """Bytes of saved activations and, with checkpointing, of the layer that the backward pass recomputes."""
    if not run.gradient_checkpointing:
        return saved_activation_bytes(run)
    mlp_gradients = run.positions * run.dtype_bytes * 2 * run.shape.intermediate
    return saved_activation_bytes(run) + layer_activation_bytes(run) + mlp_gradients


def logit_bytes(run: RunConfig) -> float:
    """Bytes of the loss: one chunk of logits and, if it is trained, the gradient of the head (`model.lm_head`).

    In 16 bits the gradients of the logits of up to `2 * hidden` tokens are kept; beyond, a float32 sum is added.
    """
    tokens, table = run.positions * run.supervised, run.shape.vocabulary * run.shape.hidden
    half = run.dtype_bytes == 2
    chunk = min(CHUNK_BYTES_CUDA, tokens * run.shape.vocabulary * (6 if half else 4))
    if not run.full:
        return chunk
    if not half:
        return chunk + 4 * table
    most = 2 * run.shape.hidden
    kept = min(tokens, most) * run.shape.vocabulary * 2 + 4 * table * (tokens > most)
    return kept + (max(chunk, 2 * table) if run.deepspeed else 2 * table + max(chunk, 4 * table))


def tower_bytes(run: RunConfig) -> float:
    """Bytes of activations of the vision tower: one layer if it is frozen, all that it saves if it is trained."""
    shape, dtype_bytes = run.shape, run.dtype_bytes
    positions = run.batch_size * run.images * shape.tower_positions
    layer = positions * dtype_bytes * (2 * shape.tower_hidden + 2 * shape.tower_intermediate)
    if not run.trainable.tower and not run.trainable.tower_adapters:
        return layer
    saved = positions * dtype_bytes * (9 * shape.tower_hidden + 2 * shape.tower_intermediate)
    return layer + saved if run.gradient_checkpointing else shape.tower_layers * saved


def memory_breakdown(run: RunConfig) -> dict[str, float]:
    """Bytes by component; not all of them exist at the same time, see `peak_bytes`."""
    return {
        "weights": weight_bytes(run),
        "gradients": gradient_bytes(run),
        "optimizer": optimizer_bytes(run),
        "activations": activation_bytes(run),
        "logits": logit_bytes(run),
        "vision tower": tower_bytes(run),
    }


def peak_bytes(run: RunConfig) -> float:
    """Bytes at the peak: vision tower, loss, first layer of the backward pass, or optimizer step.

    Gradients of earlier micro-batches and ZeRO's flat buffers persist; otherwise gradients are allocated as activations
    are freed.
    """
    part = memory_breakdown(run)
    gradients = part["gradients"] if run.accumulation_steps > 1 or run.deepspeed else 0.0
    head = 4.0 * run.shape.vocabulary * run.shape.hidden if run.full and not gradients else 0.0
    tower = part["vision tower"] if run.trainable.tower or run.trainable.tower_adapters else 0.0
    moments = [
        gradients + part["vision tower"],
        gradients + saved_activation_bytes(run) + tower + part["logits"],
        gradients + part["activations"] + tower + head,
        part["gradients"] + optimizer_step_bytes(run),
    ]
    return part["weights"] + part["optimizer"] + max(moments)


def required_bytes(run: RunConfig) -> float:
    """Bytes a GPU must have: the peak, fragmentation, and the CUDA context."""
    return peak_bytes(run) * (1 + FRAGMENTATION) + CONTEXT_BYTES


def training_hours(run: RunConfig, samples: float, epochs: float, peak_flops: float, mfu: float) -> float:
    """Hours of a run on GPUs of `peak_flops` FLOP/s each at this MFU."""
    tokens = run.sample_positions
    counts = {"tokens": tokens, "length": tokens, "images": run.images, "supervised": tokens * run.supervised}
    flops = step_flops(run.shape, run.trainable, **counts)
    return flops * samples * epochs / (peak_flops * run.gpus * mfu) / 3600


def run_config(flags: RecipeFlags, gpus: int, data: DatasetStats) -> RunConfig:
    """The run that the flags describe, for a mean micro-batch."""
    stage, offload = inputs.zero_stage(flags.deepspeed)
    shape = inputs.shape_from_flags(flags)
    adapters = tower_adapters = 0
    if flags.lora_enable:
        widths = 2 * (2 * shape.hidden + shape.hidden + shape.key_value) + 3 * (shape.hidden + shape.intermediate)
        rows = 3 * shape.hidden + 2 * shape.key_value + 2 * shape.intermediate  # DoRA has a magnitude for each
        adapters = shape.layers * (flags.lora_r * widths + flags.use_dora * rows)
        width = 8 * shape.tower_hidden + 2 * shape.tower_intermediate  # of qkv, proj, fc1 and fc2
        rows = 5 * shape.tower_hidden + shape.tower_intermediate
        rank = flags.mm_vision_lora_r
        tower_adapters = shape.tower_layers * (rank * width + bool(rank) * flags.use_dora * rows)
    language = not (flags.tune_mm_mlp_adapter or flags.freeze_llm)
    run = RunConfig(
        shape,
        Trainable(language, not flags.freeze_mm_mlp_adapter, flags.unfreeze_mm_vision_tower, adapters, tower_adapters),
        batch_size=flags.per_device_train_batch_size,
        text_tokens=min(data.text_tokens, flags.model_max_length),
        images=data.images if flags.vision_tower else 0.0,
        supervised=data.supervised / (data.text_tokens + data.images * shape.image_tokens),
        dtype_bytes=2 if flags.bf16 or flags.fp16 else 4,
        bits=flags.bits,
        zero_stage=stage,
        deepspeed=bool(flags.deepspeed),
        offload=offload,
        gpus=gpus,
        gradient_checkpointing=flags.gradient_checkpointing,
        lora_dropout=flags.lora_dropout > 0,
        accumulation_steps=math.ceil(global_batch(flags, gpus) / (gpus * flags.per_device_train_batch_size)),
        foreach=flags.fp16,  # otherwise CUDA uses fused AdamW (llava.arguments.use_fused_adamw)
    )
    return with_budget(run, flags.micro_batch_tokens, global_batch(flags, gpus))


def global_batch(flags: RecipeFlags, gpus: int) -> int:
    """Samples of an optimizer step."""
    return flags.global_batch_size or gpus * flags.per_device_train_batch_size * flags.gradient_accumulation_steps


def with_budget(run: RunConfig, budget: int | None, samples: int) -> RunConfig:
    """The same run in micro-batches of `budget` positions, where a step has this many `samples`."""
    if not budget:
        return run
    rounds = math.ceil(samples * run.sample_positions / (budget * run.gpus))
    return replace(run, batch_size=samples / (rounds * run.gpus), accumulation_steps=rounds, budget=budget)


def worst_case(run: RunConfig, data: DatasetStats, max_length: int) -> RunConfig:
    """The same run in its largest micro-batch: every sample as long as the longest, and with an image.

    With a budget, samples of mean length fill it, unless the longest sample exceeds it.
    """
    text_tokens = float(min(data.longest, max_length))
    worst = replace(run, text_tokens=text_tokens, images=min(1.0, run.images * 2))
    if run.budget and worst.sample_positions <= run.budget:
        supervised = data.supervised / data.text_tokens  # as in samples without images
        return replace(run, batch_size=run.budget / run.sample_positions, supervised=min(1.0, supervised))
    if run.budget:
        worst = replace(worst, batch_size=1)
    supervised = text_tokens * data.supervised / data.text_tokens
    return replace(worst, supervised=min(1.0, supervised / worst.sample_positions))


def smaller_settings(flags: RecipeFlags, run: RunConfig) -> list[str]:
    """Three changes that reduce memory, the least harmful first."""
    half = int(run.batch_size) // 2
    found = []
    if run.budget:
        found.append(f"--micro_batch_tokens {run.budget // 2}")
    elif half:
        found.append(f"BATCH={half} (--per_device_train_batch_size {half}; the step stays the same)")
    if not run.gradient_checkpointing:
        found.append("--gradient_checkpointing True")
    if run.zero_stage < 3 and run.bits == 16:
        found.append("--deepspeed scripts/zero3.json")
    elif not run.offload and run.bits == 16:
        found.append("--deepspeed scripts/zero3_offload.json, which needs as much memory of the host")
    if run.full:
        found.append("--lora_enable True")
    if run.bits == 16:
        found.append("--lora_enable True --bits 4 --deepspeed scripts/zero2.json")
    found.append(f"--model_max_length {flags.model_max_length // 2}")
    return found[:3]


def out_of_memory_advice(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> str:
    """The estimated memory of a run that is out of memory, and three smaller settings."""
    flags = RecipeFlags.of(model, data, training)
    try:
        stats = inputs.dataset_stats(flags)
        run = run_config(flags, training.world_size, stats)
    except LlavaError:
        return "Lower --per_device_train_batch_size, add --gradient_checkpointing True, or use a higher ZeRO stage."
    required = required_bytes(worst_case(run, stats, flags.model_max_length)) / GIB
    settings = "; ".join(smaller_settings(flags, run))
    return f"The longest batch needs about {required:.0f} GiB. Smaller settings, one at a time: {settings}."


def read_recipe(recipe: Path, gpus: int, more: Sequence[str]) -> RecipeFlags:
    """The training flags of a recipe, from its `--dry-run` on this many GPUs (nodes have eight)."""
    if not re.search(r"_(common|llava)\.sh", recipe.read_text(errors="replace")):  # do not run any other script
        raise ConfigError(f"{recipe} is not a training recipe; give one such as scripts/finetune.sh, or a copy of it.")
    if gpus > 8 and gpus % 8:
        raise ConfigError(f"--gpus must be at most 8 or a multiple of 8 (the GPUs of a node), got {gpus}.")
    multi_node = {"GPUS": str(min(gpus, 8)), "NNODES": str(max(1, gpus // 8)), "MASTER_ADDR": "node-0"}
    words: list[str] = []
    for variables in (multi_node, {"GPUS": str(gpus)}):  # recipes for srun take the GPUs of all nodes
        environment = {**os.environ, "MODEL_VERSION": "vicuna-7b", "PROMPT_VERSION": "v1", **variables}
        done = subprocess.run(
            ["sh", str(recipe), "--dry-run", *more], capture_output=True, text=True, env=environment, check=False
        )
        if done.returncode and variables is multi_node and "srun" not in recipe.read_text() and gpus > 8:
            continue
        if done.returncode:
            raise ConfigError(f"{recipe} cannot be run on {gpus} GPUs: {done.stderr.strip() or 'no reason given'}")
        words = shlex.split(done.stdout)
        if words[:1] != ["srun"]:
            break
    start = next((index + 1 for index, word in enumerate(words) if word.startswith("llava/train/")), None)
    if start is None:
        raise ConfigError(
            f"{recipe} prints no training command for --dry-run; give a recipe such as scripts/finetune.sh."
        )
    return RecipeFlags.of(make_parser().parse_args(words[start:]))


def format_estimate(
    flags: RecipeFlags, run: RunConfig, data: DatasetStats, *, gpu: str, gpu_memory: float, mfu: float | None
) -> str:
    """The estimate as text; `gpu_memory` in GB."""
    worst = worst_case(run, data, flags.model_max_length)
    micro_batch = f"{round(run.batch_size, 1):g} samples"
    if run.budget:
        micro_batch += f" in up to {run.budget} tokens"
    lines = [
        f"{run.gpus} GPUs x {micro_batch} x {run.accumulation_steps} accumulation steps = global batch "
        f"{global_batch(flags, run.gpus)}; ZeRO stage {run.zero_stage}{', offloaded' if run.offload else ''}; "
        f"{run.trainable_parameters / 1e9:.3g} B trainable parameters.",
        "",
        f"  {'GiB per GPU':<28}{'mean batch':>12}{'longest batch':>15}",
    ]
    longest = memory_breakdown(worst)
    lines += [
        f"  {name:<28}{value / GIB:>12.1f}{longest[name] / GIB:>15.1f}" for name, value in memory_breakdown(run).items()
    ]
    lines.append(f"  {'required':<28}{required_bytes(run) / GIB:>12.1f}{required_bytes(worst) / GIB:>15.1f}")
    fits = required_bytes(worst) <= gpu_memory * 1e9
    lines += ["", f"It {'fits' if fits else 'does not fit'} {gpu_memory:g} GB."]
    if not fits:
        lines += ["Smaller settings, one at a time:", *(f"  {text}" for text in smaller_settings(flags, run))]
    assumed = mfu or MFU[run.zero_stage]
    hours = training_hours(run, data.samples, flags.num_train_epochs, inputs.gpu_peak(gpu), assumed)
    lines.append(
        f"{hours:.1f} hours for {data.samples} samples ({data.source}) on {gpu} at {100 * assumed:.3g} % MFU "
        f"({'--mfu' if mfu else 'as in the published runs with this ZeRO stage'})."
    )
    return "\n".join(lines)


def packing_of(flags: RecipeFlags, run: RunConfig) -> list[str]:
    """The report of packed steps, if the data file and the tokenizer are on this disk."""
    directory, file = Path(flags.model_name_or_path), Path(flags.data_path or "")
    if not run.budget or not flags.data_path or not file.is_file() or not directory.is_dir():
        return []
    from llava.train.packing_report import SampledRun, packing_report

    sampled = SampledRun(
        *(file, directory, flags.version, flags.model_max_length),
        shape=run.shape,
        trainable=run.trainable,
        image_tokens=run.shape.image_tokens,
        ranks=run.gpus,
        budget=run.budget,
        global_batch=global_batch(flags, run.gpus),
        group=flags.loss_group_size or flags.per_device_train_batch_size,
        by_modality=flags.group_by_modality_length,
        seed=flags.seed,
    )
    return [packing_report(sampled)]


def make_arguments(*, list_flags: bool = False) -> argparse.ArgumentParser:
    """The parser of the command; `list_flags` adds the names of the training flags to its help."""
    epilog = None
    if list_flags:
        epilog = f"FLAG is a flag of training: {' '.join(sorted(make_parser()._option_string_actions))}"
    parser = argparse.ArgumentParser(prog="llava estimate", description=__doc__, epilog=epilog)
    parser.add_argument("recipe", type=Path, metavar="RECIPE.sh", help="a recipe of scripts_internvl/ or scripts/")
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs on all nodes (default: %(default)s)")
    parser.add_argument("--gpu", default="A100", help="GPU model, for the duration (default: %(default)s)")
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="memory of a GPU in GB (default: %(default)s)")
    parser.add_argument("--mfu", type=float, help="model FLOPs utilization, 0 to 1 (default: as in the published runs)")
    return parser


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    args, more = make_arguments(list_flags="-h" in words or "--help" in words).parse_known_args(words)
    if not args.recipe.is_file():
        raise ConfigError(f"Recipe {args.recipe} does not exist; the published ones are in scripts_internvl, scripts.")
    if args.gpus < 1 or args.gpu_memory <= 0:
        raise ConfigError(
            f"--gpus must be at least 1 and --gpu-memory above 0, got {args.gpus} and {args.gpu_memory:g}."
        )
    if args.mfu is not None and not 0 < args.mfu <= 1:
        raise ConfigError(f"--mfu must be above 0 and at most 1, got {args.mfu:g}.")
    flags = read_recipe(args.recipe, args.gpus, more)
    data = inputs.dataset_stats(flags)
    run = run_config(flags, args.gpus, data)
    text = format_estimate(flags, run, data, gpu=args.gpu, gpu_memory=args.gpu_memory, mfu=args.mfu)
    print("\n\n".join([text, *packing_of(flags, run)]))  # noqa: T201 - a program
    return int(required_bytes(worst_case(run, data, flags.model_max_length)) > args.gpu_memory * 1e9)


if __name__ == "__main__":
    sys.exit(main())
