"""QLoRA with bitsandbytes: the decoder in 8 or 4 bits, adapters and projector trained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava.errors import ConfigError
from llava.model.builder import load_pretrained_model
from llava.train.train import refuse_unsupported, train
from tests import tiny
from tests.model.test_loss import compare_with_table
from tests.train import runs
from tests.train.test_lora import DECODER, FILES, IDS, PIXELS, flags, learning, prepared

Dirs = dict[str, Path]
PACKED = (torch.int8, torch.uint8)


@pytest.fixture(scope="module")
def dirs(tiny_dirs: Dirs, tmp_path_factory: pytest.TempPathFactory) -> Dirs:
    """A base whose layers are whole blocks of the 4-bit kernel."""
    base = tiny.make_base(tmp_path_factory.mktemp("base") / "base", hidden_size=64, intermediate_size=128)
    return {**tiny_dirs, "base": base}


def decoder_layers(model: Any) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if n.endswith("base_layer")}


@pytest.mark.parametrize("bits", [8, 4])
def test_only_the_decoder_is_quantized_and_dtypes_are_right(
    dirs: Dirs, small_data: Path, tmp_path: Path, bits: int
) -> None:
    model, _ = prepared(dirs, small_data, tmp_path, bits=bits, bf16=True)
    layers = decoder_layers(model)
    assert len(layers) == 2 * len(DECODER)
    assert {layer.weight.dtype for layer in layers.values()} == {torch.int8 if bits == 8 else torch.uint8}
    packed = {f"{name}.weight" for name in layers}
    for name, parameter in model.named_parameters():
        if name in packed:
            continue
        norm = "norm" in name and "vision_tower" not in name
        master = norm or ".lora_" in name or "mm_projector" in name
        assert parameter.dtype is (torch.float32 if master else torch.bfloat16), name
        assert (name in learning(model)) == (".lora_" in name or "mm_projector" in name)
    tower = {p.dtype for n, p in model.named_parameters() if "vision_tower" in n and "norm" in n}
    assert tower == {torch.bfloat16}


@pytest.mark.parametrize("bits", [8, 4])
def test_the_loss_is_computed_in_chunks(
    dirs: Dirs, small_data: Path, tmp_path: Path, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = prepared(dirs, small_data, tmp_path, bits=bits)
    compare_with_table(model, monkeypatch, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("quant_type", "double"), [("nf4", True), ("fp4", False)])
def test_flags_set_the_4_bit_format(
    dirs: Dirs, small_data: Path, tmp_path: Path, quant_type: str, double: bool
) -> None:
    more = {"bits": 4, "quant_type": quant_type, "double_quant": double}
    for layer in decoder_layers(prepared(dirs, small_data, tmp_path, **more)[0]).values():
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested) == (quant_type, double)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=IDS, images=PIXELS).logits
    return result


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.02), (4, 0.2)])
def test_qlora_trains_keeps_quantized_weights_and_loads_on_the_full_base(
    dirs: Dirs, small_data: Path, tmp_path: Path, bits: int, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava.train import train as program

    model, _ = prepared(dirs, small_data, tmp_path / "untrained", bits=bits)
    before = {name: layer.weight.detach().clone() for name, layer in decoder_layers(model).items()}
    finished: list[Any] = []
    finish = program.finish

    def watched(trainer: Any, dtype: torch.dtype) -> None:
        finish(trainer, dtype)
        finished.append(trainer.model)

    monkeypatch.setattr(program, "finish", watched)
    train(flags(dirs, small_data, tmp_path / "out", bits=bits, gradient_checkpointing=True))
    (trained,) = finished
    assert all(torch.equal(layer.weight, before[name]) for name, layer in decoder_layers(trained).items())
    train(flags(dirs, small_data, tmp_path / "full"))
    assert runs.losses(tmp_path / "out") == pytest.approx(runs.losses(tmp_path / "full"), abs=0.08)
    assert runs.losses(tmp_path / "out")[-1] < runs.losses(tmp_path / "out")[0] - 0.05

    saved = {path.name for path in (tmp_path / "out").iterdir()}
    assert saved == FILES | {"README.md", "log.jsonl", "run.json"}
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    loaded = load_pretrained_model(tmp_path / "out", device="cpu")[1]
    want, got = logits(trained), logits(loaded)
    assert (got - want).norm() / want.norm() < tolerance


def test_quantized_weights_with_zero3_are_refused() -> None:
    zero3 = str(runs.ROOT / "scripts/zero3.json")
    args: Any = SimpleNamespace(bits=4, n_gpu=1, deepspeed=zero3, per_device_train_batch_size=1, world_size=1)
    args.hf_deepspeed_config = SimpleNamespace(is_zero3=lambda: True)
    with pytest.raises(ConfigError, match="ZeRO stage 3"):
        refuse_unsupported(args)
    args.hf_deepspeed_config = SimpleNamespace(is_zero3=lambda: False)
    refuse_unsupported(args)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_resume_is_exact(
    dirs: Dirs, small_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, bits: int
) -> None:
    more = {"bits": bits, "bf16": True, "lora_dropout": 0.3, "save_strategy": "steps", "save_steps": 5}
    argv = flags(dirs, small_data, tmp_path, **more)
    train(argv)
    before, losses = runs.tensors(tmp_path), runs.losses(tmp_path)
    train(argv)
    assert f"Resuming from {tmp_path / 'checkpoint-5'}" in caplog.text
    assert runs.losses(tmp_path) == losses and len(losses) == 8
    assert all(torch.equal(value, before[name]) for name, value in runs.tensors(tmp_path).items())


@pytest.mark.slow
def test_a_killed_run_resumes_exactly(dirs: Dirs, small_data: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = {"save_strategy": "steps", "save_steps": 3, "bits": 4, "lora_dropout": 0.3}
    train(flags(dirs, small_data, whole, **more))
    argv = flags(dirs, small_data, killed, **more)
    runs.kill_at(argv, killed, 5, tmp_path / "log")
    runs.finish(argv, tmp_path / "log")
    assert "Resuming from" in (tmp_path / "log").read_text()
    runs.assert_equal_runs(whole, killed)
