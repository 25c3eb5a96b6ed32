"""Inputs of the estimate: training flags, model shapes, data set statistics, ZeRO stage.

Models and data that are on this disk are read; those of the published recipes are known by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, TypeVar

from llava.errors import ConfigError
from llava.train.flops import PEAKS, SUPERVISED_TEXT, Shape, device_peak, with_tower

T = TypeVar("T")
# hidden, intermediate, layers, heads, vocabulary
LANGUAGE_MODELS: Final = {
    "vicuna-7b": (4096, 11008, 32, 32, 32000),
    "vicuna-13b": (5120, 13824, 40, 40, 32000),
    "llava-v1.5-7b": (4096, 11008, 32, 32, 32000),
    "llava-v1.5-13b": (5120, 13824, 40, 40, 32000),
}
# hidden, intermediate, layers, pixels; patches of 14 pixels
TOWERS: Final = {
    "intern_vit_6b_224px": (3200, 12800, 48, 336),
    "InternViT-6B-224px": (3200, 12800, 48, 336),
    "InternViT-6B-448px-V1": (3200, 12800, 45, 448),
    "intern_vit_6b_448px": (3200, 12800, 48, 448),
    "InternViT-6B-448px": (3200, 12800, 48, 448),
    "clip-vit-large-patch14-336": (1024, 4096, 24, 336),
    "clip-vit-large-patch14": (1024, 4096, 24, 224),
}
PATCH_SIZE: Final = 14
SIZE_KEYS: Final = ("hidden_size", "intermediate_size", "num_hidden_layers")
TOKENS_PER_WORD: Final = 1.4  # of English text with the LLaMA tokenizer


@dataclass(frozen=True)
class RecipeFlags:
    """The training flags that memory and speed depend on."""

    model_name_or_path: str
    version: str
    vision_tower: str | None
    mm_vision_image_size: int | None
    mm_vision_select_layer: int
    mm_vision_select_feature: str
    mm_projector_type: str
    tune_mm_mlp_adapter: bool
    unfreeze_mm_vision_tower: bool
    freeze_llm: bool
    freeze_mm_mlp_adapter: bool
    lora_enable: bool
    lora_r: int
    lora_dropout: float
    mm_vision_lora_r: int
    use_dora: bool
    bits: int
    bf16: bool
    fp16: bool
    data_path: str | None
    model_max_length: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    num_train_epochs: float
    deepspeed: str | None
    seed: int
    group_by_modality_length: bool
    global_batch_size: int | None
    loss_group_size: int | None
    micro_batch_tokens: int | None

    @classmethod
    def of(cls, *groups: object) -> RecipeFlags:
        """Collect the flags from argument groups or parsed arguments."""
        values = {name: value for group in groups for name, value in vars(group).items()}
        return cls(**{field.name: values[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class DatasetStats:
    """Number of samples; mean text tokens, images and supervised tokens per sample; text tokens of the longest."""

    samples: int
    text_tokens: float
    images: float
    supervised: float
    longest: float
    source: str


# Sample counts are those of the published files; mean tokens are assumptions, stated in docs/Scaling.md.
CAPTIONS: Final = "published count, 20 tokens of text assumed"
KNOWN_DATA: Final = {
    "blip_laion_cc_sbu_558k.json": DatasetStats(558_128, 20, 1.0, 20, 150, CAPTIONS),
    "chat.json": DatasetStats(595_375, 20, 1.0, 20, 150, CAPTIONS),
    "llava_v1_5_mix665k.json": DatasetStats(
        665_298, 250, 0.94, 150, 10_000, "published count, 250 tokens of text assumed"
    ),
}
UNKNOWN_DATA: Final = DatasetStats(
    100_000, 250, 1.0, 150, 10_000, "the file is not on this disk: 100,000 samples of 250 tokens assumed"
)


def dataset_stats(flags: RecipeFlags) -> DatasetStats:
    """Statistics of the training data: counted if the file is on this disk, else known or assumed."""
    file = Path(flags.data_path or "")
    if not flags.data_path or not file.is_file():
        return KNOWN_DATA.get(file.name, UNKNOWN_DATA)
    from llava.data.annotations import read_records
    from llava.data.dataset_scan import DatasetScan

    found = DatasetScan(read_records(file)).result()
    template = 0 if flags.version == "plain" else 40  # tokens of system text and roles
    mean, longest = (TOKENS_PER_WORD * float(words) + template for words in (found.words.mean(), found.words.max()))
    return DatasetStats(
        len(found.words), mean, float(found.image.mean()), SUPERVISED_TEXT * mean, longest, f"{file}, counted"
    )


def shape_from_flags(flags: RecipeFlags) -> Shape:
    """Shape of the chat model that the flags describe."""
    directory = Path(flags.model_name_or_path)
    if (directory / "config.json").is_file():
        config = _read_config(directory, (*SIZE_KEYS, "num_attention_heads", "vocab_size"), "LLaMA-like language model")
        heads = config["num_attention_heads"]
        key_value_heads = config.get("num_key_value_heads") or heads
        hidden, intermediate, layers = (int(config[key]) for key in SIZE_KEYS)
        shape = Shape(hidden, intermediate, layers, heads, key_value_heads, config["vocab_size"])
    else:
        hidden, intermediate, layers, heads, vocabulary = _lookup(
            LANGUAGE_MODELS, flags.model_name_or_path, "language model"
        )
        shape = Shape(hidden, intermediate, layers, heads, heads, vocabulary)
    return _with_tower(shape, flags, flags.vision_tower) if flags.vision_tower else shape


def _with_tower(shape: Shape, flags: RecipeFlags, name: str) -> Shape:
    """`shape` with the tower and projector of the flags; nothing is downloaded."""
    from llava.model.check import without_network
    from llava.model.multimodal_encoder.tower import TIMM, VisionTower
    from llava.model.multimodal_projector.builder import projected_tokens

    config = SimpleNamespace(mm_projector_type=flags.mm_projector_type, hidden_size=shape.hidden)
    if name.startswith(TIMM) or (Path(name) / "config.json").is_file():
        with without_network():
            tower = VisionTower(name, flags)
            config.mm_hidden_size, config.mm_image_hidden_size = tower.hidden_size, tower.image_hidden_size
            return with_tower(shape, config, tower)
    config.mm_hidden_size, intermediate, layers, pixels = _lookup(TOWERS, name, "vision tower")
    patches = ((flags.mm_vision_image_size or pixels) // PATCH_SIZE) ** 2
    tokens = patches + (flags.mm_vision_select_feature == "cls_patch")
    layer = flags.mm_vision_select_layer
    kind = flags.mm_projector_type
    return replace(
        shape,
        tower_hidden=config.mm_hidden_size,
        tower_intermediate=intermediate,
        tower_layers=layer + layers + 1 if layer < 0 else layer,
        tower_positions=patches + 1,
        image_tokens=projected_tokens(config, (tokens, config.mm_hidden_size)),
        projector_layers=int(kind[3]) if kind.startswith("mlp") and kind[3:4].isdigit() else 1,
    )


def _read_config(directory: Path, keys: Sequence[str], what: str) -> dict[str, Any]:
    """Read config.json, which must have `keys`."""
    from llava.model.checkpoint import inspect

    config = inspect(directory).config
    missing = [key for key in keys if key not in config]
    if missing:
        raise ConfigError(f"{directory} is not a {what}: its config.json has no {missing[0]}; pass another directory.")
    return config


def _lookup(table: Mapping[str, T], name: str, what: str) -> T:
    for key, value in table.items():
        if key.lower() in name.lower():
            return value
    raise ConfigError(f"The {what} {name} is neither on this disk nor one of {', '.join(table)}; give its directory.")


def zero_stage(file: str | None) -> tuple[int, bool]:
    """Stage of a ZeRO file, and whether it offloads to the host; stage 0 without a file."""
    if not file:
        return 0, False
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8")).get("zero_optimization", {})
    except (OSError, ValueError) as error:
        raise ConfigError(f"--deepspeed {file} cannot be read as JSON: {error}.") from error
    return int(config.get("stage", 0)), "offload_optimizer" in config


def gpu_peak(gpu: str) -> float:
    """Dense 16-bit peak of a GPU name in FLOP/s; raises `ConfigError` if it is unknown."""
    found = device_peak(gpu)
    if found is None:
        raise ConfigError(f"--gpu must be one of {', '.join(PEAKS)}, got {gpu!r}.")
    return found
