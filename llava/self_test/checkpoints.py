"""Tiny checkpoints with seeded random weights in the published layouts, one of each kind.

Head sizes are those of the published models (128 for Vicuna and InternViT, 64 for CLIP), so that the device selects the
same kernels. The weights are large enough for every position and every image to affect the logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # type: ignore[import-untyped]
from torch import Tensor, nn

from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_mpt import LlavaMptConfig, LlavaMptForCausalLM
from llava.model.multimodal_encoder.intern_vit_6b import InternVisionConfig, InternVisionModel

PIXELS: Final = 112  # side of an image: 8 x 8 patches of 14 pixels
EOS: Final = 2
VOCABULARY: Final = 320
RANK, ALPHA = 8, 16  # of the adapter
COMMON: Final[dict[str, int]] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": EOS}
LLAMA: Final[dict[str, int]] = {
    **COMMON, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
GROUPED: Final[dict[str, int]] = {"num_attention_heads": 4, "num_key_value_heads": 2}  # grouped-query attention
MPT: Final[dict[str, int]] = {**COMMON, "d_model": 192, "n_heads": 3, "n_layers": 2, "max_seq_len": 512}
TOWER: Final[dict[str, int]] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "image_size": PIXELS, "patch_size": 14,
}  # fmt: skip
CHAT: Final[Mapping[str, object]] = {
    "mm_hidden_size": TOWER["hidden_size"], "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch", "mm_vision_image_size": PIXELS, "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False, "image_aspect_ratio": "pad", "use_mm_proj": True,
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory, its base (if any), and the expected weights of the loaded model, by name."""

    path: Path
    base: Path | None
    weights: Mapping[str, Tensor]


def randomize(module: nn.Module, seed: int) -> None:
    """Random weights with gain 1.25 (LM head 2); norms near 1, small biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.copy_(noise * 0.1 + (0.0 if name.endswith("bias") else 1.0))
            elif "embed" in name:
                parameter.copy_(noise)
            else:
                gain = 2.0 if "lm_head" in name or "wte" in name else 1.25
                parameter.copy_(noise * gain / parameter[0].numel() ** 0.5)


def make_tower(directory: Path, kind: str, seed: int) -> dict[str, Tensor]:
    """Save a tower, and return the weights that affect the features (those of the last layer do not)."""
    tower: transformers.CLIPVisionModel | InternVisionModel
    if kind == "clip":
        tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TOWER, num_attention_heads=4))
        transformers.CLIPImageProcessor(size={"shortest_edge": PIXELS}, crop_size=PIXELS).save_pretrained(directory)
    else:
        tower = InternVisionModel(InternVisionConfig.from_dict({**TOWER, "num_attention_heads": 2}))
    randomize(tower, seed)
    tower.save_pretrained(directory)
    unused = ("layers.2.", "post_layernorm.")
    return {name: value for name, value in tower.state_dict().items() if not any(part in name for part in unused)}


def save(directory: Path, config: transformers.PretrainedConfig, weights: Mapping[str, Tensor]) -> None:
    """Save configuration, weights, and a byte-level tokenizer padded to the vocabulary size."""
    config.save_pretrained(directory)
    copies = {name: value.clone() for name, value in weights.items()}
    save_file(copies, directory / "model.safetensors", {"format": "pt"})
    pieces = ["<pad>", "<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [f"<{index}>" for index in range(len(pieces), VOCABULARY)]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)


def make_weights(
    root: Path, kind: str, seed: int
) -> tuple[transformers.PretrainedConfig, dict[str, Tensor], dict[str, Tensor]]:
    """Configuration of a chat model, its weights without the tower, and the weights of the tower."""
    directory = root / f"{'clip' if kind == 'clip' else 'intern_vit_6b'}-tower"
    tower, settings = make_tower(directory, kind, seed), {**CHAT, "mm_vision_tower": str(directory)}
    model: LlavaLlamaForCausalLM | LlavaMptForCausalLM
    if kind == "mpt":
        model = LlavaMptForCausalLM(LlavaMptConfig(**MPT, **settings))
    else:
        model = LlavaLlamaForCausalLM(LlavaConfig(**{**LLAMA, **(GROUPED if kind == "clip" else {}), **settings}))
    randomize(model, seed + 1)
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[EOS] = 0.0  # never sampled, so answers have the requested length
    prefix = f"{model.base_model_prefix}.vision_tower.vision_tower."
    return model.config, dict(model.state_dict()), {f"{prefix}{name}": value for name, value in tower.items()}


def make_chat(root: Path, kind: str, seed: int) -> Checkpoint:
    """A full chat checkpoint and its tower directory; `kind` is llama (with InternViT), clip or mpt."""
    config, weights, tower = make_weights(root, kind, seed)
    save(root / "chat", config, weights)
    return Checkpoint(root / "chat", None, {**weights, **tower})


def make_projector(root: Path, kind: str, seed: int) -> Checkpoint:
    """A pretraining checkpoint (configuration and `mm_projector.bin`) and its LLaMA base."""
    config, weights, tower = make_weights(root, kind, seed)
    projector = {name: value for name, value in weights.items() if "mm_projector." in name}
    save(
        root / "base",
        transformers.LlamaConfig(**LLAMA),
        {n: value for n, value in weights.items() if n not in projector},
    )
    config.save_pretrained(root / "projector")
    torch.save(projector, root / "projector" / "mm_projector.bin")
    return Checkpoint(root / "projector", root / "base", {**weights, **tower})


def make_adapter(root: Path, kind: str, seed: int) -> Checkpoint:
    """A LoRA checkpoint: the adapter, the projector in `non_lora_trainables.bin`, and the base named in its config."""
    made = make_projector(root, kind, seed)
    generator = torch.Generator().manual_seed(seed + 2)
    weights, adapter, modules = dict(made.weights), {}, ("q_proj", "v_proj")
    for name, weight in made.weights.items():
        if name.split(".")[-2] in modules and "vision_tower" not in name:
            down = torch.randn(RANK, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
            up = torch.randn(weight.shape[0], RANK, generator=generator) / weight.shape[0] ** 0.5
            module = f"base_model.model.{name.removesuffix('.weight')}"
            adapter.update({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up})
            weights[name] = weight + ALPHA / RANK * up @ down
    directory = root / "adapter"
    LlavaConfig.from_pretrained(made.path).save_pretrained(directory)
    save_file(adapter, directory / "adapter_model.safetensors", {"format": "pt"})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA,
                "target_modules": list(modules), "base_model_name_or_path": str(made.base)}  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    projector = {f"base_model.{n}": value for n, value in weights.items() if "mm_projector." in n}
    torch.save(projector, directory / "non_lora_trainables.bin")
    return Checkpoint(directory, None, weights)


KINDS: Final[Mapping[str, Callable[[Path, str, int], Checkpoint]]] = {
    **dict.fromkeys(("llama", "clip", "mpt"), make_chat), "projector": make_projector, "adapter": make_adapter,
}  # fmt: skip
