"""Throughput of a training run: tokens and samples per second, and model FLOPs utilization."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from llava.arguments import TrainingArguments
from llava.train.flops import Shape, Trainable, device_peak, shape_of, step_flops
from llava.train.zero import full_shape


@dataclass(frozen=True)
class ThroughputMeter:
    """Throughput of a model on its devices; `peak` is the FLOP/s of all devices together, None where unknown."""

    shape: Shape | None
    trainable: Trainable
    peak: float | None

    @classmethod
    def of(cls, model: PreTrainedModel, args: TrainingArguments) -> ThroughputMeter:
        """The meter of a run; no MFU on unknown devices and for language models other than LLaMA."""
        tower = model.get_vision_tower() if hasattr(model, "get_vision_tower") else None
        peak = device_peak(torch.cuda.get_device_name(args.device)) if args.device.type == "cuda" else None
        shape = shape_of(model.config, tower) if hasattr(model.config, "intermediate_size") else None
        return cls(shape, trainable_parts(model), peak and peak * args.world_size)

    def metrics(
        self, *, seconds: float, tokens: float, samples: float, supervised: float, images: float
    ) -> dict[str, float]:
        """Tokens and samples per second and, if `peak` is known, MFU (model FLOPs only, arXiv:2204.02311)."""
        found = {
            "tokens_per_second": round(tokens / seconds, 1),
            "samples_per_second": round(samples / seconds, 3),
        }
        if self.peak and self.shape:
            flops = step_flops(
                self.shape,
                self.trainable,
                tokens=tokens,
                length=tokens / max(samples, 1),
                images=images,
                supervised=supervised,
            )
            found["mfu"] = round(flops / seconds / self.peak, 4)
        return found


def trainable_parts(model: PreTrainedModel) -> Trainable:
    """The parts of a model that have parameters with `requires_grad`."""
    sizes = {"language": 0, "projector": 0, "tower": 0, "adapters": 0, "tower_adapters": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "tower" if "vision_tower" in name else "projector" if "mm_projector" in name else "language"
            if ".lora_" in name:
                part = "tower_adapters" if part == "tower" else "adapters"
            sizes[part] += torch.Size(full_shape(parameter)).numel()
    flags = {part: bool(sizes[part]) for part in ("language", "projector", "tower")}
    return Trainable(**flags, adapters=sizes["adapters"], tower_adapters=sizes["tower_adapters"])


def format_duration(seconds: float) -> str:
    """Seconds as `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def peak_memory(device: torch.device) -> int:
    """Peak bytes of allocated memory of a CUDA device, or of resident memory of this process, since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
