"""Identify a directory of weights and check it for completeness: `llava check DIR [--model-base BASE]`.

The loading code itself verifies names and shapes, on placeholder tensors, so a 13B model takes seconds. Nothing is
downloaded.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Final

import torch
from torch import nn
from transformers import PretrainedConfig

from llava.conversation import get_template, template_for
from llava.mm_utils import get_model_name_from_path
from llava.model import builder, lora
from llava.model import checkpoint as ckpt
from llava.model.checkpoint import Checkpoint, Kind
from llava.model.config import context_length
from llava.model.llava_arch import parameter_shapes
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.tower import VisionTower
from llava.model.multimodal_projector.builder import projected_tokens
from llava.model.quantization import weight_bytes
from llava.model.registry import TOWERS, tower_type
from llava.model.tokenizer import load_tokenizer
from llava.model.weights import load_weights
from llava.utils import guarded

Shapes = Mapping[str, tuple[int, ...]]
STORAGE: Final = ("fp32", "bf16", "int8", "nf4")
MAX_POSITIONS: Final = 64  # of the rotary tables built here, one per layer


@dataclass(frozen=True)
class Part:
    """A part of a model: name, description and source, and shapes of the weights it keeps in memory."""

    name: str
    detail: str
    shapes: Shapes

    def bytes(self, storage: str) -> int:
        return sum(weight_bytes(name, shape, storage) for name, shape in self.shapes.items())


@dataclass(frozen=True)
class Findings:
    """Result of `examine`: the checkpoint, the verified parts, and further facts as (label, text)."""

    found: Checkpoint
    parts: list[Part]
    facts: list[tuple[str, str]] = field(default_factory=list)


def verify(
    model: nn.Module, shapes: Shapes, source: Path, *, optional: tuple[str, ...] = (), ignored: tuple[str, ...] = ()
) -> dict[str, tuple[int, ...]]:
    """Run `load_weights` on placeholder tensors of these `shapes`, and return the shapes of the model's parameters."""
    zero = torch.zeros(())
    tensors = ((name, zero.expand(shape)) for name, shape in shapes.items())
    load_weights(
        model, tensors, dtype=torch.float32, device="meta", source=str(source), optional=optional, ignored=ignored
    )
    return parameter_shapes(model)


def language_parts(found: Checkpoint, base: Checkpoint | None, config: PretrainedConfig) -> list[Part]:
    """The language model and the projector, verified against the headers of the weight files."""
    source = base.path if base else found.path
    short = copy.copy(config)
    if isinstance(positions := getattr(config, "max_position_embeddings", None), int):
        short.max_position_embeddings = min(positions, MAX_POSITIONS)
    model = builder.empty_model(found, base, short)
    stored = {name: s for name, s in ckpt.weight_shapes(source).items() if not name.startswith(ckpt.TOWER_PREFIXES)}
    optional = ckpt.PROJECTOR_PREFIXES if base else ()
    shapes = verify(model, stored, source, optional=optional, ignored=builder.IGNORED_WEIGHTS)
    language = {name: shape for name, shape in shapes.items() if not name.startswith(ckpt.PROJECTOR_PREFIXES)}
    projector = {name: shape for name, shape in shapes.items() if name.startswith(ckpt.PROJECTOR_PREFIXES)}
    detail = f"{config.num_hidden_layers} layers, width {config.hidden_size}, vocabulary {model.config.vocab_size}"
    parts = [Part("language model", f"{detail}; {len(language)} weights verified in {source}", language)]
    if not getattr(config, "mm_vision_tower", None):
        if found.kind is Kind.LORA:
            lora.check_adapter(lora.adapter_shapes(found.path), shapes, found.path)
        return parts
    where = builder.check_adapter_weights(found, base, config, shapes)
    kind = getattr(config, "mm_projector_type", None) or "linear"
    width = f"{config.mm_hidden_size} to {config.hidden_size}"
    return [*parts, Part("projector", f"{kind}, {width}; {len(projector)} weights verified in {where}", projector)]


def tower_part(
    args: PretrainedConfig | SimpleNamespace, directory: Path | None, from_checkpoint: bool
) -> tuple[Part, VisionTower]:
    """The vision tower that loading would use, verified up to the layer of the features."""
    tower = build_vision_tower(args, directory, delay_load=True)
    source, _, rows = tower.source(from_checkpoint)
    model = tower.empty(source, rows)
    stored = tower.stored_shapes(from_checkpoint)
    shapes = verify(model, stored, source, optional=tower.spec.unused)
    layers = tower.spec.vision(tower.config).num_hidden_layers
    kind = f"{tower.settings['model_type']}, {tower.depth} of {layers} layers, width {tower.hidden_size}"
    return Part("vision tower", f"{kind}; {len(stored)} weights verified in {source}", shapes), tower


def examine(
    path: str | Path,
    model_base: str | Path | None = None,
    *,
    vision_tower: str | None = None,
    template: str | None = None,
) -> Findings:
    """Verify a checkpoint, adapter, language model or vision tower without reading its weights.

    Raises the error that loading it would raise.
    """
    found = ckpt.inspect(builder.local_directory(path))
    if found.kind is Kind.TOWER or tower_type(found.config) in TOWERS:
        found = replace(found, kind=Kind.TOWER)  # also if registered by the user
        whole = SimpleNamespace(mm_vision_tower=str(found.path), mm_vision_select_layer=-1)
        return Findings(found, [tower_part(whole, None, False)[0]])
    if found.kind is Kind.LANGUAGE_MODEL:
        parts = language_parts(found, None, builder.read_config(found))
        return Findings(found, parts, [tokenizer_fact(found.path), ("use it as", "--model-base, or to train on")])
    text_only = found.kind is Kind.LORA and not found.config
    base = builder.resolve_base(found, model_base, text_only)
    if text_only and base is not None:
        parts = language_parts(found, base, builder.read_config(base))
        return Findings(found, parts, [base_fact(base), tokenizer_fact(base.path), ("use it with", "--text-only")])
    config = builder.model_config(found, vision_tower)
    builder.preflight(found, config, vision_tower is None)
    name = get_model_name_from_path(str(path))
    chosen = template_for(config, name, template)
    get_template(chosen)
    parts = language_parts(found, base, config)
    part, tower = tower_part(config, builder.tower_directory(found, base), vision_tower is None)
    origin = "stored in the checkpoint" if getattr(config, "conv_template", None) == chosen else "not stored"
    with ckpt.config_errors(found.path):
        cache = cache_bytes(config)
    image_tokens = projected_tokens(config, *tower.feature_shapes)
    facts = [
        tokenizer_fact(base.path if base else found.path),
        ("image", f"{tower.image_processor.crop_size['height']} px, {image_tokens} tokens"),
        ("template", f"{chosen} ({'--conv-mode' if template else origin})"),
        ("context", f"{context_length(config)} tokens, {gib(cache)} of KV cache in 16 bit when full"),
    ]
    if base is not None:
        facts.insert(0, base_fact(base))
    return Findings(found, [*parts, part], facts)


def base_fact(base: Checkpoint) -> tuple[str, str]:
    return "base", f"{base.path} ({base.kind.value})"


def tokenizer_fact(directory: Path) -> tuple[str, str]:
    return "tokenizer", f"{len(load_tokenizer(directory))} entries, in {directory}"


def cache_bytes(config: PretrainedConfig) -> int:
    """Size of the KV cache of one full context in 16 bit."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = config.hidden_size // config.num_attention_heads * heads
    return int(2 * 2 * config.num_hidden_layers * width * context_length(config))


def gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.2f} MiB"


def report(findings: Findings) -> str:
    """Format the output of `llava check`."""
    found, parts = findings.found, findings.parts
    kind = f" (model_type {found.model_type})" if found.model_type else ""
    rows = [*((part.name, part.detail) for part in parts), *findings.facts]
    lines = [f"{found.path} holds {found.kind.value}{kind}", *(f"  {label:<16}{text}" for label, text in rows), ""]
    lines.append(f"  {'memory':<16}" + "".join(f"{storage:>14}" for storage in STORAGE))
    total = Part("together", "", {name: shape for part in parts for name, shape in part.shapes.items()})
    for part in [*parts, total] if len(parts) > 1 else parts:
        lines.append(f"  {part.name:<16}" + "".join(f"{gib(part.bytes(storage)):>14}" for storage in STORAGE))
    return "\n".join(lines)


@contextmanager
def without_network() -> Iterator[None]:
    """Set `HF_HUB_OFFLINE`, so that bases and towers are searched on this machine only."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", metavar="DIR", help="a checkpoint, adapter, language model or vision tower")
    parser.add_argument(
        "--model-base",
        help="language model of a projector or adapter (default for adapters: the one in adapter_config.json)",
    )
    parser.add_argument("--vision-tower", help="vision tower to use instead of that of the checkpoint")
    parser.add_argument("--conv-mode", help="conversation template to use instead of the stored one")
    args = parser.parse_args(argv)
    with without_network():
        findings = examine(args.directory, args.model_base, vision_tower=args.vision_tower, template=args.conv_mode)
    print(report(findings))  # noqa: T201 (a program)
    return 0


if __name__ == "__main__":
    sys.exit(main())
