"""Make the tiny checkpoints the tests run on, in the published layouts, seeded: `python -m tests.tiny OUT_DIR`.

Nothing is stored in git: a tower, a base language model with its tokenizer, and chat models made of both take under
a second and a megabyte. Weights are random, so a test compares numbers, never answers.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
import torch
from safetensors.torch import load_file
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPTNeoXTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    MptConfig,
    MptForCausalLM,
)

from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_mpt import LlavaMptConfig, LlavaMptForCausalLM
from llava.model.multimodal_encoder.intern_vit_6b import InternVisionConfig, InternVisionModel
from llava.model.registry import language_model_spec

TOWER = "intern_vit_6b_tiny_224px"
BASE = "vicuna-tiny"
CHAT = "internvl-chat-tiny"
CORPUS = """A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful,
detailed, and polite answers to the user's questions. USER: What color is the shape? ASSISTANT: The shape is red.
Is there a blue circle in the picture? yes no. Answer the question using a single word or phrase. Human Assistant
What shape is present in the image? rectangle triangle circle brown gray green teal yellow black
Describe the image concisely. A small picture of a cat on a mat, two dogs and 37 birds. Why? Because it is so."""


def make_tokenizer(directory: Path) -> LlamaTokenizer:
    """A SentencePiece model with LLaMA's special pieces and byte fallback, 384 entries, trained on `CORPUS`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines() * 4),
        model_writer=model,
        vocab_size=384,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        add_dummy_prefix=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "tokenizer.model"
    path.write_bytes(model.getvalue())
    tokenizer = LlamaTokenizer(str(path), legacy=False, padding_side="right", model_max_length=2048)
    tokenizer.save_pretrained(directory)
    return tokenizer


def make_tower(directory: Path, *, image_size: int = 224, layers: int = 6, seed: int = 0, **overrides: Any) -> Path:
    """An InternViT directory: width 32, 2 heads, patch 14 (so 576 tokens at 336 px unless `patch_size` is given)."""
    torch.manual_seed(seed)
    config = InternVisionConfig(
        **{
            "hidden_size": 32,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "image_size": image_size,
            **overrides,
        }
    )
    model = InternVisionModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(directory)
    return directory


def llama_settings(**overrides: Any) -> dict[str, Any]:
    return {
        "vocab_size": 384,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        **overrides,
    }


def make_base(directory: Path, *, seed: int = 1, **overrides: Any) -> Path:
    """A plain LLaMA directory with its tokenizer."""
    tokenizer = make_tokenizer(directory)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**llama_settings(vocab_size=len(tokenizer), **overrides)))
    model.save_pretrained(directory)
    return directory


def make_mpt_tokenizer(directory: Path) -> Any:
    """A byte-level BPE with the ChatML tokens that MPT's template needs, called what MPT calls it."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>", "<|padding|>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines() * 4, trainer)
    fast = GPTNeoXTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=special[2:], model_max_length=2048, padding_side="right"
    )
    fast.save_pretrained(directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "GPTNeoXTokenizer"  # as published; there is no slow one
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return fast


def mpt_settings(**overrides: Any) -> dict[str, Any]:
    return {
        "vocab_size": 384,
        "d_model": 48,
        "n_heads": 3,
        "n_layers": 2,
        "max_seq_len": 1024,
        "attn_config": {"clip_qkv": 6.0},
        "initializer_range": 0.2,
        **overrides,
    }


def make_mpt_base(directory: Path, *, seed: int = 1, **overrides: Any) -> Path:
    """A plain MPT directory with its tokenizer and, as published, more embedding rows than that has entries."""
    make_mpt_tokenizer(directory)
    torch.manual_seed(seed)
    MptForCausalLM(MptConfig(**mpt_settings(**overrides))).save_pretrained(directory)
    return directory


def make_mpt_chat(directory: Path, tower: Path, *, seed: int = 2, **overrides: Any) -> Path:
    """A full chat checkpoint on MPT, in the layout of LLaVA-MPT."""
    make_mpt_tokenizer(directory)
    torch.manual_seed(seed)
    image = {**image_settings(tower), "conv_template": "mpt"}
    LlavaMptForCausalLM(LlavaMptConfig(**mpt_settings(**{**image, **overrides}))).save_pretrained(directory)
    return directory


def image_settings(tower: Path) -> dict[str, Any]:
    """The keys that make a language model's configuration a chat model's. Images are 56x56 (16 tokens), to be quick."""
    return {
        "mm_vision_tower": str(tower),
        "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -4,
        "mm_vision_select_feature": "patch",
        "mm_vision_image_size": 56,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "conv_template": "v1",
        "use_mm_proj": True,
    }


def make_chat(directory: Path, tower: Path, *, seed: int = 2, embed_tower: bool = False, **overrides: Any) -> Path:
    """A full chat checkpoint: language model, projector and, with `embed_tower`, the tower's weights too."""
    tokenizer = make_tokenizer(directory)
    torch.manual_seed(seed)
    config = LlavaConfig(
        **llama_settings(
            **{
                "vocab_size": len(tokenizer),
                **image_settings(tower),
                **overrides,
            }
        )
    )
    model = LlavaLlamaForCausalLM(config)
    if embed_tower:
        model.get_vision_tower().load_model()
    model.generation_config.pad_token_id = 0
    model.save_pretrained(directory)
    return directory


def make_clip_tower(directory: Path, *, seed: int = 3, **overrides: Any) -> Path:
    """A CLIP directory with its image processor: width 32, 4 layers, 56x56 images in patches of 14 (16 tokens)."""
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        **overrides,
    }
    CLIPVisionModel(CLIPVisionConfig(**settings)).save_pretrained(directory)
    size = settings["image_size"]
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size=size).save_pretrained(directory)
    return directory


def make_projector_only(directory: Path, chat: Path) -> Path:
    """What stage 1 leaves: the configuration and projector of a chat checkpoint (one safetensors file)."""
    directory.mkdir(parents=True)
    shutil.copy(chat / "config.json", directory)
    state = load_file(chat / "model.safetensors")
    torch.save({name: value for name, value in state.items() if "mm_projector" in name}, directory / "mm_projector.bin")
    return directory


def make_lora(directory: Path, chat: Path, base: Path, *, seed: int = 4, name_base: bool = True, **lora: Any) -> Path:
    """What a LoRA run leaves: adapter (default: on q and v projections), projector of a chat model, config.json."""
    import peft

    torch.manual_seed(seed)
    spec = language_model_spec(json.loads((chat / "config.json").read_text())["model_type"], str(chat))
    config = spec.config.from_pretrained(chat)
    given = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **lora}
    model = peft.get_peft_model(spec.model(config), peft.LoraConfig(**given))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.3)
    model.peft_config["default"].base_model_name_or_path = str(base) if name_base else None
    model.save_pretrained(directory, save_embedding_layers=False)
    config.save_pretrained(directory)
    state = load_file(chat / "model.safetensors")
    projector = {f"base_model.model.{name}": value for name, value in state.items() if "mm_projector" in name}
    torch.save(projector, directory / "non_lora_trainables.bin")
    return directory


def make_all(root: Path) -> dict[str, Path]:
    """Every directory above under `root`, by name; the chat model refers to the tower by an absolute path."""
    tower = make_tower(root / TOWER)
    return {
        "tower": tower,
        "base": make_base(root / BASE),
        "chat": make_chat(root / CHAT, tower),
    }


if __name__ == "__main__":
    print(json.dumps({name: str(path) for name, path in make_all(Path(sys.argv[1])).items()}, indent=2))
