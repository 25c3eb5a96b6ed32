"""Uploads to the hub during training, against a hub on loopback."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from llava.errors import ConfigError
from llava.train.hub import STAGING, HubUploader
from llava.train.train import main, train
from tests.train import fake_hub, runs

Dirs = dict[str, Path]
PROJECTOR = {"README.md", "config.json", "mm_projector.bin", "mm_projector.safetensors"}
RUN = {"run.json", "log.jsonl", "trainer_state.json"}
STATES = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_hub.Hub]:
    with fake_hub.running(monkeypatch) as hub:
        yield hub


def pushed(dirs: Dirs, data: Path, out: Path, **more: Any) -> list[str]:
    """A stage-1 run of four steps with two saves."""
    values = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "push_to_hub": True, "hub_model_id": "me/run"}
    return runs.flags(dirs, data, out, 1, **(values | more))


def test_every_save_and_the_result_are_uploaded(tiny_dirs: Dirs, small_data: Path, tmp_path: Path, hub: Any) -> None:
    out = tmp_path / "out"
    train(pushed(tiny_dirs, small_data, out, save_total_limit=1, hub_always_push=True, hub_private_repo=True))
    assert [(name, message) for name, message, _ in hub.commits] == [
        ("me/run", "Training in progress, step 2"),
        ("me/run", "Training in progress, step 4"),
        ("me/run", "End of training"),
    ]
    assert [set(paths) for _, _, paths in hub.commits] == [PROJECTOR, PROJECTOR, PROJECTOR | RUN]
    assert hub.private == {"me/run"}
    for name, content in hub.repositories["me/run"].items():
        assert (out / name).read_bytes() == content
    assert b"\nlicense_name: see-base-model\n" in hub.repositories["me/run"]["README.md"]
    assert not (out / STAGING).exists()
    assert json.loads(hub.repositories["me/run"]["run.json"])["steps"] == 4


def test_whole_checkpoints_are_uploaded_to_resume_from(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, hub: Any
) -> None:
    more = {"hub_strategy": "checkpoint", "hub_always_push": True}
    hub.repositories["me/run"] = {"last-checkpoint/of_an_earlier_run.pt": b"", "notes.txt": b"mine"}
    train(pushed(tiny_dirs, small_data, tmp_path / "out", **more))
    files = set(hub.repositories["me/run"])
    inside = {name.removeprefix("last-checkpoint/") for name in files if name.startswith("last-checkpoint/")}
    assert inside == PROJECTOR - {"README.md"} | STATES | {"trainer_state.json"}
    assert "notes.txt" in files
    state = json.loads(hub.repositories["me/run"]["last-checkpoint/trainer_state.json"])
    assert state["global_step"] == 4

    train(
        pushed(
            tiny_dirs,
            small_data,
            tmp_path / "all",
            hub_model_id="all",
            hub_strategy="all_checkpoints",
            hub_always_push=True,
        )
    )
    assert {name.partition("/")[0] for name in hub.repositories["me/all"] if "/" in name} == {
        "checkpoint-2",
        "checkpoint-4",
    }


def test_the_end_alone_in_the_name_of_the_directory(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, hub: Any
) -> None:
    """A full model is uploaded without the pickle of the arguments; a card of the user is uploaded as it is."""
    out = tmp_path / "my-run"
    out.mkdir()
    (out / "README.md").write_text("My model.\n")
    argv = runs.flags(
        tiny_dirs,
        small_data,
        out,
        2,
        max_steps=2,
        push_to_hub=True,
        hub_strategy="end",
        save_strategy="steps",
        save_steps=1,
    )
    train(argv)
    ((name, message, paths),) = hub.commits
    assert (name, message) == ("me/my-run", "End of training")
    tokenizer = {"special_tokens_map.json", "tokenizer.model", "tokenizer_config.json"}
    assert set(paths) == {"README.md", "config.json", "generation_config.json", "model.safetensors"} | tokenizer | RUN
    assert hub.repositories["me/my-run"]["README.md"] == b"My model.\n"


def test_adapters_are_uploaded_as_safetensors(tiny_dirs: Dirs, small_data: Path, tmp_path: Path, hub: Any) -> None:
    more = {"max_steps": 2, "lora_enable": True, "lora_r": 4, "push_to_hub": True, "save_strategy": "epoch"}
    train(runs.flags(tiny_dirs, small_data, tmp_path / "lora", 2, **more))
    for _, _, paths in hub.commits:
        assert {"adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.model"} <= set(paths)
        assert {"non_lora_trainables.bin", "non_lora_trainables.safetensors"} <= set(paths)
        assert "training_args.bin" not in paths
    card = ModelCard(hub.repositories["me/lora"]["README.md"].decode())
    assert card.data.library_name == "peft" and {"peft", "lora"} <= set(card.data.tags)


def test_a_save_during_an_upload_is_skipped_and_made_up_for_at_the_end(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, hub: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The upload of step 2 lasts until step 4 is saved and checkpoint-2 deleted; training does not wait for it."""
    hub.gate.clear()
    saves, save = [], HubUploader.on_save

    def watched(self: HubUploader, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        saves.append(1)
        assert hub.waiting.wait(60)
        if len(saves) == 2:
            hub.gate.set()

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(HubUploader, "on_save", watched)
        train(pushed(tiny_dirs, small_data, tmp_path / "out", save_total_limit=1, hub_strategy="checkpoint"))
    assert "The last upload still runs; step 4 is not uploaded." in caplog.text
    messages = [message for _, message, _ in hub.commits]
    assert messages == ["Training in progress, step 2", "Training in progress, step 4", "End of training"]


def test_failed_uploads_are_tried_again_and_end_no_run(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, hub: Any, caplog: pytest.LogCaptureFixture
) -> None:
    hub.failures = 1
    assert main(pushed(tiny_dirs, small_data, tmp_path / "out", hub_always_push=True)) == 0
    assert "step 2: the upload to me/run failed: HfHubHTTPError: " in caplog.text and "storage quota" in caplog.text
    assert [message for _, message, _ in hub.commits] == ["Training in progress, step 4", "End of training"]
    assert "is complete and not uploaded" not in caplog.text

    hub.failures, out = 9, tmp_path / "other"
    assert main(pushed(tiny_dirs, small_data, out, hub_model_id="me/other")) == 0
    assert hub.repositories["me/other"] == {}
    assert f"{out} is complete and not uploaded. To upload it: huggingface-cli upload me/other {out} . " in caplog.text
    assert (out / "mm_projector.safetensors").is_file() and json.loads((out / "run.json").read_text())["steps"] == 4


@pytest.mark.parametrize(("token", "status"), [("wrong", "401 Client Error"), (fake_hub.READ_ONLY, "403 Forbidden")])
def test_a_token_that_cannot_write_is_refused_before_anything_is_loaded(
    tiny_dirs: Dirs,
    small_data: Path,
    tmp_path: Path,
    hub: Any,
    monkeypatch: pytest.MonkeyPatch,
    token: str,
    status: str,
) -> None:
    hub.repositories["me/run"] = {}
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigError, match=f"--push_to_hub cannot write to me/run: .*{status}.*Set HF_TOKEN") as caught:
        train(pushed(tiny_dirs, small_data, tmp_path / "out"))
    assert "\n" not in str(caught.value) and token not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_offline_mode_is_one_sentence(tiny_dirs: Dirs, small_data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="--push_to_hub cannot upload to me/run in offline mode; unset HF_HUB_OFFLINE"
    ):
        train(pushed(tiny_dirs, small_data, tmp_path / "out"))


PROGRAM = [str(runs.ROOT / "llava" / "train" / "train.py")]


@pytest.mark.slow
def test_rank_0_of_two_uploads_and_both_write_traces(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_TOKEN": fake_hub.TOKEN}
    environment = runs.environment
    monkeypatch.setattr(runs, "environment", lambda: {**environment(), **online})
    out = tmp_path / "out"
    argv = pushed(tiny_dirs, small_data, out, per_device_train_batch_size=2, profile_step_start=2, hub_always_push=True)
    runs.finish(argv, tmp_path / "log", 2, PROGRAM)
    assert [message for _, message, _ in hub.commits] == [
        *(f"Training in progress, step {step}" for step in (2, 4)),
        "End of training",
    ]
    assert {file.name for file in (out / "profile").glob("*.gz")} == {
        f"rank{rank}_steps2-2.pt.trace.json.gz" for rank in (0, 1)
    }
