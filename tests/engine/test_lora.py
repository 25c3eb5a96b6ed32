"""Rows with several LoRA adapters and with their base share a batch, and get the tokens of the merged checkpoints."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.engine import Engine, Request, SamplingParams, load_engine
from llava.engine.arguments import EngineArgs
from llava.engine.llama import LlamaRunner
from llava.engine.lora import LoraLinear, LoraWeights
from llava.engine.sequence import GuidedDecodingParams
from llava.errors import CheckpointError, ConfigError, RequestError
from llava.model.builder import load_pretrained_model
from tests import tiny
from tests.engine.conftest import Solo, greedy

DECODER = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
IMAGES = [torch.randn(3, 56, 56, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
NAMES: tuple[str | None, ...] = (None, "all", "some", "plain")
LIVELY: dict[str, Any] = {"initializer_range": 0.25, "hidden_size": 64}


@dataclass(frozen=True)
class Models:
    """A base, its adapters by name, and `generate` of the base (None) and of each merged checkpoint."""

    base: Path
    lora: dict[str, Path]
    solo: dict[str | None, Solo]

    def engine(self, **options: Any) -> Engine:
        return load_engine(self.base, device="cpu", lora=self.lora, **options)

    def expected(self, request: Request) -> tuple[int, ...]:
        prompt = [token for token in request.prompt if isinstance(token, int)]
        return self.solo[request.lora](prompt, request.images, request.params.max_new_tokens)


@pytest.fixture(scope="module")
def models(tiny_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Adapters of all layers with their own projector, of some layers with the base's, and without a chat model."""
    root = tmp_path_factory.mktemp("lora")
    base = tiny.make_chat(root / "base", tiny_dirs["tower"], **LIVELY)
    other = tiny.make_chat(root / "other", tiny_dirs["tower"], seed=9, **LIVELY)
    lora = {
        "all": tiny.make_lora(root / "all", other, base, target_modules=DECODER, alpha_pattern={"q_proj": 4}),
        "some": tiny.make_lora(root / "some", base, base, seed=5, r=20, use_rslora=True, rank_pattern={"q_proj": 3}),
        "plain": tiny.make_lora(root / "plain", base, base, seed=6, target_modules=["k_proj", "up_proj"]),
    }
    merged = [load_pretrained_model(path, base, device="cpu")[1] for path in lora.values()]
    for name in ("config.json", "non_lora_trainables.bin"):
        (lora["plain"] / name).unlink()
    whole = [load_pretrained_model(base, device="cpu")[1], *merged]
    return Models(base, lora, {name: greedy(model) for name, model in zip(NAMES, whole, strict=True)})


def requests(count: int, seed: int = 0, tokens: int = 12) -> list[Request]:
    """Prompts for all models in turn, some with images, half of them with the same beginning."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        begin = [1, *range(300, 330)] if number % 8 < 4 else [1]
        ids = [*begin, *([-200] * (number % 3)), *(draw.randrange(3, 383) for _ in range(draw.randrange(1, 20)))]
        images = [IMAGES[draw.randrange(2)] for _ in range(number % 3)]
        found.append(Request(ids, images, SamplingParams(tokens), lora=NAMES[number % 4]))
    return found


def stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA."""
    fuse = LoraWeights.fuse
    always = lambda self, names, sizes, *, stack: fuse(self, names, sizes, stack=True)  # noqa: E731
    monkeypatch.setattr(LoraWeights, "fuse", always)


@pytest.mark.parametrize("way", ["C++ kernel", "PyTorch", "stacked", "transformers"])
def test_a_mixed_batch_equals_the_merged_checkpoints_alone(
    way: str, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "stacked":
        stacked(monkeypatch)
    if way == "transformers":
        monkeypatch.setattr(LlamaRunner, "supports", lambda model: False)
    engine = models.engine(max_batch_size=8)
    if way in ("PyTorch", "stacked"):
        engine.model_runner.native = None  # type: ignore[attr-defined]
    asked = requests(16)
    answers = engine.generate(asked)
    assert [answer.token_ids for answer in answers] == [models.expected(request) for request in asked]
    assert len({answer.token_ids for answer in engine.generate([Request([1, 300], lora=name) for name in NAMES])}) == 4


@pytest.mark.parametrize("limit", [None, 20])
def test_any_schedule_keeps_every_row(models: Models, limit: int | None) -> None:
    """Rows join, leave and are cancelled while others with other adapters run; later turns hit the prefix cache."""
    engine = models.engine(max_batch_size=5, max_prefill_tokens=60, max_num_batched_tokens=limit)
    draw = random.Random(3)
    waiting, submitted = requests(28, seed=1), []
    while waiting or engine.step():
        for _ in range(draw.randrange(3)):
            if waiting:
                request = waiting.pop()
                submitted.append((request, engine.submit(request)))
        if submitted and draw.random() < 0.1:
            draw.choice(submitted)[1].cancel()
        engine.step()
    for request, handle in submitted:
        answer, expected = handle.result(), models.expected(request)
        cut = len(answer.token_ids) if answer.finish_reason == "cancelled" else None
        assert answer.token_ids == expected[:cut]
    assert any(handle.result().finish_reason == "cancelled" for _, handle in submitted)


def test_a_second_turn_continues_its_own_adapter(models: Models) -> None:
    engine = models.engine(max_batch_size=4)
    first = [Request([1, *range(300, 320), -200, 330], [IMAGES[0]], SamplingParams(10), lora=name) for name in NAMES]
    turns = [
        Request([*one.prompt, *answer.token_ids, 340, 341], one.images, SamplingParams(10), lora=one.lora)  # type: ignore[misc]
        for one, answer in zip(first, engine.generate(first), strict=True)
    ]
    before = engine.statistics()
    answers = engine.generate(turns)
    assert [answer.token_ids for answer in answers] == [models.expected(request) for request in turns]
    now = engine.statistics().since(before)
    assert now.prefix_hits == 4 and now.encoded_images == 0


def test_caches_are_shared_only_where_they_are_equal(models: Models) -> None:
    """The prefix cache never; image features with the adapters that have the projector of the base."""
    engine = models.engine()
    ids = [1, *range(300, 340), -200, *range(340, 350)]

    def ask(name: str | None) -> tuple[int, int]:
        before = engine.statistics()
        request = Request(ids, [IMAGES[1]], SamplingParams(4), lora=name)
        assert engine.generate([request])[0].token_ids == models.expected(request)
        now = engine.statistics().since(before)
        return now.cached_tokens, now.encoded_images

    assert [ask(name) for name in NAMES] == [(0, 1), (0, 1), (0, 0), (0, 0)]
    assert [ask(name) for name in NAMES] == [(40 + 16 + 10, 0)] * 4
    image_first = [Request([-200, 300], [IMAGES[0]], SamplingParams(6), lora=name) for name in NAMES for _ in range(2)]
    answers = engine.generate(image_first)
    assert [answer.token_ids for answer in answers] == [models.expected(request) for request in image_first]


def test_guided_rows_and_sampled_rows_may_use_adapters(models: Models) -> None:
    engine = models.engine(max_batch_size=8)
    guide = GuidedDecodingParams(choice=["yes", "no"])
    sampled = [SamplingParams(8, 1.0, seed=7), SamplingParams(8, guided_decoding=guide)]
    asked = [Request([1, 300, 301], params=params, lora=name) for name in NAMES for params in sampled]
    together = engine.generate(asked)
    solo = models.engine()
    alone = [solo.generate([request])[0] for request in asked]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert {answer.text for answer in together[1::2]} <= {"yes", "no"}


def test_beams_use_the_adapter_of_their_request(models: Models) -> None:
    ids = [1, 300, -200, 301]
    asked = [Request(ids, [IMAGES[0]], SamplingParams(8, num_beams=3), lora=name) for name in NAMES]
    answers = [answer.token_ids for answer in models.engine().generate(asked)]
    merged = {None: models.base, **models.lora}
    for name, found in zip(NAMES[:3], answers, strict=False):
        model = load_pretrained_model(merged[name], None if name is None else models.base, device="cpu")[1]
        output = model.generate(
            torch.tensor([ids]), images=IMAGES[0][None], do_sample=False, num_beams=3, max_new_tokens=8, eos_token_id=2
        )
        assert tuple(output[0, len(ids) :].tolist()) == found, name


def test_batches_of_the_base_do_not_touch_adapters(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = models.engine()

    def refuse(*_: object) -> None:
        raise AssertionError("a batch of the base used an adapter")

    monkeypatch.setattr("llava.engine.lora.LoraStep", refuse)
    monkeypatch.setattr(LoraLinear, "add", refuse)
    asked = [request for request in requests(16) if request.lora is None]
    assert [answer.token_ids for answer in engine.generate(asked)] == [models.expected(one) for one in asked]
    with pytest.raises(AssertionError, match="used an adapter"):
        engine.generate([Request([1, 300], lora="some")])


def test_an_adapter_of_mpt(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    """Through transformers' forward pass."""
    base = tiny.make_mpt_chat(tmp_path / "base", tiny_dirs["tower"])
    run = tiny.make_lora(tmp_path / "run", base, base, target_modules=["Wqkv", "out_proj", "up_proj", "down_proj"])
    engine = load_engine(base, device="cpu", lora={"run": run})
    asked = [Request([5, 300 + n], params=SamplingParams(10), lora=(None, "run")[n % 2]) for n in range(4)]
    solo = [greedy(load_pretrained_model(path, device="cpu")[1]) for path in (base, run)]
    expected = [solo[n % 2](request.prompt, [], 10) for n, request in enumerate(asked)]  # type: ignore[arg-type]
    answers = [answer.token_ids for answer in engine.generate(asked)]
    assert [found[: len(want)] for found, want in zip(answers, expected, strict=True)] == expected


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_base(bits: int, models: Models) -> None:
    """The adapter stays in full precision beside the quantized weights, which are read where they are."""
    pytest.importorskip("bitsandbytes")
    quantized = models.engine(load_8bit=bits == 8, load_4bit=bits == 4)
    whole = models.engine()
    pairs = [pair for pair in zip(linears(quantized), linears(whole), strict=True) if pair[0].weight is None]
    assert len(pairs) >= 6
    for linear, plain in pairs:
        parts = [
            part.unpack(0, part.part.rows, torch.empty(part.part.rows, part.part.width)) for part in linear.modules
        ]
        plain.weight.copy_(torch.cat(parts))
    asked = requests(8)
    answers = [[answer.token_ids for answer in engine.generate(asked)] for engine in (quantized, whole)]
    assert answers[0] == answers[1]


def linears(engine: Engine) -> list[Any]:
    runner = engine.model_runner
    assert isinstance(runner, LlamaRunner) and runner.native is not None
    return [linear for layer in runner.layers for linear in layer.projections]


def test_bfloat16(models: Models) -> None:
    """Kernel and PyTorch agree about the first tokens, computed by the kernel's decode step."""
    kernel, plain = models.engine(dtype="bfloat16"), models.engine(dtype="bfloat16")
    plain.model_runner.native = None  # type: ignore[attr-defined]
    asked = [Request([1, 300, 301 + n], params=SamplingParams(3, logprobs=0), lora=NAMES[n % 4]) for n in range(8)]
    for one, other in zip(kernel.generate(asked), plain.generate(asked), strict=True):
        assert one.logprobs is not None and other.logprobs is not None
        same = sum(a == b for a, b in zip(one.token_ids, other.token_ids, strict=False))
        close = [abs(a.logprob - b.logprob) < 0.3 for a, b in zip(one.logprobs[:same], other.logprobs[:same])]
        assert same and all(close)


def test_the_worst_layouts_of_a_step() -> None:
    """Stacked and grouped terms are the same for any adapters of the rows, also where a part has none."""
    torch.manual_seed(0)

    def pair(out: int, rank: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(rank, 8), torch.randn(out, rank)

    parts = [[None, None], [pair(6), pair(4)], [None, pair(4, 32)], [pair(6), None], [None, None]]
    grouped, dense = (LoraLinear(parts, [6, 4], stack=stack) for stack in (False, True))
    weights = LoraWeights(torch.nn.Module(), [], torch.float32)
    for adapters in ([0, 1, 2, 3], [3, 3, 3], [2], [0, 4, 0], [1, 0, 1], [3, 1, 0, 2, 2, 1], [4, 1, 1, 4]):
        step, x, out = weights.step(adapters), torch.randn(len(adapters), 8), torch.randn(len(adapters), 10)
        assert step is not None and weights.step(list(adapters)) is step
        want = out.clone()
        for row, adapter in enumerate(adapters):
            for columns, one in zip((slice(0, 6), slice(6, 10)), parts[adapter], strict=True):
                if one is not None:
                    want[row, columns] += one[1] @ (one[0] @ x[row])
        for linear in (grouped, dense):
            torch.testing.assert_close(linear.add(out.clone(), x, step), want, atol=1e-4, rtol=1e-4)


# --- loading ------------------------------------------------------------------------------------------------------


def edit(run: Path, file: str = "adapter_config.json", **changes: Any) -> None:
    path = run / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def tensors(change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor] | None]) -> Callable[[Path], None]:
    def apply(run: Path) -> None:
        file = run / "adapter_model.safetensors"
        changed = [change(name, tensor) for name, tensor in load_file(file).items()]
        save_file({name: tensor.contiguous() for name, tensor in filter(None, changed)}, file)

    return apply


def more_rows(run: Path) -> None:
    state = torch.load(run / "non_lora_trainables.bin", weights_only=True)
    state["base_model.model.model.embed_tokens.weight"] = torch.randn(384, 64)
    torch.save(state, run / "non_lora_trainables.bin")


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "another base": (lambda run: edit(run, base_model_name_or_path="x/vicuna-7b"), "trained on x/vicuna-7b.*correct"),
    "another size": (lambda run: edit(run, "config.json", hidden_size=128), "hidden_size=128, but the base has 64"),
    "another shape": (
        tensors(lambda name, tensor: (name, tensor[:, :-1] if ".lora_A" in name else tensor)),
        "but the base has .*the --model-base the adapter was trained on",
    ),
    "rank 0": (
        tensors(lambda name, tensor: (name, tensor[:0] if ".lora_A" in name else tensor[:, :0])),
        "of rank 0; copy it from the training run",
    ),
    "no weights": (lambda run: (run / "adapter_model.safetensors").unlink(), "has adapter_config.json but no"),
    "half of it": (
        tensors(lambda name, tensor: None if "1.self_attn.q_proj.lora_B" in name else (name, tensor)),
        "the adapter is incomplete",
    ),
    "no projector": (lambda run: (run / "non_lora_trainables.bin").unlink(), "has no non_lora_trainables.bin"),
    "no adapter": (lambda run: (run / "adapter_config.json").unlink(), "--lora takes the directory of a LoRA adapter"),
    "another vocabulary": (lambda run: edit(run, "config.json", vocab_size=400), "vocabulary of 400"),
    "another tower": (lambda run: edit(run, "config.json", mm_vision_tower="x/clip"), "mm_vision_tower=clip.*merge it"),
    "another preprocessing": (
        lambda run: edit(run, "config.json", image_aspect_ratio="square"),
        "image_aspect_ratio=crop, but the base has pad; pass --image-aspect-ratio",
    ),
    "embeddings": (more_rows, "replaces model.embed_tokens.weight; merge it with scripts/merge_lora_weights.py"),
    "PiSSA": (
        lambda run: edit(run, init_lora_weights="pissa", use_rslora=False),
        "'pissa' has changed the weights.*merge it",
    ),
}


@pytest.fixture(scope="module")
def base_parts(models: Models) -> Any:
    return load_pretrained_model(models.base, device="cpu")[1]


def load_adapter(run: Path, models: Models, model: Any, **options: Any) -> Any:
    from llava.model.lora_adapter import load_lora_adapter

    return load_lora_adapter("x", run, model, models.base, **options)


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_do_not_fit_are_refused(case: str, models: Models, base_parts: Any, tmp_path: Path) -> None:
    run = shutil.copytree(models.lora["some"], tmp_path / "run")
    change, words = REFUSED[case]
    change(run)
    with pytest.raises(CheckpointError, match=words):
        load_adapter(run, models, base_parts)


FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, r"weight-decomposed \(use_dora\); merge it"),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "adapts model.embed_tokens, which is not in"),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "adapts lm_head, which is not in the decoder's layers"),
    "norms": ({"modules_to_save": ["norm"]}, r"replaces model\..*norm.weight; merge it"),
}


@pytest.mark.parametrize("form", FORMS)
def test_adapters_that_change_more_must_be_merged(form: str, models: Models, base_parts: Any, tmp_path: Path) -> None:
    settings, words = FORMS[form]
    run = tiny.make_lora(tmp_path / "run", models.base, models.base, **settings)
    if form == "norms":
        tensors(lambda name, tensor: (name, tensor + 1 if name.endswith("norm.weight") else tensor))(run)
    with pytest.raises(CheckpointError, match=words):
        load_adapter(run, models, base_parts)


def test_weights_saved_unchanged_are_no_obstacle(models: Models, base_parts: Any, tmp_path: Path) -> None:
    run = shutil.copytree(models.lora["some"], tmp_path / "run")
    state = torch.load(run / "non_lora_trainables.bin", weights_only=True)
    state["base_model.model.model.embed_tokens.weight"] = base_parts.get_input_embeddings().weight.detach().clone()
    torch.save(state, run / "non_lora_trainables.bin")
    assert load_adapter(run, models, base_parts).projector is None
    edit(run, "config.json", image_aspect_ratio="square")
    assert load_adapter(run, models, base_parts, image_aspect_ratio="crop").projector is None


def test_a_base_without_a_tower(tiny_dirs: dict[str, Path], models: Models, tmp_path: Path) -> None:
    """A language model serves adapters without a projector."""
    base = tiny.make_base(tmp_path / "base", initializer_range=0.25)
    chat = tiny.make_chat(tmp_path / "chat", tiny_dirs["tower"], initializer_range=0.25)
    run = tiny.make_lora(tmp_path / "run", chat, base)
    engine_of: Callable[..., Engine] = lambda: load_engine(  # noqa: E731
        base, device="cpu", loading={"text_only": True}, lora={"run": run}
    )
    with pytest.raises(CheckpointError, match="vision tower .*, but the base has none; serve"):
        engine_of()
    for name in ("config.json", "non_lora_trainables.bin"):
        (run / name).unlink()
    engine = engine_of()
    merged = load_engine(run, base, device="cpu", loading={"text_only": True})
    ids: Sequence[int] = [1, 300, 301]
    (alone,) = merged.generate([Request(ids, params=SamplingParams(12))])
    both = engine.generate([Request(ids, params=SamplingParams(12), lora=name) for name in ("run", None)])
    assert both[0].token_ids == alone.token_ids != both[1].token_ids


def test_the_projector_of_stage_1_is_a_base(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    """Its template and projector differ from the adapter's, which was trained on the language model."""
    base = tiny.make_base(tmp_path / "vicuna", initializer_range=0.25)
    stages = [
        tiny.make_chat(tmp_path / name, tiny_dirs["tower"], seed=seed, initializer_range=0.25, conv_template=template)
        for name, seed, template in (("one", 7, "plain"), ("two", 8, "v1"))
    ]
    projector = tiny.make_projector_only(tmp_path / "projector", stages[0])
    run = tiny.make_lora(tmp_path / "run", stages[1], base)
    engine = load_engine(projector, base, device="cpu", lora={"run": run})
    solo = greedy(load_pretrained_model(run, base, device="cpu")[1])
    (answer,) = engine.generate([Request([1, -200, 300], [IMAGES[0]], SamplingParams(12), lora="run")])
    assert answer.token_ids == solo([1, -200, 300], [IMAGES[0]], 12)
    config = engine.lora["run"].config
    assert config is not None and config.conv_template == "v1"


def test_names_and_bases_are_checked(models: Models) -> None:
    with pytest.raises(RequestError, match="no LoRA adapter 'none'; its adapters: all, some, plain"):
        models.engine().submit(Request([1, 300], lora="none"))
    with pytest.raises(ConfigError, match="pass their base as --model-path, and this adapter with --lora"):
        load_engine(models.lora["all"], models.base, device="cpu", lora={"x": models.lora["some"]})


def test_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    from llava.serve.model_worker import build_parser

    parser = build_parser()
    args = parser.parse_args(["--model-path", "base", "--lora", "a=x", "--lora", "b=y=z"])
    assert EngineArgs.from_cli_args(args).lora == {"a": "x", "b": "y=z"}
    assert EngineArgs.from_cli_args(parser.parse_args(["--model-path", "base"])).lora == {}
    for words, error in ((["--lora", "dir"], "'dir' must be NAME=DIR"), (["--lora", "a=x"] * 2, "is given twice")):
        with pytest.raises(SystemExit):
            parser.parse_args(["--model-path", "base", *words])
        assert error in capsys.readouterr().err
