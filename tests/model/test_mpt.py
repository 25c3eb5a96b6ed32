"""MPT: agreement with transformers, loading, the engine, training, and merging."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MptConfig, MptForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from llava.engine import Engine, Request, SamplingParams
from llava.errors import CheckpointError, ConfigError
from llava.mm_utils import tokenizer_image_token
from llava.model import merge
from llava.model.builder import load_pretrained_model
from llava.model.check import examine
from llava.model.consolidate import consolidate_ckpt
from llava.model.extract_projector import extract
from llava.model.language_model.llava_mpt import LlavaMptConfig, LlavaMptForCausalLM, alibi
from llava.train.train import train
from tests import tiny
from tests.model.test_builder import PIXELS, edit_config, load, logits
from tests.train import runs

Dirs = dict[str, Path]
SIZES = {"d_model": 48, "n_heads": 4, "n_layers": 2, "max_seq_len": 32, "vocab_size": 100, "initializer_range": 0.3}
WORDS = torch.arange(20).remainder(7).add(3).view(2, 10)
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 10])


@pytest.fixture(scope="module")
def dirs(tmp_path_factory: pytest.TempPathFactory, tiny_dirs: Dirs) -> Dirs:
    root = tmp_path_factory.mktemp("mpt")
    chat = tiny.make_mpt_chat(root / "chat", tiny_dirs["tower"])
    return {"tower": tiny_dirs["tower"], "base": tiny.make_mpt_base(root / "base"), "chat": chat}


def pair(**settings: Any) -> tuple[Any, Any]:
    """The library's model and ours, with the same weights."""
    torch.manual_seed(0)
    stock = MptForCausalLM(MptConfig(**SIZES)).eval()
    ours = LlavaMptForCausalLM(LlavaMptConfig(**{**SIZES, **settings})).eval()
    ours.load_state_dict(stock.state_dict())
    return stock, ours


@torch.no_grad()
def test_the_librarys_function() -> None:
    stock, ours = pair()
    for mask in (None, MASK):
        want, got = (model(WORDS, attention_mask=mask, output_hidden_states=True) for model in (stock, ours))
        real = MASK.bool() if mask is not None else slice(None)
        assert torch.equal(got.logits[real], want.logits[real])
        assert len(got.hidden_states) == len(want.hidden_states) == 3
    options = {"attention_mask": MASK, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = stock.generate(WORDS, use_cache=True, **options)
    for how in ({"use_cache": True}, {"use_cache": False}, {"use_cache": True, "past_key_values": DynamicCache()}):
        assert torch.equal(ours.generate(WORDS, **how, **options), expected)
    beams = {"use_cache": True, "num_beams": 3, **options}
    assert torch.equal(ours.generate(WORDS, **beams), stock.generate(WORDS, **beams))


@torch.no_grad()
def test_what_the_librarys_cannot() -> None:
    for heads in (1, 4, 32):
        assert torch.equal(alibi(heads, 9, 8, torch.device("cpu")), build_mpt_alibi_tensor(heads, 9))
    assert alibi(3, 4, 8, torch.device("cpu")).shape == (3, 1, 4)
    stock, clamped = pair(attn_config={"clip_qkv": 0.01})
    assert not torch.allclose(clamped(WORDS).logits, stock(WORDS).logits)
    qkv: list[torch.Tensor] = []
    clamped.transformer.blocks[0].attn.Wqkv.register_forward_hook(lambda *call: qkv.append(call[2]))
    cache = DynamicCache()
    clamped(WORDS, past_key_values=cache, use_cache=True)
    assert qkv[0].abs().max() > 0.01
    assert cache.key_cache[0].abs().max() == cache.value_cache[0].abs().max() == pytest.approx(0.01)
    long = torch.ones(1, 50, dtype=torch.long)
    assert clamped(long).logits.isfinite().all()


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("alibi", {"attn_config": {"alibi": False}}),
        ("qk_ln", {"attn_config": {"qk_ln": True}}),
        ("attn_type", {"attn_config": {"attn_type": "multiquery_attention"}}),
        ("expansion_ratio", {"expansion_ratio": 2}),
        ("logit_scale", {"logit_scale": "inv_sqrt_d_model"}),
    ],
)
def test_variants_that_nothing_computes_are_refused(key: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"This MPT has {key}="):
        LlavaMptConfig(**settings)


def test_it_loads_and_is_checked(dirs: Dirs, tmp_path: Path) -> None:
    tokenizer, model, _, context = load_pretrained_model(dirs["chat"], device="cpu")
    assert (type(model), context, len(tokenizer)) == (LlavaMptForCausalLM, 1024, 380)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert [part.name for part in examine(dirs["chat"]).parts] == ["language model", "projector", "vision tower"]
    with pytest.raises(ConfigError, match="supports eager attention only, not sdpa"):
        load(dirs["chat"], attn_implementation="sdpa")
    whole = tmp_path / "whole"  # with the tower inside, perturbed: what is inside wins
    model.get_vision_tower().vision_tower.encoder.layers[1].ls1.data += 1.0
    model.save_pretrained(whole)
    tokenizer.save_pretrained(whole)
    assert torch.equal(logits(load(whole)), logits(model))
    assert not torch.equal(logits(load(whole)), logits(load(dirs["chat"])))
    consolidate_ckpt(whole, tmp_path / "clean", dtype=torch.float32)
    assert torch.equal(logits(load(tmp_path / "clean")), logits(model))
    extract(whole, tmp_path / "projector")
    with pytest.raises(CheckpointError, match=r"'llava_mpt', but --model-base .* 'llama'"):
        load(tmp_path / "projector", tiny.make_base(tmp_path / "llama"))
    projected = load(tmp_path / "projector", dirs["base"])
    assert torch.equal(projected.transformer.mm_projector[0].weight, model.transformer.mm_projector[0].weight)


@torch.no_grad()
def test_the_engine_answers_as_generate_does(dirs: Dirs) -> None:
    tokenizer, model, processor, _ = load_pretrained_model(dirs["chat"], device="cpu")
    prompts = ["<image>\nWhat color is it?", "<image>\nWhat shape is present in the image?", "Why?"]
    given = [[PIXELS[0]] * prompt.count("<image>") for prompt in prompts]
    params = SamplingParams(max_new_tokens=6)
    answers = Engine(model, tokenizer, processor).generate(
        [Request(prompt, images, params) for prompt, images in zip(prompts, given, strict=True)]
    )
    for prompt, images, answer in zip(prompts, given, answers, strict=True):
        ids = torch.tensor([tokenizer_image_token(prompt, tokenizer)])
        pixels = torch.stack(images) if images else None
        alone = model.generate(ids, images=pixels, max_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0)
        assert answer.token_ids == tuple(alone[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("bits", [8, 4])
def test_packed(tiny_dirs: Dirs, tmp_path: Path, bits: int) -> None:
    chat = tiny.make_mpt_chat(tmp_path, tiny_dirs["tower"], d_model=64, n_heads=4)
    full, small = load(chat), load(chat, load_8bit=bits == 8, load_4bit=bits == 4)
    packed = {n for n, p in small.named_parameters() if p.dtype in (torch.int8, torch.uint8)}
    assert len(packed) == 2 * 4
    assert all(".blocks." in name for name in packed)
    want, got = logits(full), logits(small)
    assert (got - want).norm() / want.norm() < (0.05 if bits == 8 else 0.5)


def test_both_stages(dirs: Dirs, tmp_path: Path) -> None:
    """Stage 1 teaches the projector and start and end tokens, stage 2 goes on from it with checkpointing."""
    data = runs.make_data(tmp_path / "mix", samples=8, text_rows=(0, 4))
    shared = {"mm_use_im_start_end": True, "max_steps": 2}
    train(runs.flags(dirs, data, tmp_path / "one", 1, **shared))
    rows = torch.load(tmp_path / "one" / "mm_projector.bin", weights_only=True)["transformer.wte.weight"]
    assert rows.shape == (384, 48)
    stage_two = {"version": "mpt", "gradient_checkpointing": True, **shared}
    file = tmp_path / "one" / "mm_projector.bin"
    train(runs.flags(dirs, data, tmp_path / "two", 2, pretrain_mm_mlp_adapter=file, **stage_two))
    log = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert all(0 < line["loss"] < 20 for line in log if "loss" in line)
    assert json.loads((tmp_path / "two" / "config.json").read_text())["conv_template"] == "mpt"
    tokenizer, model, _, _ = load_pretrained_model(tmp_path / "two", device="cpu")
    assert type(model) is LlavaMptForCausalLM
    assert tokenizer.convert_tokens_to_ids("<im_end>") == 381
    projector = torch.load(file, weights_only=True)["transformer.mm_projector.0.weight"]
    assert not torch.equal(model.transformer.mm_projector[0].weight, projector)
    assert torch.allclose(model.transformer.mm_projector[0].weight, projector, atol=0.1)


def test_an_adapter_is_trained_and_merged(dirs: Dirs, tmp_path: Path) -> None:
    data = runs.make_data(tmp_path / "mix", samples=8)
    more = {"lora_enable": True, "lora_r": 4, "version": "mpt", "max_steps": 2, "learning_rate": 0.05}
    train(runs.flags(dirs, data, tmp_path / "run", 2, **more))
    assert merge.main(["--model-path", str(tmp_path / "run"), "--save-model-path", str(tmp_path / "merged")]) == 0
    torch.testing.assert_close(logits(load(tmp_path / "merged")), logits(load(tmp_path / "run")), atol=1e-4, rtol=1e-4)


def test_a_tokenizer_that_needs_code(dirs: Dirs, tmp_path: Path) -> None:
    chat = shutil.copytree(dirs["chat"], tmp_path / "chat")
    path = chat / "tokenizer_config.json"
    (chat / "tokenizer.json").unlink()
    settings = {
        "tokenizer_class": "SomeoneTokenizer",
        "auto_map": {"AutoTokenizer": ["someone.SomeoneTokenizer", None]},
    }
    path.write_text(json.dumps(settings))
    (chat / "someone.py").write_text("raise SystemExit('run')\n")
    with pytest.raises(CheckpointError, match="SomeoneTokenizer.*Code in checkpoints is not executed"):
        load(chat)
    edit_config(chat, model_type="mpt2")
    with pytest.raises(CheckpointError, match="model of another architecture"):
        load(chat)
