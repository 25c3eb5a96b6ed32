"""The commands in the docs about data and training, run in order on tiny models.

A folder stands in for the project: its scripts, and under the names of the pages small models and data. The shell, the
recipes and the programs are real; `torchrun` and `srun` start one process here, on the CPU, for one step.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests import tiny
from tests.eval.benchdata import make_mme, make_pope, make_science_qa
from tests.eval.in_process import python_in_process
from tests.test_docs import INLINE, written
from tests.test_package import ROOT
from tests.test_recipes import SCALING
from tests.train import runs

PAGES = ("Data", "Finetune_Custom_Data", "Training", "ScienceQA")
SMALLER = (
    "--use_cpu True --bf16 False --tf32 False --deepspeed '' --mm_vision_image_size 56 --max_steps 1 --save_steps 1 "
    "--per_device_train_batch_size 2 --global_batch_size 2 --loss_group_size 2 --dataloader_num_workers 0 "
    "--report_to none --plot_loss False --eval_generations 2"
)
SHIMS = {
    "llava": 'exec python -m llava.cli "$@"',
    "torchrun": f'while [ "${{1%.py}}" = "$1" ]; do shift; done; exec python "$@" {SMALLER}',
}
SHIMS["srun"] = SHIMS["torchrun"]
# flags appended to commands with these prefixes
MORE = {"sh scripts_internvl/eval/": "--device cpu --max-new-tokens 2", "llava chat": "--device cpu --max-new-tokens 2"}
STATUS = {  # of commands that do not end with 0
    "llava check data.json --images": 1,  # one record is bad
    "llava check data.json --image_folder": 3,  # nothing is found, but one image is missing
}


def commands_of(page: str) -> list[str]:
    """Commands of a page in order: code blocks, then complete inline commands."""
    path = ROOT / "docs" / f"{page}.md"
    inline = [command for command in INLINE.findall(path.read_text(encoding="utf-8")) if command.endswith("--help")]
    return [*written(path), *inline]


@pytest.fixture
def project(tiny_dirs: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with models, data, and stand-ins for `python`, `torchrun`, `srun` and `llava`."""
    root = tmp_path / "project"
    for name in ("llava", "scripts", "scripts_internvl"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).symlink_to(ROOT / name)
    (root / "pretrained").mkdir()
    clip = tiny.make_clip_tower(tmp_path / "clip")
    for name, target in {
        **{f"pretrained/vicuna-{size}-v1.5": tiny_dirs["base"] for size in ("7b", "13b")},
        **{f"pretrained/intern_vit_6b_{size}px": tiny_dirs["tower"] for size in ("224", "448")},
        **{f"pretrained/InternVL-Chat-ViT-6B-Vicuna-{size}": tiny_dirs["chat"] for size in ("7B", "13B")},
        "lmsys/vicuna-13b-v1.3": tiny_dirs["base"],
        "openai/clip-vit-large-patch14": clip,
    }.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).symlink_to(target)
    make_datasets(root)
    state = {"model.mm_projector.weight": torch.zeros(48, 32), "model.mm_projector.bias": torch.zeros(48)}
    (root / "work_dirs/llava_pretrain").mkdir(parents=True)
    torch.save(state, root / "work_dirs/llava_pretrain/mm_projector.bin")
    for name in ("224to336_vicuna13b", "448_vicuna7b", "448_vicuna13b"):  # the tiny models are the same
        (root / f"work_dirs/pretrain_internvit6b_{name}").symlink_to("pretrain_internvit6b_224to336_vicuna7b")
    monkeypatch.chdir(root)
    monkeypatch.setattr("sys.stdin", io.StringIO())  # no keyboard input
    return root


def make_datasets(root: Path) -> None:
    """Records and images under the names used in the docs; one custom record is bad."""
    data = runs.make_data(root / "playground/data", samples=20, text_rows=[3])
    (root / "playground/llava_v1_5_mix665k.json").write_bytes((data / "finetune.json").read_bytes())
    (data / "LLaVA-Pretrain").mkdir()
    shutil.move(data / "pretrain.json", data / "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json")
    for folder in (data / "LLaVA-Pretrain/images", data, data / "coco"):
        folder.mkdir(exist_ok=True)
        for index in range(20):
            (folder / f"{index}.png").symlink_to(data / "images" / f"{index}.png")
    records = json.loads((data / "finetune.json").read_text())
    for name, some in (("okvqa_train_9k", records[:2]), ("my_text_only_conversations", records[3:4])):
        (root / f"playground/{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    (root / "images").mkdir()
    Image.new("RGB", (30, 40), "red").save(root / "images/0001.jpg")
    mine: list[dict[str, Any]] = [{**records[0], "image": "0001.jpg"} for _ in range(60)]
    (root / "data.json").write_text(json.dumps([*mine, {**mine[0], "image": "lost.jpg"}]))
    make_pope(data / "eval/pope")
    make_mme(data / "eval/MME")
    shutil.copytree(root / "images", root / "photos")
    for name in ("question", "other"):
        (root / f"{name}_images").symlink_to("images")
    (root / "questions.jsonl").write_text(json.dumps({"question_id": 1, "image": "0001.jpg", "text": "What is it?"}))
    (root / "other.json").write_text(json.dumps(mine[:1]))
    science = data / "eval/scienceqa"
    make_science_qa(science)
    problems = {pid: {**problem, "lecture": "L.", "solution": "S."} for pid, problem in read(science / "problems.json")}
    (data / "ScienceQA/images").mkdir(parents=True)
    (data / "ScienceQA/images/train").symlink_to(science / "images/test")
    (data / "ScienceQA/problems.json").write_text(json.dumps(problems))
    (data / "ScienceQA/pid_splits.json").write_text(json.dumps({"train": list(problems)}))


def read(file: Path) -> Iterator[tuple[str, Any]]:
    yield from json.loads(file.read_text()).items()


@pytest.mark.slow
def test_every_command_of_the_pages_works(project: Path, tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in SHIMS.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if key not in SCALING}
    environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
    done = 0
    with python_in_process(programs):
        for page in PAGES:
            for command in commands_of(page):
                more = " ".join(extra for start, extra in MORE.items() if command.startswith(start))
                ran = subprocess.run(
                    ["sh", "-c", f"{command} {more}"],
                    stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, check=False, timeout=600,
                )  # fmt: skip
                status = next((status for start, status in STATUS.items() if command.startswith(start)), 0)
                assert ran.returncode == status, f"docs/{page}.md: {command}\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}"
                done += 1
    assert done > 20
    what_they_left(project)


def what_they_left(project: Path) -> None:
    """Check the outputs that the docs describe."""
    assert len(json.loads((project / "clean.json").read_text())) == 60
    assert len(json.loads((project / "playground/clean.json").read_text())) == 20
    assert "<!doctype html>" in (project / "view.html").read_text()
    mine = project / "work_dirs/mine"
    assert (mine / "adapter_config.json").is_file() and "training finished: " in (mine / "train.log").read_text()
    assert len((mine / "samples.jsonl").read_text().splitlines()) == 1  # one record in fifty of sixty
    assert json.loads((mine / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert json.loads((mine / "run.json").read_text())["samples"] == 59
    first, second = (
        project / "work_dirs" / f"{stage}_internvit6b_224to336_vicuna7b" for stage in ("pretrain", "finetune")
    )
    assert (first / "mm_projector.bin").is_file() and (second / "model.safetensors").is_file()
    assert "training finished: " in (second / "train.log").read_text()
    result = project / "playground/data/eval/scienceqa/answers/InternVL-Chat-ViT-6B-Vicuna-13B_result.json"
    assert "acc" in json.loads(result.read_text())
    assert runs.tensors(project / "work_dirs/llava_finetune_sqa")
