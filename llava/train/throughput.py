"""How fast a run goes, against what the devices could do, and how long it still takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from llava.train.flops import Shape, Trainable, device_peak, shape_of, step_flops


@dataclass(frozen=True)
class Pace:
    """What a log line says of speed; `peak` is the FLOP/s of all devices together, or None where it is not known."""

    shape: Shape | None
    learns: Trainable
    peak: float | None

    def line(
        self, *, seconds: float, tokens: float, samples: float, supervised: float, images: float
    ) -> dict[str, float]:
        """Tokens and samples a second, and the share of the peak (MFU, model FLOPs only) where it can be told."""
        found = {
            "tokens_per_second": round(tokens / seconds, 1),
            "samples_per_second": round(samples / seconds, 3),
        }
        if self.peak and self.shape:
            length = tokens / max(samples, 1)
            work = step_flops(
                self.shape, self.learns, tokens=tokens, length=length, images=images, supervised=supervised
            )
            found["mfu"] = round(work / seconds / self.peak, 4)
        return found


def learns_of(model: Any) -> Trainable:
    """What learns in a model whose `requires_grad` is set."""
    sizes = {"language": 0, "projector": 0, "tower": 0, "adapters": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "adapters" if ".lora_" in name else "tower" if "vision_tower" in name else "language"
            part = "projector" if "mm_projector" in name else part
            sizes[part] += torch.Size(getattr(parameter, "ds_shape", parameter.shape)).numel()
    flags = {part: bool(sizes[part]) for part in ("language", "projector", "tower")}
    return Trainable(**flags, adapters=sizes["adapters"])


def pace_of(model: Any, args: Any) -> Pace:
    """The pace of a run on its devices; without MFU for a language model of another architecture than LLaMA's."""
    config = model.config
    tower = model.get_vision_tower() if hasattr(model, "get_vision_tower") else None
    peak = device_peak(torch.cuda.get_device_name(args.device)) if args.device.type == "cuda" else None
    shape = shape_of(config, tower) if hasattr(config, "intermediate_size") else None
    return Pace(shape, learns_of(model), peak and peak * args.world_size)


def hours_and_minutes(seconds: float) -> str:
    """As 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
