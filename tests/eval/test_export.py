"""Results of runs in the forms of lmms-eval and of model cards."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from llava.eval import report
from llava.eval.benchmarks.registry import TASKS
from llava.eval.reporting.data import read_run
from llava.eval.reporting.export import LMMS_EVAL, lmms_eval

INTERVAL = {"value": 80.0, "low": 78.0, "high": 82.0, "standard_error": 1.0, "clusters": 500, "detectable": 4.0}


def write_score(folder: Path, task: str, paths: list[str], **facts: Any) -> None:
    (folder / task).mkdir(parents=True)
    split = "val" if task in ("vqav2", "vizwiz") else next(iter(TASKS[task].layouts))
    score = {
        "model_id": "me/llava-v1.5-13b", "task": task, "split": split, "questions": 90, "published_questions": 100,
        "limit": None, "primary_metric": 80.123, "answers": 90, "unread": 1, "primary_interval": INTERVAL,
        "intervals": dict.fromkeys(paths, INTERVAL),
    }  # fmt: skip
    (folder / task / "score.json").write_text(json.dumps({**score, **facts}))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    for task, targets in LMMS_EVAL.items():
        write_score(folder, task, [path for target in targets.values() for path, _ in target.values()])
    write_score(folder, "easy_vqa", ["overall/accuracy"])
    manifest = {"identity": {"chunk": [0, 1], "decoding": {"temperature": 0}}, "environment": {"commit": "abc"}}
    (folder / "vqav2" / "answers.jsonl.manifest.json").write_text(json.dumps(manifest))
    return folder


def test_every_exported_metric_has_an_interval_in_its_task() -> None:
    """The paths are those of `Task.metrics`; tests of the outcomes hold these to the scores."""
    assert LMMS_EVAL.keys() == TASKS.keys() - {"easy_vqa"}


def test_a_results_file_has_the_keys_and_units_of_lmms_eval(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(run), "--format", "lmms-eval", "--output-dir", str(tmp_path / "out")]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path.parent == tmp_path / "out" / "me__llava-v1.5-13b"
    assert re.fullmatch(r"\d{8}_\d{6}_results\.json", path.name)
    content = json.loads(path.read_text())
    results = content["results"]
    assert results["gqa"] == {"alias": "gqa", "exact_match,none": 0.8, "exact_match_stderr,none": 0.01}
    assert results["pope"]["pope_f1_score,none"] == 80 and results["pope_adv"]["pope_yes_ratio_stderr,none"] == 1
    assert results["mme"]["mme_perception_score,none"] == results["mme"]["mme_cognition_score,none"] == 80
    assert results["scienceqa_img"]["exact_match,none"] == 0.8 and results["seedbench"]["seed_all,none"] == 0.8
    assert results["mmbench_en_dev"]["gpt_eval_score,none"] == 80 and results["easy_vqa"]["exact_match,none"] == 80
    keys = ("group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
    assert all(content[key].keys() == results.keys() for key in keys)
    assert content["n-samples"]["gqa"] == {"original": 100, "effective": 90}
    assert content["configs"]["textvqa_val"]["metadata"]["evaluator"] == "llava"
    assert content["config"]["model_args"] == "pretrained=me/llava-v1.5-13b" and content["config"]["limit"] is None
    assert content["config"]["gen_kwargs"] == {"temperature": 0} and content["git_hash"] == "abc"


def test_a_model_index_is_valid_metadata_of_a_model_card(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(run), "--format", "model-index", "--output-dir", str(tmp_path / "out")]) == 0
    card = ModelCard(Path(capsys.readouterr().out.strip()).read_text())
    assert card.data.model_name == "me/llava-v1.5-13b" and len(card.data.eval_results) == 14
    (pope,) = [each for each in card.data.eval_results if each.dataset_name == "POPE"]
    assert (pope.dataset_type, pope.dataset_split, pope.metric_type) == ("lmms-lab/POPE", "test", "f1")
    assert (pope.metric_value, pope.metric_name) == (80.12, "95 % CI 78.0–82.0, 500 images")
    assert pope.task_type == "image-text-to-text" and pope.verified is None


def test_absent_groups_are_left_out_and_old_scores_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_score(tmp_path / "part", "seed", ["total"], limit=5)
    (row,) = lmms_eval(read_run(tmp_path / "part"))["results"].values()
    assert row.keys() == {"alias", "seed_all,none", "seed_all_stderr,none"}
    write_score(tmp_path / "old", "gqa", [])
    score = json.loads((tmp_path / "old" / "gqa" / "score.json").read_text())
    del score["intervals"]
    (tmp_path / "old" / "gqa" / "score.json").write_text(json.dumps(score))
    assert report.main([str(tmp_path / "old"), "--format", "lmms-eval"]) == 2
    assert "has no intervals, because an older version wrote it; score the run again" in capsys.readouterr().err
    write_score(tmp_path / "server", "vqav2", [], primary_metric=None)
    assert report.main([str(tmp_path / "server"), "--format", "model-index"]) == 2
    assert "there is nothing to export" in capsys.readouterr().err
