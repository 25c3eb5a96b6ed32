"""Model cards: valid metadata, what a run did, and a README of the user that stays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from llava.errors import CheckpointError
from llava.train import model_card, run_metadata
from llava.train.train import train
from tests.train import runs

Dirs = dict[str, Path]


@pytest.fixture(scope="module")
def trained(tiny_dirs: Dirs, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage-2 run with validation and a loss curve, on a base model with a license."""
    root = tmp_path_factory.mktemp("card")
    base = shutil.copytree(tiny_dirs["base"], root / "base-tiny")
    (base / "LICENSE.txt").write_text(
        "LLAMA 2 COMMUNITY LICENSE AGREEMENT\nLlama 2 Version Release Date: July 18, 2023\n"
    )
    more = {
        "max_steps": 3,
        "validation_fraction": 0.2,
        "evaluation_strategy": "steps",
        "eval_steps": 1,
        "eval_generations": 0,
    }
    more |= {"plot_loss": True, "mm_projector_lr": 1e-3, "data_path": root / "llava_v1_5_mix665k.json", "bf16": True}
    shutil.copy(small_data / "finetune.json", more["data_path"])
    train(runs.flags({**tiny_dirs, "base": base}, small_data, root / "run", 2, **more))
    return root / "run"


def test_the_metadata_is_what_the_hub_reads(trained: Path) -> None:
    card = ModelCard.load(trained / "README.md")
    assert card.data.to_dict() == {
        "license": "llama2",
        "datasets": ["liuhaotian/LLaVA-Instruct-150K"],
        "library_name": "llava",
        "pipeline_tag": "image-text-to-text",
        "tags": ["llava", "internvl-chat"],
    }
    assert card.data.to_dict() == yaml.safe_load((trained / "README.md").read_text().split("---\n")[1])


def test_the_text_says_what_the_run_did(trained: Path) -> None:
    text, run = (trained / "README.md").read_text(), json.loads((trained / "run.json").read_text())
    history = runs.history(trained)
    for row in (
        "| base model | `base-tiny` |",
        "| vision tower | `intern_vit_6b_tiny_224px`, layer -4, 56 pixels |",
        "| data | `llava_v1_5_mix665k.json`; 26 records |",
        "| steps | 3, global batch 4, loss groups of 4 |",
        "| learning rate | 0.002; projector 0.001; cosine, warm-up 0.1 |",
        "| precision | bfloat16 |",
        f"| hardware | {run['hardware']} |",
        f"| training loss, mean | {run['train_loss']:.4f} |",
        f"| training loss, last | {history[-1]['loss']:.4f} |",
        "llava chat --model-path run --image-file photo.jpg",
        "![Loss curve](loss.png)",
        "llama2, as the base model.",
    ):
        assert row in text
    assert "| validation loss, best | " in text and f"torch {run['versions']['torch']}" in text
    flags = text.split("```sh\n")[2].split("```")[0].splitlines()
    assert {"--learning_rate 0.002", "--mm_use_im_patch_token False", "--image_aspect_ratio pad"} <= set(flags)
    assert not any(name in text for name in ("'[]'", "--output_dir", "--hub_token", str(trained.parent)))
    assert "Training has not ended" not in text


def test_scores_of_an_evaluation_join_the_card(trained: Path, tmp_path: Path) -> None:
    out = shutil.copytree(trained, tmp_path / "run")
    for task, score in (("easy_vqa", 97.125), ("vqav2", None)):
        (out / "eval" / task).mkdir(parents=True)
        scores = {"task": task, "split": "test", "questions": 1000, "primary_metric": score}
        scores["primary_interval"] = score and {"low": 96.04, "high": 98.0}
        (out / "eval" / task / "score.json").write_text(json.dumps(scores))
    assert model_card.main([str(out), "--name", "me/run"]) == 0
    card = ModelCard.load(out / "README.md")
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.dataset_split, result.metric_value) == ("easy_vqa", "test", 97.12)
    row = "| `easy_vqa` | test | 1,000 | 97.12 | 95 % CI 96.0–98.0 |"
    assert card.data.model_name == "me/run" and row in card.text and result.metric_name == "score, 95 % CI 96.0–98.0"
    assert "--model-path me/run" in card.text and "vqav2" not in card.text


def test_a_readme_of_the_user_stays(trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = shutil.copytree(trained, tmp_path / "run")
    mine = (out / "README.md").read_text().replace(model_card.MARKER, "") + "\nMy notes.\n"
    (out / "README.md").write_text(mine)
    with caplog.at_level("INFO"):
        model_card.write_card(out)
    assert (out / "README.md").read_text() == mine and "stays as it is" in caplog.text


def test_a_card_that_cannot_be_written_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    with pytest.raises(CheckpointError, match=r"has no run.json of llava train"):
        model_card.write_card(tmp_path)
    model_card.try_to_write_card(tmp_path)
    assert "cannot be written" in caplog.text and not list(tmp_path.iterdir())
    assert model_card.main([str(tmp_path)]) == 2


def test_license_and_hub_name_of_a_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--lmsys--vicuna-7b-v1.5" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    assert run_metadata.source(str(snapshot)) == {"hub": "lmsys/vicuna-7b-v1.5"}
    (snapshot / "README.md").write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n# Card\n")
    assert run_metadata.source(str(snapshot))["license_name"] == "mine"
    (snapshot / "README.md").write_text("---\n: [\n---\n")
    (snapshot / "LICENSE").write_text("                Apache License\n           Version 2.0, January 2004\n")
    assert run_metadata.license_of(snapshot) == {"license": "apache-2.0"}
    assert run_metadata.source(str(tmp_path / "nowhere")) == {} == run_metadata.source("not/a/name")


def test_a_mixture_and_a_base_on_the_hub(trained: Path, tmp_path: Path) -> None:
    facts: dict[str, Any] = json.loads((trained / "run.json").read_text())
    facts["arguments"]["data"] |= {"data_path": None, "meta_path": str(tmp_path / "mix.json")}
    facts["sources"]["model_name_or_path"] = {"hub": "lmsys/vicuna-7b-v1.5", "license": "llama2"}
    entry = {"annotation": "a.jsonl", "root": "", "repeat_time": 2}
    (tmp_path / "mix.json").write_text(json.dumps({"captions": entry, "a|b": {**entry, "repeat_time": 1}}))
    del facts["steps"]
    (tmp_path / "run.json").write_text(json.dumps(facts))
    card = ModelCard(model_card.card_text(tmp_path, "me/run"))
    assert card.data.base_model == "lmsys/vicuna-7b-v1.5" and card.data.base_model_relation == "finetune"
    assert r"| data | `mix.json`: captions x 2, a\|b x 1; 26 records |" in card.text
    assert "Training has not ended" in card.text
