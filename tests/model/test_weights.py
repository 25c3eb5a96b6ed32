"""Loading weights into a model on the meta device: without copies on the CPU, uploaded to CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llava.model import weights
from llava.model.weights import empty_weights, load_weights

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Frozen(nn.Parameter):
    """A parameter subclass."""


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.scale = Frozen(torch.ones(4), requires_grad=False)
        self.table = nn.Parameter(torch.zeros(5, dtype=torch.int32), requires_grad=False)
        self.register_buffer("positions", torch.arange(6), persistent=False)
        self.register_buffer("frequencies", torch.linspace(0, 1, 3, dtype=torch.float64), persistent=False)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Part(), Part()
        self.temperature = nn.Parameter(torch.ones(()))


class FakeUploader:
    """Uploads to the CPU, and records the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.device, torch.dtype] | str] = []
        self.results: list[Tensor] = []

    def upload(self, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        self.calls.append((device, dtype))
        self.results.append(tensor.to(dtype, copy=True))
        return self.results[-1]

    def finish(self) -> None:
        self.calls.append("finish")


@pytest.fixture
def uploader(monkeypatch: pytest.MonkeyPatch) -> FakeUploader:
    fake = FakeUploader()
    monkeypatch.setattr(weights, "PinnedUploader", lambda: fake)
    return fake


def refuse(*args: Any, **kwargs: Any) -> None:
    pytest.fail("called")


def stored() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    state = {name: torch.randn(value.shape, generator=draw) for name, value in Whole().named_parameters()}
    integers = {name: torch.arange(5, dtype=torch.int32) for name in state if name.endswith("table")}
    return {**state, **integers}


def filled(where: torch.device | Callable[[str], torch.device], state: dict[str, Tensor]) -> Whole:
    with empty_weights():
        model = Whole()
    load_weights(model, state.items(), dtype=torch.bfloat16, device=where, source="a test")
    return model


def test_cuda_gets_what_a_cpu_gets(uploader: FakeUploader, monkeypatch: pytest.MonkeyPatch) -> None:
    for costly in ("is_available", "empty_cache"):  # once a tensor, they take longer than the rest of a load
        monkeypatch.setattr(torch.cuda, costly, refuse)
    state = stored()
    near = filled(CPU, state)
    assert uploader.calls == ["finish"]  # a CPU's tensors are not copied by it
    uploader.calls.clear()
    far = filled(CUDA, state)
    assert uploader.calls.count("finish") == 1 and uploader.calls[-1] == "finish"
    assert {call[0] for call in uploader.calls[:-1]} == {CUDA}
    tensors = [*far.parameters(), *far.buffers()]
    assert sorted(t.data_ptr() for t in tensors) == sorted(result.data_ptr() for result in uploader.results)
    pairs = zip([*near.named_parameters(), *near.named_buffers()], tensors, strict=True)
    for (name, want), got in pairs:
        assert (type(got), got.dtype, got.requires_grad) == (type(want), want.dtype, want.requires_grad), name
        assert torch.equal(got, want), name
    assert type(far.first.scale) is Frozen and far.first.table.dtype is torch.int32
    assert (far.second.positions.dtype, far.second.frequencies.dtype) == (torch.int64, torch.float64)
    assert [name for name, _ in far.named_buffers()] == [name for name, _ in Whole().named_buffers()]
    assert not far.state_dict().keys() & {"first.positions", "first.frequencies"}  # still not saved


def test_each_part_goes_to_its_own_device(uploader: FakeUploader) -> None:
    state = stored()
    split = filled(lambda name: torch.device("cuda", 1) if name.startswith("second.") else CPU, state)
    uploaded = {result.data_ptr() for result in uploader.results}
    assert {name for name, value in split.named_parameters() if value.data_ptr() in uploaded} == {
        name for name in state if name.startswith("second.")
    }
    assert {call[0] for call in uploader.calls[:-1]} == {torch.device("cuda", 1)}


def test_a_cpu_shares_the_memory_of_what_was_stored() -> None:
    state = {name: value if "table" in name else value.bfloat16() for name, value in stored().items()}
    model = filled(CPU, state)
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == {
        name: value.data_ptr() for name, value in state.items()
    }


def test_tied_weights_stay_one(uploader: FakeUploader) -> None:
    config = LlamaConfig(
        vocab_size=8, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    state = {name: value.detach() for name, value in LlamaForCausalLM(config).named_parameters()}
    with empty_weights():
        model = LlamaForCausalLM(config)
    load_weights(model, state.items(), dtype=torch.float16, device=CUDA, source="a test")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, state["model.embed_tokens.weight"].half())
