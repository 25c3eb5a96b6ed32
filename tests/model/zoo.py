"""Tiny directories of every kind in the published layouts: `make(root)` (seeded; nothing is stored in git).

`LOADS` are those that load, with what they need beside them; `REFUSED` are the others, with words of the refusal.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPImageProcessor, LlamaForCausalLM

from llava.model.multimodal_encoder.clip_encoder import TOWER as CLIP
from llava.model.multimodal_encoder.internvl_14b import TOWER as INTERNVL
from tests import tiny

TOWER_KEYS = "model.vision_tower.vision_tower."
EVA: Final = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 2, "image_size": 56, "patch_size": 14, "q_bias": True, "k_bias": False, "v_bias": True,
}  # fmt: skip
INTERNVL_14B: Final = {
    "model_type": "internvl",
    "vision_config": {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "num_hidden_layers": 3,
                      "image_size": 56},
    "qllama_config": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                      "vocab_size": 9},
    "num_query_token": 5,
}  # fmt: skip
LEFTOVERS = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin", "run.json")
Make = Callable[["Shelf", Path], None]


@dataclass(frozen=True)
class Shelf:
    """The sources of all directories: towers, bases, and chat models with their weights."""

    root: Path
    tower: Path
    clip: Path
    base: Path
    chat: Path
    mpt_base: Path
    mpt_chat: Path
    lora: Path

    def copy(self, name: str, directory: Path) -> Path:
        return shutil.copytree(getattr(self, name), directory, dirs_exist_ok=True)


@dataclass(frozen=True)
class Loads:
    """A function that makes a directory, its base, its class, and further arguments of the loader."""

    make: Make
    base: str | None = None
    model: str = "LlavaLlamaForCausalLM"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Refused:
    make: Make
    words: str
    base: str | None = None


def shelf(root: Path) -> Shelf:
    tower, base = tiny.make_tower(root / "tower"), tiny.make_base(root / "base")
    chat = tiny.make_chat(root / "chat", tower)
    return Shelf(
        root=root,
        tower=tower,
        clip=tiny.make_clip_tower(root / "clip"),
        base=base,
        chat=chat,
        mpt_base=tiny.make_mpt_base(root / "mpt-base"),
        mpt_chat=tiny.make_mpt_chat(root / "mpt-chat", tower),
        lora=tiny.make_lora(root / "lora", chat, base),
    )


def edit(directory: Path, *, drop: tuple[str, ...] = (), **changes: Any) -> None:
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))


def take_weights(directory: Path) -> dict[str, Tensor]:
    file = directory / "model.safetensors"
    weights = load_file(file)
    file.unlink()
    return weights


def put(directory: Path, weights: dict[str, Tensor], *, shards: int = 1, bin_files: bool = False) -> None:
    """Write weights as one file or as shards with an index, optionally as `.bin`."""
    stem, suffix = ("pytorch_model", ".bin") if bin_files else ("model", ".safetensors")
    names = sorted(weights)
    index = {}
    for number in range(shards):
        part = {name: weights[name].clone() for name in names[number::shards]}
        tail = f"-{number + 1:05d}-of-{shards:05d}" if shards > 1 else ""
        file = directory / f"{stem}{tail}{suffix}"
        torch.save(part, file) if bin_files else save_file(part, file, metadata={"format": "pt"})
        index.update(dict.fromkeys(part, file.name))
    if shards > 1:
        text = json.dumps({"metadata": {"total_size": 0}, "weight_map": index})
        (directory / f"{stem}{suffix}.index.json").write_text(text)


# --- full checkpoints ----------------------------------------------------------------------------------------------


def full(
    *,
    source: str = "chat",
    config: dict[str, Any] | None = None,
    weights: Callable[[Shelf, dict[str, Tensor]], dict[str, Tensor]] | None = None,
    drop: tuple[str, ...] = (),
    **how: Any,
) -> Make:
    """A copy of a chat model with changed configuration and weights, written in the format `how`."""

    def make(shelf: Shelf, directory: Path) -> None:
        shelf.copy(source, directory)
        edit(directory, drop=drop, **(config or {}))
        if weights or how:
            state = take_weights(directory)
            put(directory, weights(shelf, state) if weights else state, **how)

    return make


def old_pickle(shelf: Shelf, directory: Path) -> None:
    """A `.bin` in the format of PyTorch before 1.6."""
    shelf.copy("chat", directory)
    torch.save(take_weights(directory), directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def with_tower(shelf: Shelf, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, **{TOWER_KEYS + k: v for k, v in load_file(shelf.tower / "model.safetensors").items()}}


def with_resized_tower(shelf: Shelf, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """577 positions for a tower with 257, as in InternVL-Chat-ViT-6B-Vicuna-7B."""
    torch.manual_seed(7)
    return {**with_tower(shelf, state), TOWER_KEYS + "embeddings.position_embedding": torch.randn(1, 577, 32)}


def with_rotary(shelf: Shelf, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}


def padded(shelf: Shelf, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """More embedding rows than tokenizer entries."""
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    return {**state, **{name: torch.cat([state[name], torch.zeros(16, 48)]) for name in tables}}


def half(shelf: Shelf, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.half() for name, tensor in state.items()}


def chat_of(tower: str | None = None, **settings: Any) -> Make:
    """A new chat model, for settings that change shapes."""

    def make(shelf: Shelf, directory: Path) -> None:
        tiny.make_chat(directory, getattr(shelf, tower or "tower"), **settings)

    return make


def beside(shelf: Shelf, directory: Path) -> None:
    """The tower's path is that of the training host; the checkpoint contains a folder of the same name."""
    shelf.copy("chat", directory)
    shelf.copy("tower", directory / "intern_vit_6b")
    edit(directory, mm_vision_tower="./pretrained/intern_vit_6b")


def written_tower(directory: Path, settings: dict[str, Any], spec: Any, layers: int) -> Path:
    torch.manual_seed(5)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(settings))
    weights = spec.build(spec.config(settings), layers).state_dict()
    save_file({name: torch.randn_like(value) * 0.3 + ("norm" in name) for name, value in weights.items()},
              directory / "model.safetensors")  # fmt: skip
    CLIPImageProcessor(size=56, crop_size=56).save_pretrained(directory)
    return directory


def eva(shelf: Shelf, directory: Path) -> None:
    tower = written_tower(shelf.root / "eva-tower", EVA, CLIP, 3)
    tiny.make_chat(directory, tower, mm_vision_select_layer=-1)


def internvl_14b(shelf: Shelf, directory: Path) -> None:
    tower = written_tower(shelf.root / "14b-tower", INTERNVL_14B, INTERNVL, 3)
    settings = {"mm_projector_type": "two_mlp", "mm_hidden_size": 16, "mm_image_hidden_size": 32}
    tiny.make_chat(directory, tower, mm_vision_select_layer=-1, **settings)


# --- with a base ---------------------------------------------------------------------------------------------------


def projector(source: str = "chat", *, positions: bool = False, tokens: bool = False) -> Make:
    def make(shelf: Shelf, directory: Path) -> None:
        tiny.make_projector_only(directory, getattr(shelf, source))
        extra: dict[str, Tensor] = {}
        if positions:
            extra[TOWER_KEYS + "embeddings.position_embedding"] = torch.full((1, 257, 32), 0.5)
            edit(directory, tune_vit_pos_embedding=True)
        if tokens:
            extra["model.embed_tokens.weight"] = torch.full((386, 48), 0.5)
            edit(directory, mm_use_im_start_end=True, tune_mm_mlp_adapter=True, vocab_size=386)
        file = directory / "mm_projector.bin"
        torch.save({**torch.load(file, weights_only=True), **extra}, file)

    return make


def adapter(*, bin_file: bool = False, leftovers: bool = False, packed: bool = False, nameless: bool = False) -> Make:
    def make(shelf: Shelf, directory: Path) -> None:
        shelf.copy("lora", directory)
        file = directory / "adapter_model.safetensors"
        if bin_file:
            torch.save(load_file(file), directory / "adapter_model.bin")
            file.unlink()
        for name in LEFTOVERS if leftovers else ():
            (directory / name).write_bytes(b"of the training run; nobody reads this to load a model")
        if packed:
            edit(directory, quantization_config={"load_in_4bit": True, "quant_method": "bitsandbytes"})
        if nameless:
            path = directory / "adapter_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))

    return make


def text_adapter(shelf: Shelf, directory: Path) -> None:
    """A PEFT adapter of a language model, without chat configuration and fully trained weights."""
    import peft

    torch.manual_seed(6)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(shelf.base), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(directory, save_embedding_layers=False)


# --- what is refused -----------------------------------------------------------------------------------------------


def foreign(config: dict[str, Any] | None, *files: str) -> Make:
    """A configuration, and files that fail with another error if they are read."""

    def make(shelf: Shelf, directory: Path) -> None:
        directory.mkdir()
        if config is not None:
            (directory / "config.json").write_text(json.dumps(config))
        for file in files:
            (directory / file).write_bytes(b"not read")

    return make


def no_json(shelf: Shelf, directory: Path) -> None:
    directory.mkdir()
    (directory / "config.json").write_text("{")


def delta(shelf: Shelf, directory: Path) -> None:
    shelf.copy("chat", directory)
    base = load_file(shelf.base / "model.safetensors")
    put(directory, {k: v - base[k] if k in base else v for k, v in take_weights(directory).items()})


def cut_short(shelf: Shelf, directory: Path) -> None:
    full(shards=3)(shelf, directory)
    (directory / "model-00002-of-00003.safetensors").unlink()


OLD: Final = {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}
ROPE: Final = {"num_key_value_heads": 1, "rope_scaling": {"type": "linear", "factor": 2.0}, "tie_word_embeddings": True}
TEXT: Final = {"text_only": True}

LOADS: Final[dict[str, Loads]] = {
    "full, one safetensors": Loads(full()),
    "full, sharded safetensors": Loads(full(shards=3)),
    "full, one .bin": Loads(full(bin_files=True)),
    "full, sharded .bin": Loads(full(bin_files=True, shards=3)),
    "full, .bin of an old PyTorch": Loads(old_pickle),
    "full, float16": Loads(full(weights=half, config={"torch_dtype": "float16"})),
    "full, model_type llava": Loads(full(config=OLD)),
    "full, model_type llama": Loads(full(config={"model_type": "llama", "architectures": ["LlamaForCausalLM"]})),
    "full, of an old library": Loads(full(drop=("rope_theta", "attention_bias", "attention_dropout"), config=OLD)),
    "full, rotary tables stored": Loads(full(weights=with_rotary, bin_files=True)),
    "full, padded vocabulary": Loads(full(weights=padded, config={"vocab_size": 400})),
    "full, tower inside": Loads(full(weights=with_tower, shards=2)),
    "full, 577 positions": Loads(full(weights=with_resized_tower, bin_files=True, shards=2, config=OLD)),
    "full, tower beside": Loads(beside),
    "full, start and end tokens": Loads(chat_of(vocab_size=386, mm_use_im_start_end=True)),
    "full, linear projector": Loads(chat_of(mm_projector_type="linear")),
    "full, normed projector": Loads(chat_of(mm_projector_type="mlp2x_gelu_ln")),
    "full, class token kept": Loads(chat_of(mm_vision_select_feature="cls_patch")),
    "full, grouped queries, scaled rope, tied head": Loads(chat_of(**ROPE)),
    "full, CLIP": Loads(chat_of("clip", mm_vision_select_layer=-2)),
    "full, EVA-CLIP": Loads(eva),
    "full, InternVL-14B": Loads(internvl_14b),
    "full, MPT": Loads(full(source="mpt_chat"), model="LlavaMptForCausalLM"),
    "full, MPT, sharded .bin": Loads(full(source="mpt_chat", bin_files=True, shards=2), model="LlavaMptForCausalLM"),
    "projector": Loads(projector(), base="base"),
    "projector, tuned positions": Loads(projector(positions=True), base="base"),
    "projector, start and end tokens": Loads(projector(tokens=True), base="base"),
    "projector, MPT": Loads(projector("mpt_chat"), base="mpt_base", model="LlavaMptForCausalLM"),
    "LoRA": Loads(adapter()),
    "LoRA, base given": Loads(adapter(nameless=True), base="base"),
    "LoRA, adapter_model.bin": Loads(adapter(bin_file=True)),
    "LoRA, checkpoint-N": Loads(adapter(leftovers=True)),
    "QLoRA": Loads(adapter(packed=True)),
    "language model, when asked for": Loads(lambda shelf, directory: shelf.copy("base", directory), options=TEXT),
    "MPT, when asked for": Loads(
        lambda shelf, directory: shelf.copy("mpt_base", directory), model="LlavaMptForCausalLM", options=TEXT
    ),
    "PEFT on a language model": Loads(text_adapter, base="base", options=TEXT),
}

REFUSED: Final[dict[str, Refused]] = {
    "HF-native LLaVA": Refused(
        foreign({"model_type": "llava", "vision_config": {}}, "model.safetensors"), "LlavaForConditionalGeneration"
    ),
    "internvl_chat": Refused(foreign({"model_type": "internvl_chat"}, "model.safetensors"), "InternVL repository"),
    "text-only LLaMA": Refused(foreign({"model_type": "llama"}, "model.safetensors"), "does not take images"),
    "text-only MPT": Refused(foreign({"model_type": "mpt"}, "pytorch_model.bin"), "does not take images"),
    "Qwen2": Refused(foreign({"model_type": "qwen2"}, "model.safetensors"), "another architecture"),
    "tower": Refused(lambda shelf, directory: shelf.copy("tower", directory), "--vision-tower"),
    "empty": Refused(foreign(None), "no checkpoint"),
    "weights alone": Refused(foreign(None, "model.safetensors"), "no checkpoint"),
    "configuration alone": Refused(foreign({"model_type": "llava_llama", "mm_vision_tower": "t"}), "no checkpoint"),
    "configuration that is no JSON": Refused(no_json, "cannot be read as JSON"),
    "delta": Refused(delta, "delta weights.*apply_delta"),
    "cut short": Refused(cut_short, "model-00002-of-00003.*incomplete"),
    "tower nowhere": Refused(full(config={"mm_vision_tower": "/on/the/training/host"}), "was not found; tried /on"),
    "tower of another type": Refused(
        full(config={"mm_vision_tower_config": {"model_type": "siglip"}}), "'siglip', which is not one of"
    ),
    "settings missing": Refused(full(drop=("mm_hidden_size",)), "has no mm_hidden_size"),
    "MPT variant": Refused(
        full(source="mpt_chat", config={"attn_config": {"alibi": False}}), "This MPT has alibi=False"
    ),
    "projector without base": Refused(projector(), "pass --model-base"),
    "projector, wrong base": Refused(projector(), "type 'llava_llama', but --model-base", base="mpt_base"),
    "LoRA without base": Refused(adapter(nameless=True), "pass --model-base"),
    "LoRA without configuration": Refused(text_adapter, "has no config.json", base="base"),
}
