"""A model on several devices has the logits of one device, on simulated GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.engine import Engine, Request, SamplingParams
from llava.errors import ConfigError
from llava.model import builder, dispatch
from llava.model.builder import load_pretrained_model
from llava.model.llava_arch import parameter_shapes
from llava.model.quantization import Quantizer
from llava.placement import Placement
from tests import devices, tiny
from tests.model.test_builder import IDS, PIXELS, load

APART = {"model.vision_tower": "cuda:0", "model.mm_projector": "cuda:1", "model": "cuda:2", "lm_head": "cuda:3"}
IN_ORDER = {
    "": "cuda:0",
    "model.layers.0": "cuda:1",
    "model.layers.1": "cuda:2",
    "model.norm": "cuda:3",
    "lm_head": "cuda:3",
}
MPT_IN_ORDER = {"": "cuda:0", "transformer.blocks.0": "cuda:1", "transformer.blocks.1": "cuda:2"}


@pytest.fixture
def simulated() -> Iterator[None]:
    with devices.simulated_cuda(count=4):
        yield


def answer(model: Any) -> torch.Tensor:
    options = {"max_new_tokens": 5, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    tokens: torch.Tensor = model.generate(IDS.to(model.device), images=PIXELS, **options).cpu()
    return tokens


def test_the_pretence_notices_what_a_gpu_would() -> None:
    with devices.simulated_cuda(count=2):
        near, far = torch.ones(2, 2, device="cuda:0"), torch.ones(2, 2, device="cuda:1")
        with pytest.raises(RuntimeError, match=r"aten.add.Tensor got tensors on cuda:0, cuda:1"):
            near + far
        with pytest.raises(RuntimeError, match=r"cuda:0"):
            near @ torch.ones(2, 2)
        assert (near + far.to("cuda:0")).device == torch.device("cuda:0")
        assert (near + far.to("cuda:0")).cpu().tolist() == [[2, 2], [2, 2]]


@pytest.mark.parametrize("device_map", [APART, IN_ORDER], ids=["by part", "in order"])
@torch.no_grad()
def test_a_four_way_split_gives_the_same(
    tiny_dirs: dict[str, Path], simulated: None, device_map: dict[str, str]
) -> None:
    alone = load(tiny_dirs["chat"])
    tokenizer, split, processor, _ = load_pretrained_model(tiny_dirs["chat"], device="cpu", device_map=device_map)
    used = {str(parameter.device) for parameter in split.parameters()}
    assert used == {"cuda:0", "cuda:1", "cuda:2", "cuda:3"}
    got = split(IDS, images=PIXELS).logits
    assert got.device.type == "cpu"
    torch.testing.assert_close(got, alone(IDS, images=PIXELS).logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(answer(split), answer(alone))
    params = SamplingParams(max_new_tokens=5)
    prompts = ["<image>\nWhat color?", "<image>\nWhat shape is it?", "Why?"]
    requests = [Request(prompt, [PIXELS[0]] * prompt.count("<image>"), params) for prompt in prompts]
    engines = [Engine(model, tokenizer, processor) for model in (split, alone)]
    answers = [[answer.token_ids for answer in engine.generate(requests)] for engine in engines]
    assert answers[0] == answers[1]
    layers = [next(layer.parameters()).device for layer in split.model.layers]
    cache = engines[0].model_runner.spec.empty(3, 4)
    assert [cache[layer, 0].device for layer in range(2)] == layers  # no step carries keys and values
    assert cache.nbytes == engines[1].model_runner.spec.empty(3, 4).nbytes and cache.shape[0] == 2
    with pytest.raises(IndexError, match="layer 2 of 2"):
        cache[2, 0]
    for move in (split.cpu, split.half, lambda: split.to("cpu")):
        with pytest.raises(ConfigError, match=r"split over cuda:0, .*cannot be moved"):
            move()


@torch.no_grad()
def test_without_the_carriers_it_fails(tiny_dirs: dict[str, Path], simulated: None, monkeypatch: Any) -> None:
    monkeypatch.setattr(builder, "dispatch", lambda model, placement: None)
    split = load_pretrained_model(tiny_dirs["chat"], device="cpu", device_map=IN_ORDER)[1]
    with pytest.raises(RuntimeError, match="got tensors on"):
        split(IDS, images=PIXELS)


@torch.no_grad()
def test_mpt_and_its_tied_head(tiny_dirs: dict[str, Path], tmp_path: Path, simulated: None) -> None:
    chat = tiny.make_mpt_chat(tmp_path, tiny_dirs["tower"])
    alone = load(chat)
    tokenizer, split, _, _ = load_pretrained_model(chat, device="cpu", device_map=MPT_IN_ORDER)
    assert {str(p.device) for p in split.parameters()} == {"cuda:0", "cuda:1", "cuda:2"}
    torch.testing.assert_close(split(IDS, images=PIXELS).logits, alone(IDS, images=PIXELS).logits)
    assert torch.equal(answer(split), answer(alone))
    requests = [Request(prompt, params=SamplingParams(max_new_tokens=5)) for prompt in ("Why?", "What is it?")]
    answers = [[one.token_ids for one in Engine(m, tokenizer).generate(requests)] for m in (split, alone)]
    assert answers[0] == answers[1]


def budgets(*sizes: int) -> dict[torch.device, int]:
    return {torch.device("cuda", index): size for index, size in enumerate(sizes)}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, simulated: None) -> Any:
    """A machine with simulated GPUs; the returned function sets the memory of each in bytes."""

    def offer(*sizes: int) -> None:
        monkeypatch.setattr(dispatch, "gpu_budgets", lambda num, limit: budgets(*sizes[:num]))

    return offer


def test_one_gpu_if_it_fits_else_as_few_as_hold_it(tiny_dirs: dict[str, Path], gpus: Any) -> None:
    def where(**kwargs: Any) -> dict[str, str]:
        model = load_pretrained_model(tiny_dirs["chat"], dtype="float32", attn_implementation="sdpa", **kwargs)[1]
        return {name: str(parameter.device) for name, parameter in model.named_parameters()}

    gpus(10**9, 10**9)
    assert set(where().values()) == {"cuda:0"}
    gpus(330_000, 400_000, 400_000, 400_000)
    found = where()
    assert set(found.values()) == {"cuda:0", "cuda:1"}
    assert {d for n, d in found.items() if "tower" in n or "projector" in n or "embed" in n} == {"cuda:0"}
    assert found["model.norm.weight"] == found["lm_head.weight"] == "cuda:1"
    gpus(300_000, 100_000)
    with pytest.raises(ConfigError, match=r"do not fit .*cuda:0 0.0, cuda:1 0.0.*--load-4bit"):
        where()
    gpus(10**9, 10**9, 10**9)
    assert set(where(num_gpus=1).values()) == {"cuda:0"}


def test_the_parts_are_all_of_the_model(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    for chat, tied in ((tiny_dirs["chat"], False), (tiny.make_mpt_chat(tmp_path, tiny_dirs["tower"]), True)):
        model = load(chat)
        config = builder.read_config(builder.ckpt.inspect(chat))
        config.name_or_path = str(chat)
        shapes = builder.all_shapes(chat, config, True)
        parts = dispatch.split_parts(shapes, "fp32", tied)
        assert sum(size for _, size in parts) == 4 * sum(parameter.numel() for parameter in model.parameters())
        wanted = sorted(parameter_shapes(model))
        assert len(shapes) == len(wanted)
        names = [name for names, _ in parts for name in names]
        placement = Placement({name: torch.device("meta", at) for at, name in enumerate(names)})
        first = placement.of("model.vision_tower.vision_tower.x")
        assert first == placement.of(model.base_model_prefix + ".embed_tokens.weight")
        assert (placement.of("lm_head.weight") == first) is tied


def test_faults(tiny_dirs: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="require --device cuda, got cpu"):
        load(tiny_dirs["chat"], max_memory="1GiB")
    with pytest.raises(ConfigError, match="A device map excludes --num-gpus"):
        load_pretrained_model(tiny_dirs["chat"], device="cpu", device_map={"": "cpu"}, num_gpus=2)
    with pytest.raises(ConfigError, match=r'add an entry ""'):
        load_pretrained_model(tiny_dirs["chat"], device="cpu", device_map={"model": "cpu"})
    with pytest.raises(ConfigError, match="'cuda:1' is not available: no CUDA GPU"):
        load_pretrained_model(tiny_dirs["chat"], device="cpu", device_map={"": 1})


def test_packed_layers_go_to_their_own_device(tiny_dirs: dict[str, Path], monkeypatch: Any) -> None:
    placed = []
    plain = Quantizer.layer

    def layer(self: Quantizer, weight: torch.Tensor, bias: Any, device: torch.device) -> torch.nn.Module:
        placed.append(str(device))
        return plain(self, weight, bias, torch.device("cpu"))

    monkeypatch.setattr(Quantizer, "layer", layer)
    monkeypatch.setattr(dispatch, "resolve_device", torch.device)
    monkeypatch.setattr(builder, "dispatch", lambda model, placement: None)
    device_map = {"": "cpu", "model.layers.1.self_attn": "meta", "model.layers.1.mlp": "meta"}
    load_pretrained_model(tiny_dirs["chat"], device="cpu", device_map=device_map, load_8bit=True)
    assert sorted(placed) == ["cpu"] * 7 + ["meta"] * 7
