"""Compare estimated with measured peak training memory: `python -m benchmarks.memory [NAME ...]`.

Each row trains a model with random weights for two steps in a freshly forked process. The measured figure is the peak
resident memory of those steps minus the memory before them.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.measure import resident_mib
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.intern_vit_6b import InternVisionConfig, InternVisionModel
from llava.train import estimate, model_setup
from llava.train.estimate import RunConfig
from llava.train.flops import shape_of
from llava.train.throughput import trainable_parts

PIXELS, TEXT, IMAGE = 112, 448, 64
M_MMAP_THRESHOLD = -3
SMALL = {"hidden": 256, "intermediate": 704, "layers": 6, "vocabulary": 32000}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "full": {"rows": 4, "supervised": 0.2},
    "full, all supervised": {"rows": 2, "supervised": 0.9},
    "full, checkpointing": {"rows": 6, "supervised": 0.2, "checkpointing": True},
    "full, deeper, small vocabulary": {"rows": 3, "supervised": 0.2, "layers": 12, "vocabulary": 8000},
    "projector": {"rows": 6, "supervised": 0.2, "frozen": True},
    "projector, checkpointing": {"rows": 10, "supervised": 0.1, "frozen": True, "checkpointing": True},
    "LoRA": {"rows": 4, "supervised": 0.2, "lora": 16},
    "full, tower learns": {"rows": 4, "supervised": 0.2, "tower": True},
}


def build(folder: Path, given: dict[str, Any]) -> Any:
    """A chat model with random weights on a random tower."""
    size = {name: given.get(name, value) for name, value in SMALL.items()}
    if not (folder / "tower" / "config.json").exists():
        vision = InternVisionConfig(
            hidden_size=192, num_attention_heads=4, intermediate_size=768, num_hidden_layers=6, image_size=PIXELS
        )
        InternVisionModel(vision).save_pretrained(folder / "tower")
    config = LlavaConfig(
        vocab_size=size["vocabulary"],
        hidden_size=size["hidden"],
        intermediate_size=size["intermediate"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["hidden"] // 64,
        mm_vision_tower=str(folder / "tower"),
        mm_hidden_size=192,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-1,
        mm_vision_image_size=PIXELS,
    )
    config._attn_implementation = "sdpa"
    model: Any = LlavaLlamaForCausalLM(config)
    model.get_vision_tower().load_model(from_checkpoint=False)
    flags = SimpleNamespace(
        tune_mm_mlp_adapter=given.get("frozen", False),
        freeze_backbone=False,
        mm_use_im_start_end=False,
        tune_vit_pos_embedding=False,
        unfreeze_mm_vision_tower=given.get("tower", False),
        unfreeze_mm_vision_layers=0,
    )
    lora = {
        "lora_enable": bool(given.get("lora")),
        "lora_r": given.get("lora", 1),
        "lora_alpha": 16,
        "lora_dropout": 0.0,
    }
    args = SimpleNamespace(freeze_llm=False, freeze_mm_mlp_adapter=False, lora_bias="none", **lora)
    if lora["lora_enable"]:
        model_setup.add_lora(model, SimpleNamespace(model_name_or_path="none"), args)  # type: ignore[arg-type]
    model_setup.default_freeze_policy(model, flags, args)  # type: ignore[arg-type]
    if given.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
    return model.train()


def batch(model: Any, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """One micro-batch: an image and TEXT tokens per row, the last of them supervised."""
    rows = given["rows"]
    ids = torch.randint(5, 1000, (rows, TEXT + 1))
    ids[:, 1] = -200
    labels = torch.full_like(ids, -100)
    learned = int(given["supervised"] * (TEXT + IMAGE))
    labels[:, -learned:] = ids[:, -learned:]
    images = torch.randn(rows, 3, PIXELS, PIXELS)
    return {
        "input_ids": ids,
        "labels": labels,
        "images": images,
        "attention_mask": torch.ones_like(ids, dtype=torch.bool),
    }


def peak_since_reset() -> float:
    """Highest resident memory since `reset_peak`, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def two_steps(folder: Path, given: dict[str, Any]) -> Any:
    """Train for two steps and return the model; resets the peak before the first step."""
    model = build(folder, given)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, 1e-4)
    reset_peak()
    for _ in range(2):
        model(**batch(model, given)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def measured(folder: Path, given: dict[str, Any]) -> dict[str, float]:
    """Peak memory of two steps and its estimate, in MiB; call in a fresh process.

    A small model runs first to load the libraries. Large blocks are returned to the system when freed.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    two_steps(folder, {**given, "hidden": 64, "intermediate": 64, "layers": 1, "vocabulary": 1000, "rows": 1})
    gc.collect()
    before = resident_mib()
    model = two_steps(folder, given)
    peak = peak_since_reset() - before
    setup = RunConfig(
        shape_of(model.config, model.get_vision_tower()),
        trainable_parts(model),
        batch_size=given["rows"],
        text_tokens=TEXT,
        supervised=given["supervised"],
        dtype_bytes=4,
        gradient_checkpointing=given.get("checkpointing", False),
        foreach=False,
    )
    parts = {name: value / 2**20 for name, value in estimate.memory_breakdown(setup).items()}
    return {"measured": peak, "estimated": estimate.peak_bytes(setup) / 2**20, **parts}


def in_a_fork(folder: Path, given: dict[str, Any]) -> dict[str, float]:
    """Measure in a fork of this process, which has imported the libraries but allocated nothing."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(writer, json.dumps(measured(folder, given)).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    if os.waitpid(child, 0)[1]:
        raise RuntimeError(f"the process that measures {given} failed")
    figures: dict[str, float] = json.loads(text)
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    import tempfile

    names = list(sys.argv[1:] if argv is None else argv) or list(CONFIGURATIONS)
    far = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            figures = in_a_fork(Path(folder), CONFIGURATIONS[name])
            ratio = figures["estimated"] / figures["measured"]
            far = max(far, abs(ratio - 1))
            both = f"measured {figures.pop('measured'):.0f}, estimated {figures.pop('estimated'):.0f} MiB"
            parts = ", ".join(f"{part} {value:.0f}" for part, value in figures.items())
            print(f"{name}: {both} ({ratio:.2f}); {parts}", flush=True)
    return int(far > 0.15)


if __name__ == "__main__":
    raise SystemExit(main())
