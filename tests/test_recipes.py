"""Every recipe as the command it would run, bound by the trainer's own parser; published values."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from llava.arguments import make_parser
from llava.train.train import train
from tests import tiny
from tests.test_docs import commands
from tests.train import runs

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "scripts_internvl"
RECIPES = sorted(path.stem for stage in ("pretrain", "finetune") for path in FOLDER.glob(f"{stage}_*.sh"))
PUBLISHED = [name for name in RECIPES if "quickstart" not in name]
LLAVA = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix()
    for stage in ("pretrain", "finetune")
    for path in (ROOT / "scripts").rglob(f"{stage}*.sh")
)
SCALING = (
    *("GPUS", "NNODES", "NODE_RANK", "MASTER_ADDR", "PORT", "BATCH", "OUTPUT_DIR", "CUDA_VISIBLE_DEVICES"),
    *("MODEL_VERSION", "PROMPT_VERSION"),
    *("PARTITION", "GPUS_PER_NODE", "CPUS_PER_TASK", "QUOTA_TYPE", "SRUN_ARGS", "PYTHON", "LLAVA_DRY_RUN"),
)


def start(name: str, *flags: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in SCALING} | variables
    command = ["sh", str((ROOT if "/" in name else FOLDER) / f"{name}.sh"), *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, check=False, timeout=60)


def command_of(name: str, *flags: str, **variables: str) -> list[str]:
    done = start(name, *flags, LLAVA_DRY_RUN="1", **variables)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def bind(command: list[str]) -> Namespace:
    script = next(index for index, word in enumerate(command) if word.startswith("llava/train/"))
    assert (ROOT / command[script]).is_file()
    return make_parser().parse_args(command[script + 1 :])


def test_no_recipe_is_missing() -> None:
    assert len(PUBLISHED) == 13
    assert len(RECIPES) == 15
    assert len(LLAVA) == 11


COMMON: dict[str, Any] = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "bf16": True,
    "tf32": True,
    "num_train_epochs": 1.0,
    "per_device_eval_batch_size": 4,
    "save_total_limit": 3,
    "weight_decay": 0.0,
    "warmup_ratio": 0.03,
    "logging_steps": 1,
    "model_max_length": 2048,
    "gradient_checkpointing": True,
    "lazy_preprocess": True,
    "report_to": ["tensorboard"],
}
STAGE: dict[str, dict[str, Any]] = {
    "pretrain": {
        "version": "plain",
        "tune_mm_mlp_adapter": True,
        "learning_rate": 1e-3,
        "image_aspect_ratio": "square",
        "group_by_modality_length": False,
        "data_path": "./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
        "image_folder": "./playground/data/LLaVA-Pretrain/images",
        "pretrain_mm_mlp_adapter": None,
    },
    "finetune": {
        "version": "v1",
        "tune_mm_mlp_adapter": False,
        "learning_rate": 2e-5,
        "image_aspect_ratio": "pad",
        "group_by_modality_length": True,
        "data_path": "./playground/llava_v1_5_mix665k.json",
        "image_folder": "./playground/data",
    },
}
# per GPU, per step, ZeRO stage, save_steps, workers
SIZES = {
    "pretrain": (32, 256, 2, 1000, 4),
    "finetune": (16, 128, 3, 1000, 4),
    "pretrain v1": (16, 256, 1, 1000, 32),
    "finetune v1": (16, 128, 3, 100, 32),
    "custom": (2, 512, 1, 1000, 2),
}


def expected(name: str) -> dict[str, Any]:
    stage, rest = name.split("_", 1)
    values = COMMON | STAGE[stage]
    size = "7b" if "vicuna7b" in name else "13b"
    tower = "intern_vit_6b_224px" if "224to336" in name else "intern_vit_6b_448px"
    layer, key = -4, stage
    for version in ("2", "5"):
        if f"_v1_{version}_" in name:
            tower, layer, key = f"InternViT-6B-448px-V1-{version}", -1, f"{stage} v1"
    if stage == "finetune":
        values["pretrain_mm_mlp_adapter"] = f"./work_dirs/pretrain_{rest.removesuffix('_custom_data')}/mm_projector.bin"
    if name.endswith("_custom_data"):
        key = "custom"
        values |= {
            "group_by_modality_length": False,
            "data_path": None,
            "image_folder": None,
            "meta_path": "./scripts_internvl/meta/custom_data.json",
        }
    batch, step, zero, save, workers = SIZES[key]
    return values | {
        "model_name_or_path": f"./pretrained/vicuna-{size}-v1.5",
        "vision_tower": f"./pretrained/{tower}",
        "mm_vision_select_layer": layer,
        "per_device_train_batch_size": batch,
        "loss_group_size": batch,
        "global_batch_size": step,
        "deepspeed": f"./scripts/zero{zero}.json",
        "save_steps": save,
        "dataloader_num_workers": workers,
        "output_dir": f"work_dirs/{name}",
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_hyperparameters(name: str) -> None:
    flags = bind(command_of(name))
    wanted = expected(name)
    assert {key: getattr(flags, key) for key in wanted} == wanted
    assert (ROOT / flags.deepspeed).is_file()
    assert str(getattr(flags.lr_scheduler_type, "value", flags.lr_scheduler_type)) == "cosine"


CLIP_L = "openai/clip-vit-large-patch14"
CHAT = "liuhaotian/llava-v1.5-13b"
# version, language model, tower, projector, per GPU, learning rate, epochs, ZeRO stage, save_steps
ORIGINAL: dict[str, tuple[Any, ...]] = {
    "scripts/pretrain": ("plain", "./checkpoints/lm", CLIP_L, "linear", 16, 2e-3, 1, 2, 24000),
    "scripts/finetune": ("v0", "./checkpoints/lm", CLIP_L, "linear", 16, 2e-5, 1, 2, 50000),
    "scripts/finetune_full_schedule": ("v0", "./checkpoints/lm", CLIP_L, "linear", 16, 2e-5, 3, 2, 50000),
    "scripts/finetune_lora": ("v0", "./checkpoints/lm", CLIP_L, "linear", 16, 2e-5, 1, 2, 50000),
    "scripts/finetune_qlora": ("v0", "./checkpoints/lm", CLIP_L, "linear", 16, 2e-5, 1, 2, 50000),
    "scripts/finetune_sqa": ("v0", "lmsys/vicuna-13b-v1.3", CLIP_L, "linear", 16, 2e-5, 12, 2, 50000),
    "scripts/v1_5/pretrain": ("plain", "lmsys/vicuna-13b-v1.5", f"{CLIP_L}-336", "mlp2x_gelu", 32, 1e-3, 1, 2, 24000),
    "scripts/v1_5/finetune": ("v1", "lmsys/vicuna-13b-v1.5", f"{CLIP_L}-336", "mlp2x_gelu", 16, 2e-5, 1, 3, 50000),
    "scripts/v1_5/finetune_lora": ("v1", "lmsys/vicuna-13b-v1.5", f"{CLIP_L}-336", "mlp2x_gelu", 16, 2e-4, 1, 3, 50000),
    "scripts/v1_5/finetune_task": ("v1", CHAT, f"{CLIP_L}-336", "mlp2x_gelu", 16, 2e-5, 1, 3, 50000),
    "scripts/v1_5/finetune_task_lora": ("v1", CHAT, f"{CLIP_L}-336", "mlp2x_gelu", 16, 2e-4, 1, 3, 50000),
}


@pytest.mark.parametrize("name", LLAVA)
def test_published_hyperparameters_of_the_original(name: str) -> None:
    flags = bind(command_of(name, MODEL_VERSION="lm", PROMPT_VERSION="v0"))
    version, base, tower, projector, batch, rate, epochs, zero, save = ORIGINAL[name]
    pretrains, newer = name.endswith("pretrain"), "v1_5" in name
    newer_lora = newer and name.endswith("lora")
    stage_1 = f"./work_dirs/llava_{'v1_5_' if newer else ''}pretrain"
    wanted = COMMON | {
        "version": version,
        "model_name_or_path": base,
        "vision_tower": tower,
        "mm_vision_select_layer": -2,
        "mm_projector_type": projector,
        "per_device_train_batch_size": batch,
        "loss_group_size": batch,
        "global_batch_size": 8 * batch,
        "learning_rate": rate,
        "num_train_epochs": epochs,
        "deepspeed": f"./scripts/zero{zero}.json",
        "save_steps": save,
        "save_total_limit": 1,
        "report_to": ["wandb"],
        "tune_mm_mlp_adapter": pretrains,
        "pretrain_mm_mlp_adapter": None if pretrains else "" if base == CHAT else f"{stage_1}/mm_projector.bin",
        "image_aspect_ratio": "pad" if newer and not pretrains else "square",
        "group_by_modality_length": newer and not pretrains,
        "lora_enable": name.endswith("lora"),
        "lora_r": 128 if newer_lora else 64,
        "lora_alpha": 256 if newer_lora else 16,
        "mm_projector_lr": 2e-5 if newer_lora else None,
        "bits": 4 if name.endswith("qlora") else 16,
        "output_dir": f"work_dirs/llava_{name.removeprefix('scripts/').replace('/', '_')}",
    }
    assert {key: getattr(flags, key) for key in wanted} == wanted
    assert flags.output_dir == stage_1.removeprefix("./") or not pretrains


@pytest.mark.parametrize("given", ["MODEL_VERSION", "PROMPT_VERSION"])
def test_required_variables_of_the_original_recipes(given: str) -> None:
    done = start("scripts/finetune_lora", "--dry-run", **{given: "x"})
    missing = "PROMPT_VERSION" if given == "MODEL_VERSION" else "MODEL_VERSION"
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {missing} is not set") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", [name for name in RECIPES if "quickstart" in name])
def test_the_quickstart_uses_the_same_machinery(name: str) -> None:
    command = command_of(name)
    flags = bind(command)
    assert command[:2] == ["python", "llava/train/train.py"]
    assert flags.use_cpu
    assert flags.deepspeed is None
    assert (flags.mm_projector_type, flags.mm_vision_image_size) == ("mlp2x_gelu", 64)
    two_gpus = command_of(name, GPUS="2")
    assert two_gpus[0] == "torchrun"
    assert bind(two_gpus).deepspeed


@pytest.mark.parametrize(
    ("variables", "batch"),
    [
        ({"GPUS": "1"}, 32),
        ({"GPUS": "3"}, 32),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 32),
        ({"GPUS": "8", "NNODES": "2", "MASTER_ADDR": "10.0.0.1"}, 16),
        ({"GPUS": "24"}, 11),
        ({"GPUS": "2", "BATCH": "8"}, 8),
        ({"GPUS": "0"}, 32),
    ],
)
def test_hardware_changes_the_speed_alone(variables: dict[str, str], batch: int) -> None:
    command = command_of("pretrain_internvit6b_448_vicuna7b", **variables)
    flags = bind(command)
    assert (flags.per_device_train_batch_size, flags.gradient_accumulation_steps) == (batch, 1)
    assert (flags.global_batch_size, flags.loss_group_size) == (256, 32)
    if "MASTER_ADDR" in variables:
        assert {"--nnodes=2", "--node_rank=0", "--master_addr=10.0.0.1", "--nproc_per_node=8"} <= set(command)


def test_more_gpus_than_samples_are_refused() -> None:
    done = start("pretrain_internvit6b_448_vicuna7b", "--dry-run", GPUS="257")
    assert done.returncode == 2
    assert "There are more GPUs (257) than samples per step (256)" in done.stderr


@pytest.mark.parametrize("variable", [{"GPUS": "all"}, {"GPUS": "-2"}, {"BATCH": "1.5"}, {"NNODES": "two"}])
def test_a_number_is_a_number(variable: dict[str, str]) -> None:
    done = start("pretrain_internvit6b_448_vicuna7b", "--dry-run", **variable)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"must be integers of at least 0, got '{next(iter(variable.values()))}'" in done.stderr


def test_several_nodes_need_an_address() -> None:
    done = start("pretrain_internvit6b_448_vicuna7b", "--dry-run", NNODES="2")
    assert done.returncode == 2
    assert "MASTER_ADDR" in done.stderr


def test_flags_of_the_command_line_win_and_keep_their_spaces() -> None:
    given = ("--learning_rate", "1e-5", "--data_path", "my 'own' data.json")
    flags = bind(command_of("finetune_internvit6b_448_vicuna13b", *given))
    assert flags.learning_rate == 1e-5
    assert flags.data_path == "my 'own' data.json"


def test_slurm() -> None:
    name = "finetune_internvit6b_224to336_vicuna13b_custom_data"
    command = command_of(name, PARTITION="gpu", QUOTA_TYPE="", SRUN_ARGS="--mem=0 --exclusive")
    assert command[0] == "srun"
    assert {"--partition=gpu", "--nodes=16", "--ntasks=128", "--cpus-per-task=10"} <= set(command)
    assert {"--mem=0", "--exclusive"} <= set(command)
    assert not [word for word in command if word.startswith("--quotatype")]
    assert "--quotatype=reserved" in command_of(name)
    fewer = bind(command_of(name, GPUS="64"))
    assert (fewer.per_device_train_batch_size, fewer.global_batch_size, fewer.loss_group_size) == (2, 512, 2)
    assert start(name, "--dry-run", GPUS="12").returncode == 2


@pytest.mark.parametrize("status", [0, 7])
def test_output_is_logged_and_the_exit_status_is_the_programs(tmp_path: Path, status: int) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!{sys.executable}\nimport sys\nprint('trained')\nsys.exit({status})\n")
    program.chmod(0o755)
    output = tmp_path / "run"
    output.mkdir()
    (output / "train.log").write_text("earlier\n")
    done = start("pretrain_quickstart", PYTHON=str(program), OUTPUT_DIR=str(output))
    assert done.returncode == status
    assert "trained" in done.stdout
    assert (output / "train.log").read_text() == "earlier\ntrained\n"
    assert ("ended with status 7" in done.stderr) == (status == 7)


@pytest.mark.parametrize("form", [["--output_dir", "{}"], ["--output_dir={}"]])
def test_the_log_is_where_the_run_goes(tmp_path: Path, form: list[str]) -> None:
    last = [part.format(tmp_path / "my run") for part in form]
    elsewhere = tmp_path / "elsewhere"
    start("pretrain_quickstart", "--output_dir", "x", *last, "--tf32", PYTHON="echo", OUTPUT_DIR=str(elsewhere))
    assert "--tf32" in (tmp_path / "my run/train.log").read_text()
    assert not elsewhere.exists()


def test_a_recipe_outlives_a_signal_to_all_of_its_processes_until_training_has_saved(tmp_path: Path) -> None:
    """As a scheduler ends a job; the stand-in for training saves when it is told to end."""
    program = tmp_path / "train"
    program.write_text(
        f"#!{sys.executable}\n"
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(143)))\n"
        "print('step', flush=True)\n"
        "signal.pause()\n"
    )
    program.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if key not in SCALING} | {"PYTHON": str(program)}
    command = ["sh", str(FOLDER / "pretrain_quickstart.sh"), "--output_dir", str(tmp_path / "run")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    assert process.stdout is not None and process.stdout.readline() == "step\n"
    os.killpg(process.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert output == "saved\n" and (tmp_path / "run/train.log").read_text() == "step\nsaved\n"
    assert process.returncode == 143 and "ended with status 143" in errors


def test_a_missing_launcher_is_one_sentence() -> None:
    done = start("pretrain_internvit6b_448_vicuna7b", GPUS="0", PYTHON="no-such-python")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no-such-python was not found on PATH" in done.stderr


def recipes_in_the_pages() -> list[str]:
    """Every command in the docs that starts a training recipe."""
    named = r"\bsh (scripts\S*/)+(pretrain|finetune)_?\w*\.sh"
    return sorted({command for _, command in commands() if re.search(named, command)})


@pytest.mark.parametrize("command", recipes_in_the_pages())
def test_recipes_of_the_pages_bind(command: str) -> None:
    """Includes the variables and flags of the page."""
    environment = {key: value for key, value in os.environ.items() if key not in SCALING}
    environment |= {"MODEL_VERSION": "vicuna-7b-v1.3", "PROMPT_VERSION": "v1", "LLAVA_DRY_RUN": "1"}
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, env=environment, cwd=ROOT, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    bind(shlex.split(done.stdout))


def test_the_pages_name_recipes() -> None:
    assert len(recipes_in_the_pages()) > 8


@pytest.fixture(scope="module")
def tiny_runs(tiny_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Data, a mixture, towers of both kinds, and the projectors of a stage 1 for each."""
    root = tmp_path_factory.mktemp("recipes")
    data = runs.make_data(root / "data", samples=2)
    entry = {"annotation": str(data / "finetune.json"), "root": str(data / "images")}
    (root / "mixture.json").write_text(json.dumps({"mine": entry}))
    clip = tiny.make_clip_tower(root / "clip-vit-tiny")
    base = tiny.make_base(root / "base", hidden_size=64, intermediate_size=128)  # whole blocks of the 4-bit kernel
    made = {"data": data, "mixture": root / "mixture.json", "clip": clip, "base": base, "projectors": {}}
    return {"tower": tiny_dirs["tower"], **made}


def overridden(name: str, made: dict[str, Any], out: Path) -> list[str]:
    """The recipe's command on the CPU, with flags appended."""
    variables = {"MODEL_VERSION": "tiny", "PROMPT_VERSION": "v1"}
    slurm = name.endswith("_custom_data")
    command = command_of(name, **variables, **({} if slurm else {"GPUS": "0"}))
    flags = bind(command)
    stage, tower = ("pretrain" if flags.tune_mm_mlp_adapter else "finetune"), made["tower"]
    if "clip" in flags.vision_tower:
        tower = made["clip"]
    given = {
        "model_name_or_path": made["base"],
        "vision_tower": tower,
        "mm_vision_image_size": 56,
        "output_dir": out,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "global_batch_size": 2,
        "loss_group_size": 2,
        "dataloader_num_workers": 0,
        "report_to": "none",
        "plot_loss": False,
        "save_strategy": "no",
        "bf16": False,
    }
    if slurm:
        given |= {"meta_path": made["mixture"], "use_cpu": True, "tf32": False, "deepspeed": ""}
    else:
        given |= {"data_path": made["data"] / f"{stage}.json", "image_folder": made["data"] / "images"}
    if stage == "finetune":
        given["pretrain_mm_mlp_adapter"] = made["projectors"][str(tower), flags.mm_projector_type]
    script = next(index for index, word in enumerate(command) if word.startswith("llava/train/"))
    more = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    return [*command[script + 1 :], *more]


@pytest.mark.slow
def test_every_recipe_trains_and_saves_by_overrides_alone(tiny_runs: dict[str, Any], tmp_path: Path) -> None:
    """Stage 1 first: stage 2 starts from the projectors it leaves."""
    names = sorted([*PUBLISHED, *LLAVA], key=lambda name: "pretrain" not in name)
    assert len(names) == 24
    for name in names:
        out = tmp_path / name.replace("/", "_")
        argv = overridden(name, tiny_runs, out)
        train(argv)
        assert len(runs.losses(out)) == 1, name
        assert json.loads((out / "run.json").read_text())["steps"] == 1
        flags = make_parser().parse_args(argv)
        if flags.tune_mm_mlp_adapter:
            key = str(flags.vision_tower), flags.mm_projector_type
            tiny_runs["projectors"].setdefault(key, out / "mm_projector.bin")
        wanted = (
            "adapter_config.json"
            if flags.lora_enable
            else "mm_projector.bin"
            if flags.tune_mm_mlp_adapter
            else "model.safetensors"
        )
        assert (out / wanted).is_file(), name
