"""Training steps on request, of our model or of transformers' LLaVA in its environment, which needs no llava.

Both run the same optimizer, autocast and clock. Protocol: settings as JSON in the first argument; one JSON line on
stdout when ready, then one for each line on stdin.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import open_replies, peak_mib, resident_mib, settings

LEARNING_RATE = 1e-5


def learning_state(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Fused AdamW over the trainable parameters, with its state allocated and gradients of zero."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    for parameter in learning:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # no change: all gradients are zero
    return optimizer


def serve_steps(model: Any, batch: dict[str, Any], bf16: bool, version: str) -> None:
    """One training step for each line on stdin, until it ends; replies with seconds, loss and peak memory."""
    replies = open_replies()
    model.train()
    optimizer = learning_state(model)
    state = resident_mib()
    optimizer.zero_grad()
    Path("/proc/self/clear_refs").write_text("5")  # restarts the high-water mark: loading does not count
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(json.dumps({"version": version, "learning": learning, "threads": torch.get_num_threads()}), file=replies)
    replies.flush()
    for _ in sys.stdin:
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds, peak = time.perf_counter() - start, peak_mib()
        reply = {"seconds": seconds, "loss": loss.item(), "peak_mib": peak, "beyond_mib": peak - state}
        print(json.dumps(reply), file=replies, flush=True)


def main(engine: str, model: str, batch: str, bf16: bool) -> None:
    if engine == "llava":
        from llava.model.builder import load_pretrained_model

        ours: Any = load_pretrained_model(model, device="cpu", dtype=torch.float32)[1]
        return serve_steps(ours, torch.load(batch), bf16, "ours")
    import transformers

    peer = transformers.LlavaForConditionalGeneration.from_pretrained(
        model, dtype=torch.float32, attn_implementation="sdpa"
    )
    peer.model.vision_tower.requires_grad_(False)
    return serve_steps(peer, torch.load(batch), bf16, f"transformers {transformers.__version__}")


if __name__ == "__main__":
    main(**settings())
