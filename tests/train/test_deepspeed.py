"""Two ranks under ZeRO-2 and ZeRO-3, in real processes: equal to one process, saved whole, and exact after SIGKILL.

A rank gets one sample a step, so that often one rank has text only while the other has an image.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.model.builder import load_pretrained_model
from llava.train.train import train
from tests.train import runs

Run = Callable[[int, str], Path]
SCRIPTS = runs.ROOT / "scripts"
STEPS = 16
LOSS_ATOL = 1e-4  # the last logged digit
WEIGHT_ATOL = 1e-5


def options(zero: str) -> dict[str, Any]:
    saving = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 1}
    return {"deepspeed": SCRIPTS / f"{zero}.json", "use_cpu": None, "per_device_train_batch_size": 1, **saving}


@pytest.fixture(scope="module")
def two_ranks(tiny_dirs: dict[str, Path], small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The output directory of an uninterrupted run, made once for each stage and ZeRO file."""
    root = tmp_path_factory.mktemp("zero")

    def run(stage: int, zero: str) -> Path:
        out = root / f"{zero}-stage{stage}"
        if not out.exists():
            argv = runs.flags(tiny_dirs, small_data, out, stage, **options(zero))
            runs.finish(argv, root / f"{out.name}.log", ranks=2)
        return out

    return run


@pytest.fixture(scope="module")
def one_process(
    tiny_dirs: dict[str, Path], small_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """The same global batch by accumulation; not clipped, as the ZeRO files do not clip."""
    root = tmp_path_factory.mktemp("single")

    def run(stage: int) -> Path:
        out = root / f"stage{stage}"
        if not out.exists():
            batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_grad_norm": 0}
            train(runs.flags(tiny_dirs, small_data, out, stage, **batch))
        return out

    return run


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
@pytest.mark.parametrize("stage", [1, 2])
def test_two_ranks_equal_one_process(
    two_ranks: Run, one_process: Callable[[int], Path], tiny_dirs: dict[str, Path], stage: int, zero: str
) -> None:
    out, single = two_ranks(stage, zero), one_process(stage)
    assert len(runs.losses(out)) == STEPS
    assert runs.losses(out) == pytest.approx(runs.losses(single), abs=LOSS_ATOL)
    for key in ("supervised_tokens", "learning_rate"):
        assert [e[key] for e in runs.history(out)] == pytest.approx([e[key] for e in runs.history(single)])
    runs.assert_equal_weights(out, single, atol=WEIGHT_ATOL)
    record = json.loads((out / "run.json").read_text())
    assert record["world_size"] == 2 and record["global_batch"] == 2
    _, model, _, _ = load_pretrained_model(out, tiny_dirs["base"] if stage == 1 else None, device="cpu")
    saved = runs.tensors(out)["model.mm_projector.0.weight"]
    assert torch.equal(model.get_model().mm_projector[0].weight, saved)


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_killed_run_resumes_exactly(
    two_ranks: Run, tiny_dirs: dict[str, Path], small_data: Path, tmp_path: Path, stage: int, zero: str
) -> None:
    killed = tmp_path / "killed"
    argv = runs.flags(tiny_dirs, small_data, killed, stage, **options(zero))
    runs.kill_at(argv, killed, 6, tmp_path / "log", ranks=2)
    runs.finish(argv, tmp_path / "log", ranks=2)
    assert "Resuming from" in (tmp_path / "log").read_text()
    runs.assert_equal_runs(two_ranks(stage, zero), killed)
    (newest,) = killed.glob("*checkpoint-*")
    saved = {path.name for path in newest.iterdir()}
    assert newest.name == f"checkpoint-{STEPS}"
    assert {"config.json", "trainer_state.json", "latest", f"global_step{STEPS}", "rng_state_1.pth"} <= saved
    assert ("mm_projector.bin" in saved, "model.safetensors" in saved) == (stage == 1, stage == 2)
    if stage == 1:
        frozen = sum(t.numel() for t in runs.tensors(tiny_dirs["base"]).values())
        engine = sum(file.stat().st_size for file in (newest / f"global_step{STEPS}").iterdir())
        assert engine < 4 * frozen, "the engine's checkpoint holds the frozen language model"


@pytest.mark.slow
def test_bfloat16_checkpointing_tokens_and_positions_under_zero3(
    tiny_dirs: dict[str, Path], small_data: Path, tmp_path: Path
) -> None:
    """Start and end tokens, positions of the tower, reentrant checkpointing: all that gathers partitions."""
    more = {
        "mm_use_im_start_end": True,
        "tune_vit_pos_embedding": True,
        "gradient_checkpointing": True,
        "version": "v1",
    }
    argv = runs.flags(tiny_dirs, small_data, tmp_path / "run", 1, **{**options("zero3"), **more, "max_steps": 4})
    runs.finish([*argv, "--bf16", "True"], tmp_path / "log", ranks=2)
    saved, base = runs.tensors(tmp_path / "run"), runs.tensors(tiny_dirs["base"])
    position = "model.vision_tower.vision_tower.embeddings.position_embedding"
    projector = {f"model.mm_projector.{i}.{w}" for i in (0, 2) for w in ("weight", "bias")}
    assert set(saved) == {"model.embed_tokens.weight", position, *projector}
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    rows = saved["model.embed_tokens.weight"]
    assert torch.equal(rows[:-2], base["model.embed_tokens.weight"].bfloat16())
    assert not torch.equal(rows[-1], rows[-2])


@pytest.mark.slow
def test_plain_data_parallel_ranks_by_path(tiny_dirs: dict[str, Path], small_data: Path, tmp_path: Path) -> None:
    """DDP through the slurm entry point started by file path, with loader workers."""
    more = {"per_device_train_batch_size": 2, "dataloader_num_workers": 1, "group_by_modality_length": True}
    argv = runs.flags(tiny_dirs, small_data, tmp_path / "run", 2, **more)
    script = runs.ROOT / "llava" / "train" / "train_mem_custom.py"
    runs.finish(argv, tmp_path / "log", ranks=2, program=[str(script)])
    assert len(runs.losses(tmp_path / "run")) == 8
    assert json.loads((tmp_path / "run" / "run.json").read_text())["world_size"] == 2
