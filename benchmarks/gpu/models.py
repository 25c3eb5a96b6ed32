"""The benchmarked model, its engine, and prompts."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaTokenizer

from benchmarks.full_size import FULL, ModelSize, chat_config, make_model
from benchmarks.gpu.bench import Bench
from llava.constants import IMAGE_TOKEN_INDEX
from llava.engine import Engine
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.train.flops import Shape, shape_of
from tests.tiny import make_tokenizer

SYSTEM = 35  # tokens before the image in Vicuna's prompt
QUICK = ModelSize(
    hidden=64,
    intermediate=192,
    layers=2,
    heads=4,
    vocabulary=512,
    tower_hidden=64,
    tower_intermediate=128,
    tower_layers=5,
    tower_heads=4,
)
WORKSPACE = 1.1  # memory of a forward pass, as a multiple of the weights


def size_of(bench: Bench) -> ModelSize:
    return QUICK if bench.quick else FULL


def pixels_of(bench: Bench) -> int:
    return 56 if bench.quick else 336


def planned_shape(bench: Bench) -> Shape:
    """The shape of the model, without creating it."""
    config = chat_config(size_of(bench), pixels_of(bench))
    return shape_of(config, build_vision_tower(config, delay_load=True))


def weight_count(shape: Shape) -> int:
    return shape.language_weights + shape.projector_weights + shape.tower_weights


def full_model(bench: Bench) -> Any:
    """Vicuna-7B with InternViT-6B, created on the device at the first call; skips the part if it does not fit."""
    if bench.model is None:
        needed = weight_count(planned_shape(bench)) * bench.dtype.itemsize * WORKSPACE
        bench.require_memory(needed, "the model in 16-bit precision" if bench.cuda else "the model")
        torch.manual_seed(0)
        bench.model = make_model(bench.device, bench.dtype, pixels=pixels_of(bench), size=size_of(bench))
    return bench.model


@functools.cache
def full_tokenizer(vocabulary: int) -> LlamaTokenizer:
    """A SentencePiece tokenizer of `vocabulary` pieces, so that every token can be decoded."""
    from transformers.convert_slow_tokenizer import import_protobuf  # its protobuf module cannot be loaded twice

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.model"
        make_tokenizer(Path(folder))
        pieces = import_protobuf().ModelProto()
        pieces.ParseFromString(file.read_bytes())
        for number in range(len(pieces.pieces), vocabulary):
            pieces.pieces.add(piece=f"▁w{number}", score=-float(number))
        file.write_bytes(pieces.SerializeToString())
        return LlamaTokenizer(str(file), legacy=False, padding_side="right", model_max_length=4096)


def make_engine(model: Any, **options: Any) -> Engine:
    """An engine that ignores end-of-sequence."""
    tokenizer = full_tokenizer(model.config.vocab_size)
    engine = Engine(model, tokenizer, model.get_vision_tower().image_processor, **options)
    engine.special.end = frozenset()
    return engine


def random_ids(count: int, vocabulary: int, generator: torch.Generator) -> list[int]:
    """Text tokens, none of them special."""
    return torch.randint(300, vocabulary, (count,), generator=generator).tolist()


def image_prompt(before: list[int], behind: list[int]) -> list[int]:
    return [1, *before, IMAGE_TOKEN_INDEX, *behind]


def random_image(pixels: int, generator: torch.Generator) -> Tensor:
    return torch.randn(3, pixels, pixels, generator=generator)
