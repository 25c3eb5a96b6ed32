"""Loading, inference, sampling, quantization and an optimizer step, compared with float32 on the CPU.

The reference is forward, `generate` and backward of transformers; the device, the engine and packed training are under
test.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Final, NamedTuple, cast
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from llava.constants import IGNORE_INDEX
from llava.engine import Engine, Request, SamplingParams
from llava.engine.sampling import Sampler
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.self_test import CheckFailed, CheckSkipped, within
from llava.self_test.checkpoints import EOS, KINDS, Checkpoint

LIMITS: Final = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
TRAINING_LIMIT, AUTOCAST_LIMIT = 1e-3, 0.05
LEARNING_RATE: Final = 1e-3
QUANTIZED_LIMITS: Final = {8: 0.1, 4: 0.4}
NEW_TOKENS: Final = 12
TOP_P: Final = 0.6
ROUNDING: Final = 1e-3  # probability: a token this close to the edge of the top-p set may be inside or outside


class Loaded(NamedTuple):
    """Result of `load_pretrained_model`."""

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    processor: CLIPImageProcessor


class Role(NamedTuple):
    """Device and dtype of a model. The reference uses eager attention and never runs in the engine."""

    device: torch.device
    dtype: torch.dtype
    attention: str = "auto"


REFERENCE: Final = Role(torch.device("cpu"), torch.float32, "eager")


@dataclass
class Case:
    """A checkpoint of one kind, created under `root`, and the models that `check_loader` loaded from it."""

    kind: str
    root: Path
    models: dict[Role, Loaded] = field(default_factory=dict)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        directory = self.root / self.kind
        directory.mkdir(parents=True)
        return KINDS[self.kind](directory, self.kind, 10 * list(KINDS).index(self.kind))

    @cached_property
    def answers(self) -> list[tuple[int, ...]]:
        """Greedy tokens of each of `make_requests()` from `generate` of the reference."""
        return [generate(self.models[REFERENCE], request) for request in make_requests()]

    def load(self, role: Role, *, bits: int = 0) -> Loaded:
        tokenizer, model, processor, _ = load_pretrained_model(
            self.checkpoint.path, self.checkpoint.base, load_8bit=bits == 8, load_4bit=bits == 4,
            device=role.device, dtype=role.dtype, attn_implementation=role.attention,
        )  # fmt: skip
        return Loaded(tokenizer, model, processor)


def make_requests(count: int = 5, new_tokens: int = NEW_TOKENS) -> list[Request]:
    """One request with an image of its own, one without an image, and the rest sharing one image."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (2, 8, 8, 3), generator=generator, dtype=torch.uint8).numpy()
    common, other = (Image.fromarray(one).resize((120, 90), Image.Resampling.NEAREST) for one in pixels)
    params = SamplingParams(max_new_tokens=new_tokens)
    alone = [Request("<image>\nQuestion 0: what?", [other], params), Request("Question 0: why?", (), params)]
    shared = [f"<image>\nQuestion {number}: " + "what? " * (1 + number % 3) for number in range(max(1, count - 2))]
    return [*(Request(prompt, [common], params) for prompt in shared), *alone][:count]


def model_inputs(loaded: Loaded, request: Request) -> tuple[list[int], dict[str, Tensor]]:
    """Token ids and the `images` keyword argument of the model's forward."""
    prompt, images, model = cast("str", request.prompt), cast("list[Image.Image]", request.images), loaded.model
    ids = tokenizer_image_token(prompt, loaded.tokenizer)
    if not images:
        return ids, {}
    pixels = torch.stack(list(process_images(images, loaded.processor, model.config)))
    return ids, {"images": pixels.to(model.device, model.dtype)}


@torch.no_grad()
def generate(loaded: Loaded, request: Request) -> tuple[int, ...]:
    """Greedy tokens from transformers' `generate`."""
    ids, images = model_inputs(loaded, request)
    row, count = torch.tensor([ids], device=loaded.model.device), request.params.max_new_tokens
    tokens = loaded.model.generate(row, do_sample=False, max_new_tokens=count, eos_token_id=EOS, **images)
    return tuple(tokens[0, len(ids) :].tolist())


@torch.no_grad()
def forward_logits(loaded: Loaded, request: Request, tokens: Sequence[int]) -> Tensor:
    """Logits (T, V) that predict each of the T new `tokens`, from one forward, as float32 on the CPU."""
    ids, images = model_inputs(loaded, request)
    row = torch.tensor([[*ids, *tokens[:-1]]], device=loaded.model.device)
    logits: Tensor = loaded.model(input_ids=row, **images).logits[0, -len(tokens) :]
    return logits.float().cpu()


def make_engine(loaded: Loaded, max_batch_size: int = 16) -> Engine:
    return Engine(loaded.model, loaded.tokenizer, loaded.processor, max_batch_size=max_batch_size)


def answer(engine: Engine, requests: Sequence[Request]) -> list[tuple[int, ...]]:
    """New tokens of each request."""
    completions = engine.generate(requests)
    for completion in completions:
        if completion.error:
            raise CheckFailed(completion.error)
    return [completion.token_ids for completion in completions]


def engine_error(engine: Engine, reference: Loaded, requests: Sequence[Request]) -> float:
    """Largest relative error of the engine's logits for all requests in one batch, against one forward per request."""
    recorded: dict[int | None, list[Tensor]] = defaultdict(list)  # logits (V,) that the engine samples from, by seed
    sample = Sampler.sample

    def record(sampler: Sampler, logits: Tensor) -> Tensor:
        for row, params in zip(logits.float().cpu(), sampler.params, strict=True):
            recorded[params.seed].append(row)
        return sample(sampler, logits)

    with patch.object(Sampler, "sample", record):
        tokens = answer(engine, [replace(r, params=replace(r.params, seed=seed)) for seed, r in enumerate(requests)])
    found = [torch.stack(recorded[seed][: len(row)]) for seed, row in enumerate(tokens)]
    return relative_error(found, [forward_logits(reference, *one) for one in zip(requests, tokens, strict=True)])


def forward_error(
    loaded: Loaded, reference: Loaded, requests: Sequence[Request], tokens: Sequence[Sequence[int]]
) -> float:
    """Largest relative error of the logits, one forward per request, after the same tokens."""
    pairs = list(zip(requests, tokens, strict=True))
    found, wanted = ([forward_logits(model, *one) for one in pairs] for model in (loaded, reference))
    return relative_error(found, wanted)


def relative_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest of `|a - b| / |b|` over all rows (V,); NaN if any is NaN."""
    one, other = torch.cat(list(found)).double(), torch.cat(list(wanted)).double()
    return float(((one - other).norm(dim=1) / other.norm(dim=1)).max())


def require_package(name: str, extra: str) -> None:
    """Raise `CheckSkipped` if an optional package is not installed."""
    if importlib.util.find_spec(name) is None:
        raise CheckSkipped(f"{name} is not installed: pip install 'llava[{extra}]'")


def check_loader(case: Case, roles: Sequence[Role]) -> str:
    """Load the checkpoint in every role; all weights must be on the device and equal those of the checkpoint."""
    if case.kind == "adapter":
        require_package("peft", "train")
    case.models.update({role: case.load(role) for role in roles})
    for role in roles:
        found = dict(case.models[role].model.named_parameters(remove_duplicate=False))
        mismatched = sorted(case.checkpoint.weights.keys() ^ found.keys())
        if mismatched:
            raise CheckFailed(f"{mismatched[0]} is {'unexpected' if mismatched[0] in found else 'missing'}")
        for name, weight in found.items():
            wanted = case.checkpoint.weights[name].to(role.device, role.dtype)
            exact = case.kind != "adapter"  # merging an adapter rounds
            rounding = 0.0 if exact else 4 * torch.finfo(role.dtype).eps * float(wanted.abs().max())
            try:
                torch.testing.assert_close(weight.detach(), wanted, rtol=0.0, atol=rounding)
            except AssertionError as error:
                raise CheckFailed(f"{name} differs from the checkpoint in {role.dtype}: {error}") from error
    kinds = ", ".join(dict.fromkeys(str(role.dtype).removeprefix("torch.") for role in roles))
    return f"{len(found)} weights equal in {kinds}"


def check_logits(case: Case, role: Role) -> str:
    """Logits of forward and engine against the reference."""
    loaded, reference, requests = case.models[role], case.models[REFERENCE], make_requests()
    forward = forward_error(loaded, reference, requests, case.answers)
    return within([forward, engine_error(make_engine(loaded), reference, requests)], LIMITS[role.dtype])


def check_tokens(case: Case, role: Role) -> str:
    """The engine, one request at a time, and `generate` on the device against `generate` of the reference."""
    loaded, requests, wanted = case.models[role], make_requests(), case.answers
    compare(wanted, [generate(loaded, request) for request in requests], "generate on this device")
    compare(wanted, [answer(make_engine(loaded), [request])[0] for request in requests], "the engine")
    return f"{sum(map(len, wanted))} tokens of {len(requests)} requests"


def check_batch(case: Case, role: Role) -> str:
    """All requests in one batch; those with the same image share its keys and values."""
    engine = make_engine(case.models[role])
    compare(case.answers, answer(engine, make_requests()), "the batch")
    shared = engine.statistics().cached_tokens
    if shared == 0:
        raise CheckFailed("no prompt tokens were shared")
    return f"{len(case.answers)} requests, {shared} prompt tokens shared"


def compare(wanted: Sequence[tuple[int, ...]], found: Sequence[tuple[int, ...]], who: str) -> None:
    """Raise `CheckFailed` at the first token that differs."""
    for number, rows in enumerate(zip(wanted, found, strict=True)):
        different = [at for at, (one, other) in enumerate(zip_longest(*rows)) if one != other]
        if different:
            raise CheckFailed(f"{who} differs from generate on the CPU at token {different[0]} of request {number}")


def sampled_requests() -> list[Request]:
    params = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=1.0, top_p=TOP_P)
    return [replace(make_requests()[0], params=replace(params, seed=seed)) for seed in range(6)]


def check_seeds(case: Case, role: Role) -> str:
    """A seed reproduces its tokens in another batch and at another position."""
    requests, loaded = sampled_requests(), case.models[role]
    first = answer(make_engine(loaded), requests)
    again = answer(make_engine(loaded), [*make_requests(3), *reversed(requests)])[3:][::-1]
    for seed, (one, other) in enumerate(zip(first, again, strict=True)):
        if one != other:
            raise CheckFailed(f"seed {seed} produced different tokens at a different batch position")
    if len(set(first)) < len(first):
        raise CheckFailed("two seeds produced the same tokens")
    return f"{len(first)} seeds reproduced"


def check_top_p(case: Case, role: Role) -> str:
    """Every sampled token is in the smallest set of tokens whose probabilities sum to `TOP_P`."""
    requests, sizes = sampled_requests(), []
    for request, tokens in zip(requests, answer(make_engine(case.models[role]), requests), strict=True):
        probabilities = forward_logits(case.models[REFERENCE], request, tokens).double().softmax(dim=-1)  # (T, V)
        chosen = probabilities.gather(1, torch.tensor(tokens).unsqueeze(1))  # (T, 1)
        before = torch.where(probabilities > chosen, probabilities, 0.0).sum(dim=1)
        if bool((before >= TOP_P + ROUNDING).any()):
            found = f"more probable tokens sum to {before.max():.2f}, top_p is {TOP_P}"
            raise CheckFailed(f"sampled outside the top-p set: {found}")
        ordered = probabilities.sort(dim=1, descending=True).values
        sizes += (ordered.cumsum(dim=1) - ordered < TOP_P).sum(dim=1).tolist()
    return f"{len(sizes)} tokens in the top-p set (mean size {sum(sizes) / len(sizes):.0f})"


def check_quantized(case: Case, role: Role, bits: int) -> str:
    """Forward and engine with quantized weights, against the same model unquantized."""
    require_package("bitsandbytes", "quant")
    if role.device.type == "mps":
        raise CheckSkipped("bitsandbytes runs on CUDA and CPU only")
    plain, requests, loaded = case.models[role], make_requests(3), case.load(role, bits=bits)
    if not any(type(module).__module__.startswith("bitsandbytes") for module in loaded.model.modules()):
        raise CheckFailed("no layer was quantized")
    forward = forward_error(loaded, plain, requests, [generate(loaded, request) for request in requests])
    return within([forward, engine_error(make_engine(loaded), plain, requests)], QUANTIZED_LIMITS[bits])


def make_batch(loaded: Loaded) -> dict[str, Tensor]:
    """A padded batch of different lengths, one row without an image; the second half of each row is supervised."""
    given = [model_inputs(loaded, request) for request in make_requests()]
    rows = [[*ids, *range(40, 44 + number)] for number, (ids, _) in enumerate(given)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    lengths, positions = torch.tensor([[len(row)] for row in rows]), torch.arange(longest)
    unsupervised = (positions >= lengths) | (positions < lengths // 2) | (ids < 0)
    blank = torch.zeros_like(next(images["images"] for _, images in given if images))  # for the row without an image
    device = loaded.model.device
    return {
        "input_ids": ids.to(device),
        "attention_mask": (positions < lengths).to(device),
        "labels": ids.masked_fill(unsupervised, IGNORE_INDEX).to(device),
        "images": torch.cat([images.get("images", blank) for _, images in given]),
    }


def train_step(loaded: Loaded, *, packed: bool, autocast: torch.dtype | None = None) -> Tensor:
    """Train all weights but the tower for one AdamW step, on packed sequences or as in transformers.

    Returns the loss before and after, and the gradient norm of each parameter: (2 + P,) in float32 on the CPU.
    """
    model, batch = loaded.model, make_batch(loaded)
    model.train(packed)
    parameters = [value for name, value in model.named_parameters() if "vision_tower" not in name]
    for parameter in parameters:
        parameter.requires_grad_(True)
    kind = model.device.type
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=kind == "cuda")

    def loss() -> Tensor:
        with torch.autocast(kind, dtype=autocast) if autocast is not None else nullcontext():
            value: Tensor = model(**batch).loss
        return value

    before = loss()
    before.backward()  # type: ignore[no-untyped-call]
    missing = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    if missing:
        raise CheckFailed(f"{missing[0]} has no gradient")
    norms = [parameter.grad.float().norm() for parameter in parameters if parameter.grad is not None]
    optimizer.step()
    with torch.no_grad():
        return torch.stack([before.detach().float(), loss().float(), *norms]).cpu()


def check_step(case: Case, role: Role, autocast: torch.dtype | None = None) -> str:
    """Losses and gradient norms of the model in `role`, with float32 weights, against the reference."""
    if autocast is not None and not torch.amp.is_autocast_available(role.device.type):
        raise CheckSkipped(f"this torch does not support autocast on {role.device.type}")
    wanted = train_step(case.load(REFERENCE), packed=False)
    found = train_step(case.load(role), packed=True, autocast=autocast)
    before, after = found[:2].tolist()
    if not after < before:
        raise CheckFailed(f"the loss did not decrease: {before:.4f} to {after:.4f}")
    error = float(((found - wanted) / wanted).abs().max())
    limit = TRAINING_LIMIT if autocast is None else AUTOCAST_LIMIT
    return f"loss {before:.3f} -> {after:.3f}, {within([error], limit)}"
