"""The flow of scripts_internvl/quickstart.sh with stand-ins for its programs: order, skipping, resuming, failing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from llava.data.mixture import read_mixture

ROOT = Path(__file__).resolve().parents[1]
STEPS = ["convert_smollm2", "prepare_easy_vqa", "pretrain_nano_vit", "stage1", "stage2", "eval"]
# Logs the step it is asked for, fails if that is $FAIL, else makes the step's product.
STAND_IN = r"""#!/bin/sh
case "$(basename "$0") $*" in
*convert_smollm2*) step=convert_smollm2; product=pretrained/smollm2-135m-instruct/config.json ;;
*prepare_easy_vqa*) step=prepare_easy_vqa; product=playground/data/easy_vqa/pretrain.json ;;
*pretrain_nano_vit*) step=pretrain_nano_vit; product=pretrained/nano-internvit/config.json ;;
*fast_dtype*) echo "${DTYPE:-bfloat16}"; exit 0 ;;
*pretrain_mm_mlp_adapter*) step=stage2; product=work_dirs/finetune_quickstart/config.json ;;
*"tune_mm_mlp_adapter True"*) step=stage1; product=work_dirs/pretrain_quickstart/mm_projector.bin ;;
llava*eval*) step=eval; product=work_dirs/finetune_quickstart/eval/easy_vqa/score.json ;;
*) exit 0 ;;
esac
echo "$step $*" >>calls
if [ "$step" = "${FAIL:-}" ]; then echo "no memory" >&2; exit 3; fi
mkdir -p "$(dirname "$product")"
touch "$product"
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the scripts alone, and an environment whose programs are stand-ins."""
    for folder in ("scripts", "scripts_internvl"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    programs = tmp_path / ".venv/bin"
    programs.mkdir(parents=True)
    for name in ("python", "llava"):
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    return tmp_path


def quickstart(project: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    dropped = ("GPUS", "OUTPUT_DIR", "LLAVA_VENV", "LLAVA_PYTHON")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return subprocess.run(
        ["sh", str(project / "scripts_internvl/quickstart.sh")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=kept | {"LLAVA_NO_INSTALL": "1"} | variables,
    )


def calls(project: Path) -> list[str]:
    file = project / "calls"
    found = [line.split()[0] for line in file.read_text().splitlines()] if file.exists() else []
    file.unlink(missing_ok=True)
    return found


def test_steps_in_order_then_nothing_to_do(project: Path) -> None:
    first = quickstart(project)
    assert first.returncode == 0, first.stderr
    assert calls(project) == STEPS
    assert "llava chat --model-path work_dirs/finetune_quickstart" in first.stdout
    again = quickstart(project)
    assert again.returncode == 0
    assert calls(project) == []
    assert again.stdout.count("already done") == len(STEPS)


@pytest.mark.parametrize("step", STEPS)
def test_a_failure_stops_and_the_next_run_goes_on_there(project: Path, step: str) -> None:
    failed = quickstart(project, FAIL=step)
    assert failed.returncode != 0
    assert calls(project) == STEPS[: STEPS.index(step) + 1]
    assert "run the same command again" in failed.stderr
    assert "Next steps" not in failed.stdout
    assert quickstart(project).returncode == 0
    assert calls(project) == STEPS[STEPS.index(step) :]


def test_a_product_that_was_removed_is_made_again(project: Path) -> None:
    quickstart(project)
    calls(project)
    shutil.rmtree(project / "pretrained/nano-internvit")
    assert quickstart(project).returncode == 0
    assert calls(project) == ["pretrain_nano_vit"]


@pytest.mark.parametrize(("dtype", "flag"), [("bfloat16", "True"), ("float32", "False")])
def test_the_precision_follows_the_processor(project: Path, dtype: str, flag: str) -> None:
    assert quickstart(project, DTYPE=dtype).returncode == 0
    lines = (project / "calls").read_text().splitlines()
    for line in lines[3:5]:
        assert line.split("--bf16 ")[-1].split()[0] == flag
    assert f"--dtype {dtype}" in lines[5]


def test_the_example_mixture_is_valid() -> None:
    assert len(read_mixture(ROOT / "scripts_internvl/meta/custom_data.json")) == 3
