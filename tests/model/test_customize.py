"""The examples of docs/Customize_Component.md, run from the page: one of each component, one registry line each."""

from __future__ import annotations

import importlib
import json
import re
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model, MistralConfig, MistralForCausalLM

from llava.conversation import Conversation, get_template
from llava.engine import Engine, Request, SamplingParams
from llava.errors import CheckpointError
from llava.mm_utils import tokenizer_image_token
from llava.model import registry
from llava.model.builder import load_pretrained_model
from llava.model.check import examine
from llava.model.checkpoint import Kind
from llava.model.language_model import lm_head
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.serve.worker.local_backend import BackendSettings, model_info
from llava.train import estimate_inputs
from llava.train.train import train
from tests import tiny
from tests.model.test_builder import edit_config
from tests.model.test_packed import batch_of
from tests.test_package import ROOT
from tests.train import runs

PAGE = (ROOT / "docs" / "Customize_Component.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
EXAMPLE = re.compile(r"```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"`llava/(\S+)\.py`:\n")
LINES = re.compile(r"^The lines? in `(\w+)`.*?:\n\n```\n(.*?)^```", re.MULTILINE | re.DOTALL)
REGISTRIES = dict(re.findall(r"`(\w+)` in `(llava/\S+)\.py`", PAGE))


class Example(NamedTuple):
    module: types.ModuleType
    entries: dict[str, Any]


def install(name: str, monkeypatch: pytest.MonkeyPatch) -> Example:
    """Put the file and the registry lines of a section in place."""
    section = SECTIONS[name]
    (code,) = EXAMPLE.findall(section)
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    path = FILE.findall(section)
    module = types.ModuleType(f"llava.{path[0].replace('/', '.')}" if path else "example")
    exec(compile(code, module.__name__, "exec"), module.__dict__)
    if path:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    ((table, lines),) = LINES.findall(section)
    entries = eval("{" + lines + "}", module.__dict__)  # noqa: S307
    home = importlib.import_module(REGISTRIES[table].replace("/", "."))
    for key, entry in entries.items():
        assert key not in getattr(home, table)
        monkeypatch.setitem(getattr(home, table), key, entry)
    return Example(module, entries)


def test_every_section_has_an_example() -> None:
    assert [name for name, section in SECTIONS.items() if LINES.search(section)] == [
        *("A projector", "A vision tower", "A language model", "A conversation template"),
        *("A benchmark", "A scorer", "A loss", "A distillation loss", "A freeze policy"),
    ]


@pytest.fixture
def dinov2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tower of the page, and a tiny DINOv2: 16 patches of 14 pixels."""
    install("A vision tower", monkeypatch)
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=14
    )
    Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    return tmp_path / "dinov2"


@torch.no_grad()
def test_the_vision_tower(dinov2: Path, tmp_path: Path) -> None:
    chat = tiny.make_chat(tmp_path / "chat", dinov2, mm_vision_select_layer=-2)
    assert "dinov2, 4 of 4 layers, width 32" in examine(dinov2).parts[0].detail
    assert "dinov2, 3 of 4 layers, width 32" in examine(chat).parts[2].detail
    _, model, processor, _ = load_pretrained_model(chat, device="cpu")
    assert processor.crop_size == {"height": 56, "width": 56}
    pixels = torch.randn(2, 3, 56, 56)
    features = model.get_vision_tower()(pixels)
    stock = Dinov2Model.from_pretrained(dinov2).eval()
    expected = stock(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(features, expected)
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert "model.vision_tower.vision_tower.encoder.layer.3.norm1.weight" in saved  # whole, like any other tower


def test_without_the_line_a_tower_is_unknown(dinov2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(registry.TOWERS, "dinov2")
    with pytest.raises(CheckpointError, match="'dinov2', which is not one of clip"):
        build_vision_tower(SimpleNamespace(vision_tower=str(dinov2), mm_vision_select_layer=-2))


@torch.no_grad()
def test_the_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_dirs: dict[str, Path]) -> None:
    assert list(install("A language model", monkeypatch).entries) == ["mistral", "llava_mistral"]
    tokenizer = tiny.make_tokenizer(tmp_path / "base")
    torch.manual_seed(0)
    stock = MistralForCausalLM(MistralConfig(**tiny.llama_settings(vocab_size=len(tokenizer)))).eval()
    stock.save_pretrained(tmp_path / "base")
    tiny.make_projector_only(tmp_path / "projector", tiny_dirs["chat"])
    edit_config(tmp_path / "projector", model_type="llava_mistral")
    assert examine(tmp_path / "base").found.kind is Kind.LANGUAGE_MODEL
    assert len(examine(tmp_path / "projector", tmp_path / "base").parts) == 3
    _, model, processor, _ = load_pretrained_model(tmp_path / "projector", tmp_path / "base", device="cpu")
    words = torch.tensor([[1, 5, 9, 11]])
    assert torch.equal(model(words).logits, stock(words).logits)
    params = SamplingParams(max_new_tokens=4)
    prompt, image = "<image>\nWhy?", torch.linspace(-1, 1, 3 * 56 * 56).reshape(3, 56, 56)
    (answer,) = Engine(model, tokenizer, processor).generate([Request(prompt, [image], params)])
    ids = torch.tensor([tokenizer_image_token(prompt, tokenizer)])
    alone = model.generate(ids, images=image[None], max_new_tokens=4, do_sample=False)
    assert answer.token_ids == tuple(alone[0, ids.shape[1] :].tolist())
    model.save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    whole = load_pretrained_model(tmp_path / "whole", device="cpu", load_8bit=True)[1]
    assert type(whole).__name__ == "LlavaMistralForCausalLM"
    assert whole.model.layers[0].mlp.up_proj.weight.dtype is torch.int8


@torch.no_grad()
def test_the_projector_in_engine_estimate_and_worker(
    tiny_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of image tokens is the projector's everywhere; prefix-cache hits equal `generate`."""
    (kind,) = install("A projector", monkeypatch).entries
    chat = tiny.make_chat(
        tmp_path / "chat", tiny_dirs["tower"], mm_projector_type=kind, initializer_range=0.25, hidden_size=64
    )
    assert ("image", "56 px, 4 tokens") in examine(chat).facts
    tokenizer, model, processor, _ = load_pretrained_model(chat, device="cpu")
    assert model.num_image_tokens == 4
    assert model.encode_images(torch.zeros(1, 3, 56, 56)).shape == (1, 4, 64)
    engine, counts = Engine(model, tokenizer, processor), []
    image = torch.randn(3, 56, 56, generator=torch.Generator().manual_seed(0))
    begin = [1, *range(300, 320), -200, *range(320, 340)]
    for ids in ([*begin, 5, 6, 7], [*begin, 5, 6, 7, 8, 9], [*begin, 11, 12, 13]):
        (answer,) = engine.generate([Request(ids, [image], SamplingParams(max_new_tokens=12))])
        alone = model.generate(
            torch.tensor([ids]), images=image[None], do_sample=False, max_new_tokens=12, eos_token_id=2
        )
        assert answer.token_ids == tuple(alone[0, len(ids) :].tolist())
        counts.append(answer.prompt_tokens - len(ids))
    assert engine.prefiller.cached_tokens > 2 * len(begin)  # later rounds were prefix hits
    assert counts == [3, 3, 3]
    assert model_info(engine, "chat", None, BackendSettings()).image_tokens == 4
    flags: Any = SimpleNamespace(
        model_name_or_path=str(tiny_dirs["base"]), vision_tower=str(tiny_dirs["tower"]), mm_projector_type=kind,
        mm_vision_select_layer=-4, mm_vision_select_feature="patch", mm_vision_image_size=56,
    )  # fmt: skip
    assert estimate_inputs.shape_from_flags(flags).image_tokens == 4


def test_everything_in_one_training_run(
    dinov2: Path, tiny_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tower, projector, template, loss and freeze policy of the page, and the checkpoint answers in the engine."""
    names = ("A projector", "A conversation template", "A loss", "A freeze policy")
    kind, template, loss, policy = (next(iter(install(name, monkeypatch).entries)) for name in names)
    data = runs.make_data(tmp_path / "data", samples=8)
    argv = runs.flags(
        tiny_dirs, data, tmp_path / "out", 2, vision_tower=dinov2, mm_projector_type=kind, version=template, loss=loss,
        freeze_policy=policy, mm_vision_select_layer=-2, max_steps=2,
    )  # fmt: skip
    train(argv)
    assert len(runs.losses(tmp_path / "out")) == 2
    before, after = load_file(tiny_dirs["base"] / "model.safetensors"), runs.tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert changed and all("norm" in name for name in changed)
    tokenizer, model, processor, _ = load_pretrained_model(tmp_path / "out", device="cpu")
    assert (model.config.conv_template, model.num_image_tokens) == (template, 4)
    request = Request(
        "<image>\nWhat color is it?", [Image.new("RGB", (60, 60), "red")], SamplingParams(max_new_tokens=3)
    )
    (answer,) = Engine(model, tokenizer, processor).generate([request])
    assert len(answer.token_ids) <= 3


def test_the_template(monkeypatch: pytest.MonkeyPatch) -> None:
    install("A conversation template", monkeypatch)
    template = get_template("terse")
    assert isinstance(template, Conversation)
    template.append_message("USER", "Why?")
    template.append_message("ASSISTANT", None)
    assert template.get_prompt() == "Answer with a single word. USER: Why? ASSISTANT:"


def test_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    focal = install("A loss", monkeypatch).entries["focal"]
    logits, targets = torch.randn(5, 7), torch.tensor([0, 1, 2, 3, 4])
    plain = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(focal(logits, targets, None, gamma=0.0), plain)
    assert (focal(logits, targets, None) < plain).all()
    assert focal(logits[:0], targets[:0], None).shape == (0,)


@pytest.mark.parametrize("images", [True, False])
def test_the_distillation_loss(tiny_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, images: bool) -> None:
    """From itself a model learns nothing; from another one it learns, and one call of the teacher serves all chunks."""
    made = install("A distillation loss", monkeypatch)
    assert list(made.entries) == ["distillation"]
    monkeypatch.setattr(lm_head, "CHUNK_BYTES", 2 * 384 * 4)
    batch = batch_of([(9, 1 if images else 0), (14, 0), (5, 2 if images else 0)], 1)
    batch |= {} if images else {"images": None}
    model = load_pretrained_model(tiny_dirs["chat"], device="cpu")[1].train()
    plain = model(**batch).loss
    model.loss_function = distilled = made.module.Distillation(str(tiny_dirs["chat"]), share=1.0)
    itself = model(**batch).loss
    itself.backward()
    assert 0 <= itself.abs() < 1e-6 and model.lm_head.weight.grad.abs().max() < 1e-6
    with torch.no_grad():
        distilled.model.lm_head.weight.mul_(2)
    calls: list[object] = []
    distilled.model.get_model().register_forward_hook(lambda *given: calls.append(given))
    assert model(**batch).loss > 1e-3
    assert len(calls) == 1
    distilled.share = 0.0
    torch.testing.assert_close(model(**batch).loss, plain)


@pytest.fixture
def colors(tmp_path: Path) -> Path:
    root = tmp_path / "colors"
    (root / "images").mkdir(parents=True)
    names = ("red", "blue")
    for name in names:
        Image.new("RGB", (8, 8), name).save(root / "images" / f"{name}.png")
    rows = [{"question_id": i, "image": f"{name}.png", "text": "What color?"} for i, name in enumerate(names)]
    (root / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = [{"question_id": i, "label": name} for i, name in enumerate(names)]
    (root / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    return root


def test_the_benchmark(colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava.eval.benchmarks.registry import make_task

    install("A benchmark", monkeypatch)
    task = make_task("colors", colors)
    assert [question.prompt for question in task.questions()] == ["What color?"] * 2
    answers = tmp_path / "answers.jsonl"
    rows = [{"question_id": 0, "text": "Red"}, {"question_id": 1, "text": "green"}]
    answers.write_text("".join(json.dumps({"prompt": "What color?", "metadata": {}, **row}) + "\n" for row in rows))
    scores = task.score(answers)
    assert task.primary_metric(scores) == 50.0
    assert "Accuracy: 50.00%" in task.table(scores)


def test_the_scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava.eval.benchmarks.registry import make_task

    install("A scorer", monkeypatch)
    (tmp_path / "coco").mkdir()
    question = {"image": "a.jpg", "text": "Is there a cat?"}
    (tmp_path / "coco" / "coco_pope_random.json").write_text(json.dumps({**question, "label": "yes"}) + "\n")
    (tmp_path / "llava_pope_test.jsonl").write_text(
        json.dumps({**question, "question_id": 1, "category": "random"}) + "\n"
    )
    task = make_task("pope_strict", tmp_path)
    assert task.score_rows([{"question_id": 1, "text": "Yes."}], tmp_path)["accuracy"] == 100.0
    assert task.score_rows([{"question_id": 1, "text": "There is one"}], tmp_path)["accuracy"] == 0.0
