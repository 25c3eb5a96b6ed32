"""Extract the projector of a trained model: `llava extract-projector --model-path DIR --output OUT`.

OUT has the layout of a pretraining (stage 1) checkpoint, `config.json` and `mm_projector.bin` with the same weights as
`mm_projector.safetensors`: it loads with `--model-base`, and either file is valid for `--pretrain_mm_mlp_adapter`. DIR
is a full checkpoint (.bin or safetensors, sharded or not) or a LoRA run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llava.errors import CheckpointError
from llava.files import atomic_directory
from llava.model import checkpoint as ckpt
from llava.model.builder import read_config
from llava.model.checkpoint import Kind
from llava.model.llava_arch import parameter_shapes
from llava.model.lora import read_non_lora
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.saving import write_json, write_tensors
from llava.model.weights import empty_weights
from llava.utils import guarded


def is_pretrained(name: str, config: Mapping[str, object]) -> bool:
    """Whether pretraining saves this weight: the projector, and what the flags in `config` made trainable."""
    rows = bool(config.get("mm_use_im_start_end")) and name in ckpt.EMBEDDINGS
    table = bool(config.get("tune_vit_pos_embedding")) and name.endswith("vision_tower.embeddings.position_embedding")
    return "mm_projector." in name or rows or table


def projector_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The contents of `mm_projector.bin` for the model in `path`, by full name, and the model's configuration."""
    found = ckpt.inspect(path)
    if found.kind is Kind.LORA and found.config:
        state = {name: tensor for name, tensor in read_non_lora(path).items() if is_pretrained(name, found.config)}
    elif found.kind is Kind.FULL:
        tensors = ckpt.iter_tensors(path, lambda name: is_pretrained(name, found.config))
        state = {name: tensor.clone() for name, tensor in tensors}
    else:
        raise CheckpointError(f"{path} holds {found.kind.value}; --model-path must be a full checkpoint or a LoRA run.")
    with ckpt.config_errors(path), empty_weights():
        wanted = parameter_shapes(build_vision_projector(read_config(found)))
    projector = ckpt.projector_state(state, path)
    ckpt.compare_shapes({name: tuple(tensor.shape) for name, tensor in projector.items()}, wanted, path)
    return state, found.config


def extract(model_path: str | Path, output: str | Path) -> list[str]:
    """Write the projector-only checkpoint `output`, read it back, and return the names of its weights."""
    state, config = projector_weights(Path(model_path))
    with atomic_directory(output) as directory:
        write_json(directory / "config.json", config)
        write_tensors(directory / ckpt.PROJECTOR_FILE, state)
        written = ckpt.read_tensors(directory / ckpt.PROJECTOR_FILE)
        if written.keys() != state.keys() or not all(torch.equal(written[name], state[name]) for name in state):
            raise CheckpointError(f"The projector written differs from that of {model_path}; nothing was kept.")
    return sorted(state)


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", required=True, help="directory of the trained model")
    parser.add_argument("--output", required=True, help="new directory for the projector")
    args = parser.parse_args(argv)
    names = extract(args.model_path, args.output)
    print(f"{args.output}: {', '.join(names)}")  # noqa: T201 (a program)
    return 0


if __name__ == "__main__":
    sys.exit(main())
