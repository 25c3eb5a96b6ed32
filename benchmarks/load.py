"""Time and peak memory of loading a checkpoint and reading every weight: 16 bit, `from_pretrained`, or 4 bit."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import peak_mib, resident_mib, settings
from llava.model.builder import load_pretrained_model
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.intern_vit_6b import InternVisionModel
from llava.model.tokenizer import load_tokenizer
from llava.utils import require


def plain(chat: Path) -> Any:
    """`from_pretrained` of the language model, then of the whole tower in float32, then a cast."""
    load_tokenizer(chat)
    config = LlavaConfig.from_pretrained(chat)
    model = LlavaLlamaForCausalLM.from_pretrained(
        chat, config=config, torch_dtype=torch.float16, low_cpu_mem_usage=True
    )
    tower = InternVisionModel.from_pretrained(config.mm_vision_tower)
    return model, tower.to(torch.float16)


def touch(parts: Any) -> None:
    """Read every page of the weights: memory-mapped files count as resident only after use."""
    for part in parts:
        for parameter in part.parameters() if isinstance(part, torch.nn.Module) else ():
            parameter.detach().view(-1)[::1024].sum()


def run(chat: str, reference: bool = False, four_bits: bool = False) -> dict[str, float]:
    if four_bits:
        require("bitsandbytes", "quant")  # its code takes 200 MiB
    before = resident_mib()
    start = time.perf_counter()
    how = {"device": "cpu", "dtype": "float16", "load_4bit": four_bits}
    loaded = plain(Path(chat)) if reference else load_pretrained_model(chat, **how)
    touch(loaded)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mib": peak_mib(), "load_mib": peak_mib() - before}


if __name__ == "__main__":
    print(json.dumps(run(**settings())))
