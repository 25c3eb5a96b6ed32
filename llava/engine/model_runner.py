"""Model runner over transformers' forward, for any causal language model. `llava.engine.llama` has a faster one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from llava.engine.cache import CacheSpec, KVCache
from llava.engine.lora import LoraStep, LoraWeights
from llava.engine.packing import DecodeStep
from llava.engine.prefix_cache import Prefix, num_tokens
from llava.engine.sampling import Sampler
from llava.model.config import context_length
from llava.model.transfer import upload_columns

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModelRunner:
    """Prefill and decode steps of the decoder and head of a causal language model, over a `KVCache`."""

    shares_prefixes: ClassVar[bool] = False  # whether rows read a common prefix in place instead of a copy
    reads_prefix_per_row: bool = False  # whether a prefix costs a decode step no more than other tokens of its rows

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.core: PreTrainedModel = model.get_decoder()
        self.lora: LoraWeights | None = None
        config = model.config
        split = getattr(model, "hf_device_map", None)
        self.context_length = context_length(config)
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
        """Text token ids (T,) to embeddings (T, D)."""
        index = ids if isinstance(ids, Tensor) else upload_columns([ids], self.spec.device)[0]
        embeddings: Tensor = self.core.get_input_embeddings()(index)
        return embeddings

    def logits(self, states: Tensor) -> Tensor:
        """Final states (B, D) to logits (B, V)."""
        logits: Tensor = self.model.lm_head(states)
        return logits

    def set_lora(self, weights: LoraWeights) -> None:
        """Set the adapters that rows may name by their number, from 1 on; without any, rows use the base."""
        self.lora = weights

    def lora_step(self, adapters: Sequence[int], seqlens: Sequence[int] | None = None) -> LoraStep | None:
        return None if self.lora is None else self.lora.step(adapters, seqlens)

    def adapted(self, adapters: Sequence[int]) -> AbstractContextManager[None]:
        """Run transformers' forward with the adapters of its rows, or with one for all rows."""
        step = self.lora_step(adapters)
        return nullcontext() if step is None or self.lora is None else self.lora.hooked(step)

    def prefill(
        self, rows: Sequence[Tensor], prefixes: Sequence[Prefix], adapters: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (L_i, D) behind cached prefixes to the rows' keys and values and last states (n, D).

        Keys and values are (layers, 2, n, kv_heads, T, head_dim), left-aligned. Here they include the prefixes, which
        must be equally long. `adapters` are the rows' LoRA adapters, 0 for the base.
        """
        filled = num_tokens(prefixes[0])
        last = upload_columns([[len(row) - 1 for row in rows]], self.spec.device)[0]
        embeds = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)  # (n, L, D)
        cache = KVCache.for_prefill(self.spec, len(rows), filled, filled + embeds.shape[1])
        for row, prefix in enumerate(prefixes):
            at = 0
            for match in prefix:
                cache.data[:, :, row, :, at : at + match.num_tokens] = match.data
                at += match.num_tokens
        positions = torch.arange(filled, filled + embeds.shape[1], device=embeds.device).unsqueeze(0)
        with self.adapted(adapters):
            states = self._forward(embeds, cache, positions)
        return cache.data, states[torch.arange(len(rows), device=states.device), last.to(states.device)]

    def prefill_kv(self, row: Tensor, prefix: Prefix, adapter: int = 0) -> Tensor:
        """Keys and values (layers, 2, kv_heads, L, head_dim) of embeddings (L, D) behind `prefix`."""
        data, _ = self.prefill([row], [prefix], [adapter])
        return data[:, :, 0, :, num_tokens(prefix) :].clone()

    def decode(
        self, ids: Sequence[int], cache: KVCache, sampler: Sampler | None = None, adapters: Sequence[int] = ()
    ) -> Tensor:
        """Run one token per row: append its keys and values to the cache and return logits (B, V).

        The parameters of `sampler` share the host-to-device copy of the token ids.
        """
        step = DecodeStep(ids, cache, sampler)
        embeds, positions = self.embed(step.ids).unsqueeze(1), step.positions.unsqueeze(1)
        with self.adapted(adapters):
            states = self._forward(embeds, cache, positions, step.visible())
        cache.advance()
        return self.logits(states[:, -1])

    def _forward(self, embeds: Tensor, cache: KVCache, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        """Embeddings (B, T, D) at `positions` (B or 1, T) to final states (B, T, D); extends `cache`."""
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


def layer_devices(decoder: nn.Module, count: int) -> tuple[torch.device, ...]:
    """Devices of the decoder's `count` layers."""
    layers = next(part for part in decoder.children() if isinstance(part, nn.ModuleList) and len(part) == count)
    return tuple(next(layer.parameters()).device for layer in layers)
