"""Beam search for one request through the library's `generate`; it runs alone, outside the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from llava.engine.engine import Job
    from llava.engine.model_runner import LanguageModel
    from llava.engine.prefill import Prefiller


def run(lm: LanguageModel, prefiller: Prefiller, job: Job) -> None:
    """Answer `job` with its `num_beams` and finish it. The pictures are spliced first, so any number of them works."""
    params = job.params
    sampling = {"do_sample": True, "temperature": params.temperature, "top_p": params.top_p}
    embeds = prefiller.embed(job.prompt)  # (L, D)
    # The default would initialise every GPU.
    devices = {device for device in (lm.spec.device, *lm.spec.layer_devices) if device.type == "cuda"}
    with torch.random.fork_rng(devices, enabled=params.temperature > 0):
        if params.seed is not None:
            torch.manual_seed(params.seed)
        output = lm.model.generate(
            inputs_embeds=embeds.unsqueeze(0),
            attention_mask=torch.ones(1, len(embeds), dtype=torch.long, device=embeds.device),
            num_beams=params.num_beams,
            max_new_tokens=job.max_new_tokens,
            bos_token_id=0,  # without ids to continue, the library starts its output with this one
            eos_token_id=sorted(job.end_ids),
            pad_token_id=lm.model.generation_config.pad_token_id or 0,
            **(sampling if params.temperature > 0 else {"do_sample": False}),
        )
    for token in output[0, 1:].tolist():
        reason = job.accept(token)
        if reason is not None or job.detokenize():
            job.finish(reason or "stop")
            return
    job.finish("stop")
