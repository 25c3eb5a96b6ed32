"""Beam search of one request with transformers' `generate`, outside the batch."""

from __future__ import annotations

import torch

from llava.engine.model_runner import ModelRunner
from llava.engine.prefill import Prefiller
from llava.engine.sequence import Sequence


def run(runner: ModelRunner, prefiller: Prefiller, sequence: Sequence) -> None:
    """Answer `sequence` with beam search over its embeddings and finish it."""
    params = sequence.params
    sampling = {"do_sample": True, "temperature": params.temperature, "top_p": params.top_p}
    embeds = prefiller.embed(sequence.prompt)  # (L, D)
    # The default would initialise every GPU.
    devices = {device for device in (runner.spec.device, *runner.spec.layer_devices) if device.type == "cuda"}
    with torch.random.fork_rng(devices, enabled=params.temperature > 0):
        if params.seed is not None:
            torch.manual_seed(params.seed)
        output = runner.model.generate(
            inputs_embeds=embeds.unsqueeze(0),
            attention_mask=torch.ones(1, len(embeds), dtype=torch.long, device=embeds.device),
            num_beams=params.num_beams,
            max_new_tokens=sequence.max_new_tokens,
            bos_token_id=0,  # without input ids, `generate` starts its output with this token
            eos_token_id=sorted(sequence.end_ids),
            pad_token_id=runner.model.generation_config.pad_token_id or 0,
            **(sampling if params.temperature > 0 else {"do_sample": False}),
        )
    for token in output[0, 1:].tolist():
        reason = sequence.append(token)
        if reason is not None or sequence.detokenize():
            sequence.finish(reason or "stop")
            return
    sequence.finish("stop")
