"""On a simulated GPU the CUDA branches of every model return the CPU's tokens, losses and gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image
from torch import Tensor

from llava.engine import Engine, Request, SamplingParams, attention
from llava.engine.chat import ChatSession
from llava.engine.sampling import Sampler, sample_top_p
from llava.engine.sequence import GuidedDecodingParams
from llava.placement import FREE_FOR_WEIGHTS, is_ampere
from tests import devices
from tests.cuda.conftest import KINDS, load

Checkpoints = dict[str, tuple[Path, Any]]
GUIDE = GuidedDecodingParams(regex="[a-z ]{5,20}")
PIXELS = [torch.randn(3, 56, 56, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
IMAGE = Image.new("RGB", (60, 40), (200, 30, 60))
QUESTIONS = ("What color is the shape?", "Is there a circle?", "Why? Describe the image.", "What is it?", "Name it.")


def sample_together(self: Sampler, logits: Tensor) -> Tensor:
    """A `Sampler` as on CUDA, where a seed does not return the tokens it returns on the CPU."""
    columns = [torch.as_tensor(column) for column in self.host_params()]
    logits = self._process(logits, columns)
    sampled = columns[:-5] if self.tables else columns
    best = logits.argmax(dim=-1)
    return torch.where(sampled[0] > 0, sample_top_p(logits, *sampled), best) if sampled else best


def on_both(run: Callable[[str], Any]) -> tuple[Any, Any]:
    """Results of `run(device)` on the CPU and on a simulated GPU."""
    with mock.patch.object(Sampler, "sample", sample_together):
        expected = run("cpu")
    with devices.simulated_cuda():
        return expected, run("cuda")


def batch(**sampling: Any) -> list[Request]:
    """Questions about two images, in prompts with a common prefix, and one without an image."""
    requests = []
    for number, question in enumerate(QUESTIONS):
        params = SamplingParams(max_new_tokens=10, seed=number if sampling else None, **sampling)
        image = [PIXELS[number % 2]] if number < 4 else []
        requests.append(Request(f"A chat with an assistant. USER: {'<image>' * len(image)}{question}", image, params))
    return requests


def two_turns(engine: Engine) -> list[tuple[int, ...]]:
    """A conversation about an image that the engine preprocesses; the second turn continues the first."""
    chat, said = ChatSession(engine, "v1", SamplingParams(max_new_tokens=6)), []
    chat.attach("red.png", IMAGE)
    for text in ("What is this?", "And why?"):
        completion = chat.ask(text).result()
        chat.add_answer(completion)
        said.append(completion.token_ids)
    return said


def answers(engine: Engine) -> dict[str, Any]:
    """Results of every engine feature, by name."""
    beams = Request("<image>\nWhat color?", [PIXELS[0]], SamplingParams(max_new_tokens=5, num_beams=3))
    return {
        "greedy": [one.token_ids for one in engine.generate(batch())],
        "sampled": [one.token_ids for one in engine.generate(batch(temperature=0.9, top_p=0.8))],
        "penalised": [one.token_ids for one in engine.generate(batch(repetition_penalty=1.5, logit_bias={330: 1.0}))],
        "filtered": [one.token_ids for one in engine.generate(batch(temperature=0.9, top_k=9, min_p=0.1, logprobs=2))],
        "guided": [one.token_ids for one in engine.generate(batch(temperature=0.9, guided_decoding=GUIDE))],
        "logprobs": [[token.token for token in one.logprobs or ()] for one in engine.generate(batch(logprobs=1))],
        "stream": "".join(engine.stream(Request("<image> Say.", [PIXELS[2]], SamplingParams(max_new_tokens=8)))),
        "chat": two_turns(engine),
        "beams": [one.token_ids for one in engine.generate([beams])],
    }


@pytest.mark.parametrize("kind", KINDS)
def test_answers(checkpoints: Checkpoints, kind: str) -> None:
    def run(device: str) -> dict[str, Any]:
        model, tokenizer, processor = load(checkpoints, kind, device)
        assert {parameter.device.type for parameter in model.parameters()} == {device}
        return answers(Engine(model, tokenizer, processor, max_batch_size=4))

    expected, got = on_both(run)
    for name, value in expected.items():
        assert got[name] == value, name
    assert len(set(expected["greedy"])) == len(QUESTIONS) and expected["greedy"] != expected["sampled"]


def train(model: Any, device: str) -> dict[str, Tensor]:
    """Two steps of AdamW on a batch with images, padding and masked labels: losses, and the first gradients."""
    model.train()
    ids = torch.tensor([[1, 300, -200, 310, 320, 330], [1, 305, 306, 307, 0, 0], [1, -200, 311, 312, 313, 0]])
    labels = ids.masked_fill(ids <= 1, -100)
    given = {"input_ids": ids, "labels": labels, "attention_mask": ids != 0, "images": torch.stack(PIXELS)}
    given = {name: value.to(device) for name, value in given.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found: dict[str, Tensor] = {}
    for step in range(2):
        loss = model(**given).loss
        found[f"loss {step}"] = loss.detach()
        loss.backward()
        if step == 0:
            found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.cpu() for name, value in found.items()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("kind", ["llama sdpa", "llama eager", "mpt", "clip tower"])
def test_training(checkpoints: Checkpoints, kind: str, checkpointing: bool) -> None:
    def run(device: str) -> dict[str, Tensor]:
        model = load(checkpoints, kind, device)[0]
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.requires_grad_(True)
        return train(model, device)

    expected, got = on_both(run)
    assert expected.keys() == got.keys() and len(expected) > 20
    assert expected["loss 1"] < expected["loss 0"]
    for name, value in expected.items():
        assert (got[name] - value).abs().max() <= 1e-4 * value.abs().max() + 1e-6, name


def test_bfloat16(checkpoints: Checkpoints) -> None:
    """First tokens only: later ones depend on rounding."""

    def run(device: str) -> list[tuple[int, ...]]:
        model, tokenizer, processor = load(checkpoints, "llama sdpa", device, dtype="bfloat16")
        return [one.token_ids[:2] for one in Engine(model, tokenizer, processor).generate(batch())]

    expected, got = on_both(run)
    assert got == expected


@pytest.mark.parametrize(
    ("dtype", "capability", "kernels"),
    [
        ("float32", (9, 0), {"efficient"}),
        ("bfloat16", (9, 0), {"efficient", "flash"}),
        ("float16", (7, 5), {"efficient"}),
    ],
)
def test_shared_prefixes_run_on_fused_kernels(
    checkpoints: Checkpoints, dtype: str, capability: tuple[int, int], kernels: set[str]
) -> None:
    """The fallback that materialises scores, whose tokens would be the same, never runs."""
    ran: set[str] = set()

    def counted(kernel: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (ran.add(kernel.__name__), kernel(*args, **kwargs))[1]

    is_ampere.cache_clear()
    fallback = mock.patch.object(attention, "attention_from_scores", side_effect=AssertionError("the fallback ran"))
    counting = mock.patch.dict(devices.KERNELS, {name: counted(kernel) for name, kernel in devices.KERNELS.items()})
    with devices.simulated_cuda() as card, fallback, counting:
        card.capability = capability
        model, tokenizer, processor = load(checkpoints, "llama sdpa", "cuda", dtype=dtype)
        engine = Engine(model, tokenizer, processor)
        engine.generate(batch())
        assert engine.statistics().prefix_bytes > 0 and ran == kernels
    is_ampere.cache_clear()


def test_a_model_split_over_gpus(checkpoints: Checkpoints) -> None:
    """The loader chooses GPUs by free memory; each layer's keys and values stay on its GPU."""
    model, tokenizer, processor = load(checkpoints, "llama sdpa", "cpu")
    expected = [one.token_ids for one in Engine(model, tokenizer, processor).generate(batch())]
    with devices.simulated_cuda(count=4) as card:
        room = {0: 340_000, 1: 130_000, 2: 230_000, 3: 0}  # tower, projector and embeddings; a layer; the other one
        card.free_bytes = {index: int(size / FREE_FOR_WEIGHTS) for index, size in room.items()}
        model, tokenizer, processor = load(checkpoints, "llama sdpa", "cuda")
        assert {str(parameter.device) for parameter in model.parameters()} == {"cuda:0", "cuda:1", "cuda:2"}
        engine = Engine(model, tokenizer, processor)
        assert [one.token_ids for one in engine.generate(batch())] == expected
        assert [str(place) for place in engine.model_runner.spec.layer_devices] == ["cuda:1", "cuda:2"]
