"""The decoder and head of a causal language model, as the engine uses them, through the library's own forward.

This serves every model. LLaMA has a faster path in `llava.engine.llama`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llava.engine.cache import CacheSpec, KVCache
from llava.engine.packing import DecodeStep
from llava.engine.prefix_cache import Chain, tokens_of
from llava.engine.sampling import Sampler
from llava.model.transfer import upload_columns


class LanguageModel:
    """`prefill` and `decode` over a `KVCache`; every row holds its whole past itself."""

    shares: ClassVar[bool] = False  # whether rows behind a common beginning read it in place

    def __init__(self, model: Any) -> None:
        self.model = model
        self.core = model.get_decoder()
        config = model.config
        split = getattr(model, "hf_device_map", None)
        self.context_length = int(config.max_position_embeddings)
        self.spec = CacheSpec(
            layers=config.num_hidden_layers,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            dtype=model.dtype,
            device=model.device,
            layer_devices=layer_devices(self.core, config.num_hidden_layers) if split else (),
            context_length=self.context_length,
        )

    def embed(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Text tokens (T,) to embeddings (T, D)."""
        at = ids if isinstance(ids, Tensor) else upload_columns([ids], self.spec.device)[0]
        embeddings: Tensor = self.core.get_input_embeddings()(at)
        return embeddings

    def logits(self, states: Tensor) -> Tensor:
        """Final states (B, D) to logits (B, V)."""
        logits: Tensor = self.model.lm_head(states)
        return logits

    def prefill(self, rows: Sequence[Tensor], chains: Sequence[Chain]) -> tuple[Tensor, Tensor]:
        """Embeddings (L_i, D) behind equally long chains, to cache data of whole rows and last states (n, D).

        The data are (layers, 2, n, kv_heads, T, head_dim), every row from column 0.
        """
        behind = tokens_of(chains[0])
        last = upload_columns([[len(row) - 1 for row in rows]], self.spec.device)[0]
        embeds = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)  # (n, L, D)
        cache = KVCache.for_prefill(self.spec, len(rows), behind, behind + embeds.shape[1])
        for row, chain in enumerate(chains):
            at = 0
            for span in chain:
                cache.data[:, :, row, :, at : at + span.tokens] = span.data
                at += span.tokens
        positions = torch.arange(behind, behind + embeds.shape[1], device=embeds.device).unsqueeze(0)
        states = self._forward(embeds, cache, positions)
        return cache.data, states[torch.arange(len(rows), device=states.device), last.to(states.device)]

    def prefill_segment(self, row: Tensor, chain: Chain) -> Tensor:
        """Keys and values (layers, 2, kv_heads, L, head_dim) of embeddings (L, D) behind `chain`."""
        data, _ = self.prefill([row], [chain])
        return data[:, :, 0, :, tokens_of(chain) :].clone()

    def decode(self, ids: Sequence[int], cache: KVCache, sampler: Sampler | None = None) -> Tensor:
        """Run one token per row: append its keys and values to the cache and return logits (B, V).

        The parameters of `sampler` share the host-to-device copy of the token ids.
        """
        step = DecodeStep(ids, cache, sampler)
        states = self._forward(self.embed(step.ids).unsqueeze(1), cache, step.positions.unsqueeze(1), step.visible())
        cache.advance()
        return self.logits(states[:, -1])

    def _forward(self, embeds: Tensor, cache: KVCache, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        """Embeddings (B, T, D) at `positions` (B or 1, T), behind what `cache` holds, to final states (B, T, D)."""
        output = self.core(
            inputs_embeds=embeds,
            attention_mask=None if mask is None else mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
        states: Tensor = output.last_hidden_state
        return states


def layer_devices(core: Any, count: int) -> tuple[torch.device, ...]:
    """Where each of the decoder's `count` layers is."""
    layers = next(part for part in core.children() if isinstance(part, nn.ModuleList) and len(part) == count)
    return tuple(next(layer.parameters()).device for layer in layers)
