"""The shipped ZeRO files: published values, accepted by the installed DeepSpeed, and described in the log."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llava.errors import ConfigError
from llava.train import zero

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
NAMES = ("zero1", "zero2", "zero3", "zero3_offload")


def load(name: str) -> dict[str, Any]:
    return zero.read_config(str(SCRIPTS / f"{name}.json"))


def numbers(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers(v)]
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def test_all_shipped_files_are_known() -> None:
    assert sorted(path.stem for path in SCRIPTS.glob("zero*.json")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_file_holds_the_published_values_as_integers(name: str) -> None:
    config = load(name)
    assert config["zero_optimization"]["stage"] == int(name[4])
    for key in ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps"):
        assert config[key] == "auto"
    assert config["bf16"] == {"enabled": "auto"}
    assert config["fp16"]["initial_scale_power"] == 16 and config["fp16"]["enabled"] == "auto"
    assert not any(isinstance(number, float) for number in numbers(config))
    assert ("gradient_clipping" in config) == (name == "zero3_offload")


@pytest.mark.parametrize("name", NAMES)
def test_deepspeed_accepts_a_shipped_file(name: str) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    section = {k: v for k, v in load(name)["zero_optimization"].items() if v != "auto"}
    parsed = DeepSpeedZeroConfig(**section)
    assert int(parsed.stage) == int(name[4])
    if name.startswith("zero3"):
        assert parsed.gather_16bit_weights_on_model_save


def test_the_automatic_prefetch_size_becomes_an_integer() -> None:
    config: dict[str, Any] = {
        "zero_optimization": {"stage3_prefetch_bucket_size": "auto", "reduce_bucket_size": "auto"}
    }
    zero.fill_defaults(config, 48)
    assert config["zero_optimization"] == {"stage3_prefetch_bucket_size": 2073, "reduce_bucket_size": "auto"}


def test_missing_gradient_clipping_means_none() -> None:
    config, own = load("zero2"), {"gradient_clipping": "auto"}
    zero.fill_defaults(config, 48)
    zero.fill_defaults(own, 48)
    assert config["gradient_clipping"] == 0.0 and own["gradient_clipping"] == "auto"


def test_description_of_clipping_and_schedule() -> None:
    assert "clipped at norm 1.0" in zero.describe_schedule(None, 1.0, "cosine")
    assert "accumulated in float32 and not clipped" in zero.describe_schedule(load("zero2"), 1.0, "cosine")
    assert "in the dtype of the weights" in zero.describe_schedule({}, 1.0, "cosine")
    offload = zero.describe_schedule(load("zero3_offload"), 1.0, "cosine")
    assert "clipped at norm 1.0 by DeepSpeed" in offload and "WarmupLR" in offload


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist"), ("{", "not JSON"), ("[]", "must hold a JSON object, got list")]
)
def test_invalid_zero_files_are_errors(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "zero.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        zero.read_config(str(path))


def test_files_stay_formatted() -> None:
    for name in NAMES:
        text = (SCRIPTS / f"{name}.json").read_text()
        assert text == json.dumps(json.loads(text), indent=2) + "\n"


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        ("gradient_accumulation_steps", "auto", True),
        ("gradient_accumulation_steps", 1, True),
        ("gradient_accumulation_steps", 4, False),
        ("train_micro_batch_size_per_gpu", 4, True),
        ("train_micro_batch_size_per_gpu", 8, False),
        ("train_batch_size", 128, False),
    ],
)
def test_the_flags_set_the_batch_size(tmp_path: Path, key: str, value: object, accepted: bool) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({**load("zero2"), key: value}))
    args: Any = SimpleNamespace(deepspeed=str(file), per_device_train_batch_size=4, world_size=2)
    with nullcontext() if accepted else pytest.raises(ConfigError, match=f'"{key}" must be "auto" in .*, got {value};'):
        zero.check_batch_sizes(args)
