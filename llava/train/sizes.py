"""Sizes behind a recipe's names: models that are on this disk are read, the published ones are known."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from llava.errors import ConfigError
from llava.train.flops import PEAKS, Shape, device_peak, with_tower

# hidden, intermediate, layers, heads, vocabulary
LANGUAGE: Final = {
    "vicuna-7b": (4096, 11008, 32, 32, 32000),
    "vicuna-13b": (5120, 13824, 40, 40, 32000),
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
PATCH: Final = 14
CORE: Final = ("hidden_size", "intermediate_size", "num_hidden_layers")
WORDS_TO_TOKENS: Final = 1.4  # LLaMA tokens a word of English


@dataclass(frozen=True)
class Data:
    """Rows of a data set, of a mean row its text tokens, images and supervised tokens, and the longest row's text."""

    samples: int
    text: float
    images: float
    learned: float
    longest: float
    source: str


# Counts are those of the published files; the means of tokens are assumptions, which docs/Scaling.md states.
KNOWN_DATA: Final = {
    "blip_laion_cc_sbu_558k.json": Data(558_128, 20, 1.0, 20, 150, "published count, 20 tokens of text assumed"),
    "chat.json": Data(595_375, 20, 1.0, 20, 150, "published count, 20 tokens of text assumed"),
    "llava_v1_5_mix665k.json": Data(665_298, 250, 0.94, 150, 10_000, "published count, 250 tokens of text assumed"),
}
UNKNOWN_DATA: Final = Data(100_000, 250, 1.0, 150, 10_000, "the file is not here: 100,000 rows of 250 tokens assumed")


def data_of(flags: Namespace) -> Data:
    """The data of a run: looked through when the file is here, known, or assumed."""
    file = Path(flags.data_path or "")
    if flags.data_path and file.is_file():
        from llava.data.annotations import read_records
        from llava.data.dataset_scan import DatasetScan

        found = DatasetScan(read_records(file)).result()
        around = 0 if flags.version == "plain" else 40  # the system text and the roles
        text, longest = (WORDS_TO_TOKENS * float(words) + around for words in (found.words.mean(), found.words.max()))
        return Data(len(found.words), text, float(found.image.mean()), 0.6 * text, longest, f"{file}, looked through")
    return KNOWN_DATA.get(file.name, UNKNOWN_DATA)


def shape_of_flags(flags: Namespace) -> Shape:
    """The shape of the chat model that the flags join."""
    directory = Path(flags.model_name_or_path)
    if (directory / "config.json").is_file():
        config = _config(directory, (*CORE, "num_attention_heads", "vocab_size"), "LLaMA-like language model")
        heads = config["num_attention_heads"]
        key_heads = config.get("num_key_value_heads") or heads
        hidden, intermediate, layers = (int(config[key]) for key in CORE)
        shape = Shape(hidden, intermediate, layers, heads, key_heads, config["vocab_size"])
    else:
        hidden, intermediate, layers, heads, vocabulary = _known(LANGUAGE, flags.model_name_or_path, "language model")
        shape = Shape(hidden, intermediate, layers, heads, heads, vocabulary)
    return shape_with_tower(shape, flags) if flags.vision_tower else shape


def shape_with_tower(shape: Shape, flags: Namespace) -> Shape:
    """The shape with the tower and projector of the flags; nothing is downloaded."""
    from llava.model.check import without_network
    from llava.model.multimodal_encoder.builder import build_vision_tower
    from llava.model.multimodal_encoder.tower import TIMM
    from llava.model.multimodal_projector.builder import projected_tokens

    config = SimpleNamespace(mm_projector_type=flags.mm_projector_type, hidden_size=shape.hidden)
    named = flags.vision_tower.startswith(TIMM)
    if named or (Path(flags.vision_tower) / "config.json").is_file():
        args: Namespace | SimpleNamespace = flags
        if named:
            from llava.model.multimodal_encoder.timm_encoder import named_settings

            args = SimpleNamespace(**vars(flags), mm_vision_tower_config=named_settings(flags.vision_tower))
        with without_network():
            tower = build_vision_tower(args, delay_load=True)
            config.mm_hidden_size, config.mm_image_hidden_size = tower.hidden_size, tower.image_hidden_size
            return with_tower(shape, config, tower)
    config.mm_hidden_size, intermediate, layers, pixels = _known(TOWERS, flags.vision_tower, "vision tower")
    layer = flags.mm_vision_select_layer
    patches = ((flags.mm_vision_image_size or pixels) // PATCH) ** 2
    tokens = patches + (flags.mm_vision_select_feature == "cls_patch")
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


def _config(directory: Path, keys: Sequence[str], what: str) -> dict[str, Any]:
    """A model's configuration, which must have these keys."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    missing = [key for key in keys if key not in config]
    if missing:
        raise ConfigError(f"{directory} is not a {what} whose size can be told: its config.json has no {missing[0]}.")
    return config


def _known(table: dict[str, Any], name: str, what: str) -> Any:
    for key, value in table.items():
        if key.lower() in name.lower():
            return value
    raise ConfigError(f"The {what} {name} is not on this disk and not among {', '.join(table)}; give its directory.")


def zero_of(file: str | None) -> tuple[int, bool]:
    """Stage of a ZeRO file, and whether it offloads to the host."""
    if not file:
        return 0, False
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8")).get("zero_optimization", {})
    except (OSError, ValueError) as error:
        raise ConfigError(f"--deepspeed names {file}, which cannot be read as JSON: {error}.") from error
    return int(config.get("stage", 0)), "offload_optimizer" in config


def peak_of(gpu: str) -> float:
    found = device_peak(gpu)
    if found is None:
        raise ConfigError(f"The peak of {gpu!r} is not known; --gpu takes one of {', '.join(PEAKS)}.")
    return found
