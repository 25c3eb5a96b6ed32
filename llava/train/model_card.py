"""Model card of a run: `README.md` of its output directory, from `run.json` and the files beside it.

    python -m llava.train.model_card OUTPUT_DIR [--name ORGANIZATION/NAME]     again, for example after llava eval

A README without the marker line is the user's and stays as it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, Template

from llava.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.data.mixture import read_mixture
from llava.errors import CheckpointError, LlavaError
from llava.files import write_text
from llava.train.run_metadata import CARD_FILE, LICENSE_KEYS, PATH_FLAGS, read_run
from llava.train.throughput import format_duration
from llava.utils import guarded

logger = logging.getLogger(__name__)
MARKER: Final = "<!-- Written by llava train. Delete this line to keep your own changes. -->"
DATASETS: Final = {  # annotation file -> data set on the hub
    "blip_laion_cc_sbu_558k": "liuhaotian/LLaVA-Pretrain",
    "llava_instruct_80k": "liuhaotian/LLaVA-Instruct-150K",
    "llava_instruct_150k": "liuhaotian/LLaVA-Instruct-150K",
    "llava_v1_5_mix665k": "liuhaotian/LLaVA-Instruct-150K",
}
# Flags that say nothing about the model, or whose value follows from others.
UNINTERESTING: Final = re.compile(
    r"_n_gpu|.*(_tqdm|_backend)|hub_.*|push_.*|fsdp.*|ddp_.*|dataloader_.*|logging_.*|save_.*|profile_.*|eval_.*"
    r"|do_.*|report_to|plot_loss|is_multimodal|lazy_preprocess|lr_scheduler_kwargs|gradient_checkpointing_kwargs|greater_.*"
    r"|metric_for.*|memory_snapshot|step_timeout|evaluation_strategy|cache_dir|use_cpu|no_cuda|prediction_loss_only"
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as its output directory describes it; `name` is that of the model."""

    directory: Path
    name: str
    facts: Mapping[str, Any]

    @classmethod
    def read(cls, directory: Path, name: str | None = None) -> Run:
        facts = read_run(directory)
        if "arguments" not in facts:
            raise CheckpointError(f"{directory} has no run.json of llava train; pass the output directory of a run.")
        return cls(directory, name or directory.resolve().name, facts)

    def flag(self, name: str) -> Any:
        return next((flags[name] for flags in self.facts["arguments"].values() if name in flags), None)

    def source(self, flag: str) -> Mapping[str, str]:
        found: Mapping[str, str] = self.facts.get("sources", {}).get(flag, {})
        return found

    def source_name(self, flag: str) -> str:
        """Name of the base model or the tower: on the hub, else of its directory."""
        return self.source(flag).get("hub") or Path(self.flag(flag)).resolve().name

    @property
    def kind(self) -> str:
        if self.flag("lora_enable"):
            return "adapter"
        return "projector" if self.flag("tune_mm_mlp_adapter") else "model"

    @property
    def history(self) -> list[dict[str, float]]:
        """Log entries of the trainer."""
        try:
            state = json.loads((self.directory / "trainer_state.json").read_text(encoding="utf-8"))
            return list(state["log_history"])
        except (OSError, ValueError, KeyError, TypeError):
            return []

    @property
    def scores(self) -> list[dict[str, Any]]:
        """What `llava eval` wrote to `score.json` files of the directory, with a score."""
        found = []
        for file in sorted({*self.directory.glob("*/score.json"), *self.directory.glob("*/*/score.json")}):
            try:
                score = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if isinstance(score, dict) and score.get("task") and isinstance(score.get("primary_metric"), int | float):
                found.append(score)
        return found


def card_text(directory: Path, name: str | None = None) -> str:
    """The text of the card; of a README of the user, that."""
    file = directory / CARD_FILE
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    if text.strip() and MARKER not in text:
        return text
    run = Run.read(directory, name)
    text = _template().render(
        run=run, metadata=metadata(run).to_yaml(), marker=MARKER, recipe=recipe(run), flags=flags(run),
        losses=losses(run), scores=list(map(score_row, run.scores)), has_curve=(directory / "loss.png").is_file(),
    )  # fmt: skip
    ModelCard(text)  # raises for metadata that cannot be read back
    return text


def _template() -> Template:
    """The text of the card, `model_card.jinja`."""
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    found.filters |= {"code": _code, "quote": shlex.quote}
    return found.get_template("model_card.jinja")


def write_card(directory: Path, name: str | None = None) -> None:
    """Write the model card of the run in `directory`, unless there is a README of the user."""
    text = card_text(directory, name)
    if MARKER in text:
        write_text(directory / CARD_FILE, text)
    else:
        logger.info("%s is not a model card of llava train and stays as it is.", directory / CARD_FILE)


def try_to_write_card(directory: Path, name: str | None = None) -> None:
    """As `write_card`, for a run that is complete: a failure is a warning."""
    try:
        write_card(directory, name)
    except Exception as error:
        logger.warning("The model card of %s cannot be written: %s", directory, error)


def metadata(run: Run) -> ModelCardData:
    """The YAML header by which the hub files the model."""
    base = run.source("model_name_or_path")
    known: dict[str, Any] = {key: base[key] for key in LICENSE_KEYS if key in base}
    known = known or {"license": "other", "license_name": "see-base-model"}
    stems = {Path(run.flag(flag)).stem for flag in ("data_path", "meta_path") if run.flag(flag)}
    results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=score["task"],
            dataset_name=score["task"],
            dataset_split=score.get("split"),
            metric_type="score",
            metric_name=f"score, {interval_text(score)}" if interval_text(score) else None,
            metric_value=round(score["primary_metric"], 2),
        )
        for score in run.scores
    ]
    adapter = run.kind == "adapter"
    if base.get("hub"):
        known["base_model_relation"] = "adapter" if adapter else "finetune"
    return ModelCardData(
        base_model=base.get("hub"),
        datasets=sorted({DATASETS[stem] for stem in stems if stem in DATASETS}) or None,
        eval_results=results or None,
        library_name="peft" if adapter else "llava",
        model_name=run.name if results else None,
        pipeline_tag="image-text-to-text" if run.flag("vision_tower") else "text-generation",
        tags=["llava", "internvl-chat", *(("peft", "lora") if adapter else ())],
        **known,
    )


def recipe(run: Run) -> list[tuple[str, str]]:
    """Rows about model, data, optimization and machine."""
    facts, flag = run.facts, run.flag
    rows = [("base model", _code(run.source_name("model_name_or_path")))]
    if flag("vision_tower"):
        size = f", {flag('mm_vision_image_size')} pixels" if flag("mm_vision_image_size") else ""
        layer = f", layer {flag('mm_vision_select_layer')}{size}"
        rows += [("vision tower", _code(run.source_name("vision_tower")) + layer)]
        rows += [("projector", _code(flag("mm_projector_type")))]
    parameters = facts.get("parameters", {})
    if parameters:
        rows += [("trained parameters", f"{parameters['trainable']:,} of {parameters['all']:,}")]
    rows += [("data", data(run)), ("template", _code(facts.get("template")))]
    batch = f"global batch {facts.get('global_batch')}, loss groups of {facts.get('loss_group')}"
    rows += [("steps", f"{facts['steps']:,}, {batch}" if facts.get("steps") is not None else batch)]
    projector = f"; projector {flag('mm_projector_lr'):g}" if flag("mm_projector_lr") is not None else ""
    schedule = f"{flag('lr_scheduler_type')}, warm-up {flag('warmup_ratio'):g}"
    rows += [("learning rate", f"{flag('learning_rate'):g}{projector}; {schedule}")]
    zero = (facts.get("deepspeed") or {}).get("zero_optimization", {}).get("stage")
    precision = "bfloat16" if flag("bf16") else "float16" if flag("fp16") else "float32"
    rows += [("precision", precision + ("" if zero is None else f", ZeRO stage {zero}"))]
    rows += [("seed", str(facts.get("seed"))), ("hardware", str(facts.get("hardware", facts.get("device"))))]
    if "seconds" in facts:
        rows += [("time", format_duration(facts["seconds"]))]
    versions = ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())
    return [*rows, ("software", versions + (f"; commit {facts['commit'][:12]}" if facts.get("commit") else ""))]


def data(run: Run) -> str:
    """The training data and the number of records; of a mixture, its parts."""
    parts = ""
    if run.flag("meta_path"):
        try:
            entries = read_mixture(run.flag("meta_path"))
            parts = ": " + ", ".join(f"{entry.name} x {entry.repeat_time}" for entry in entries)
        except LlavaError:
            parts = ""
    name = Path(run.flag("data_path") or run.flag("meta_path") or "").name
    return f"{_code(name)}{parts}; {run.facts.get('samples', 0):,} records"


def flags(run: Run) -> str:
    """Flags with other values than their defaults; of absolute paths the last part."""
    changed = []
    for group, kind in (("model", ModelArguments), ("data", DataArguments), ("training", TrainingArguments)):
        for field in dataclasses.fields(kind):
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            value = run.facts["arguments"].get(group, {}).get(field.name)
            if value in (None, default, str(default)) or not (value or default):
                continue
            if field.name not in PATH_FLAGS and not UNINTERESTING.fullmatch(field.name):
                text = value if isinstance(value, str) else json.dumps(value) if isinstance(value, dict) else str(value)
                changed.append(f"--{field.name} {shlex.quote(Path(text).name if text.startswith('/') else text)}")
    return "\n".join(changed)


def losses(run: Run) -> list[tuple[str, str]]:
    """Rows about the losses that were logged."""
    training = [entry["loss"] for entry in run.history if "loss" in entry]
    validation = [entry["eval_loss"] for entry in run.history if "eval_loss" in entry]
    rows = []
    if run.facts.get("train_loss") is not None:
        rows += [("training loss, mean", f"{run.facts['train_loss']:.4f}")]
    if training:
        rows += [("training loss, last", f"{training[-1]:.4f}")]
    if validation:
        rows += [("validation loss, last", f"{validation[-1]:.4f}")]
        rows += [("validation loss, best", f"{min(validation):.4f}")]
    return rows


def score_row(score: Mapping[str, Any]) -> tuple[str, ...]:
    """The row about a score of `llava eval`."""
    value, questions = f"{score['primary_metric']:.2f}", f"{score.get('questions', 0):,}"
    return _code(score["task"]), str(score.get("split") or ""), questions, value, interval_text(score)


def interval_text(score: Mapping[str, Any]) -> str:
    """The confidence interval of a score of `llava eval`, empty if it has none."""
    found = score.get("primary_interval")
    return f"95 % CI {found['low']:.1f}–{found['high']:.1f}" if found else ""


def _code(text: object) -> str:
    return f"`{str(text).replace('`', '')}`"


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m llava.train.model_card", description="Write the model card of a run."
    )
    parser.add_argument("directory", type=Path, help="output directory of llava train")
    parser.add_argument("--name", help="name of the model (default: that of the directory)")
    args = parser.parse_args(argv)
    write_card(args.directory, args.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
