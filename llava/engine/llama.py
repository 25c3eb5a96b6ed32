"""LLaMA's layers run by ourselves for inference: fewer steps in between, shared beginnings read in place.

Against the library's forward: q, k, v and gate, up are one product each (their weights become views of one tensor, so
memory stays the same); rows are packed without padding; the last layer computes only the positions whose logits are
wanted; masks, positions and rotary tables are made once a step, not once a layer. Quantised layers and biases work as
they are. The results are the library's up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaModel
from transformers.models.llama import modeling_llama

from llava.engine.cache import RowCache
from llava.engine.language_model import LanguageModel
from llava.engine.native.decoder import NativeDecoder
from llava.engine.packing import DecodeStep, PackedRows
from llava.engine.prefixes import Chain
from llava.engine.product import Product
from llava.model.language_model.packed import LlamaDecoderLayer
from llava.placement import native_decode_rows

Attention = Callable[[int, Tensor, Tensor, bool], Tensor]
KNOWN_LAYERS = (LlamaDecoderLayer, modeling_llama.LlamaDecoderLayer)


def open_language_model(model: Any) -> LanguageModel:
    """The fastest way to run `model`: `FastLlama` where it applies, the library's forward otherwise."""
    return FastLlama(model) if FastLlama.runs(model) else LanguageModel(model)


class Layer:
    """One decoder layer's weights, ready to use."""

    def __init__(self, layer: LlamaDecoderLayer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.norm = RmsNorm(layer.input_layernorm)
        self.qkv = Product(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = Product(attention.o_proj)
        self.mlp_norm = RmsNorm(layer.post_attention_layernorm)
        self.gate_up = Product(mlp.gate_proj, mlp.up_proj)
        self.activation = mlp.act_fn
        self.down = Product(mlp.down_proj)
        self.in_place = isinstance(self.activation, nn.SiLU) and self.down.weight is not None

    def feed_forward(self, x: Tensor) -> Tensor:
        """(N, D) to (N, D), with the residual."""
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        if self.in_place:  # fresh memory for a long prompt costs as much as the arithmetic
            return self.down(F.silu(gate, inplace=True).mul_(up)).add_(x)
        return x + self.down(self.activation(gate) * up)


class RmsNorm:
    """Root mean square norm, computed in float32 and scaled in the model's dtype, as the library's."""

    def __init__(self, module: Any) -> None:
        self.weight, self.eps = module.weight, module.variance_epsilon

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = wide.square().mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        normed: Tensor = (wide * scale).to(x.dtype) * self.weight
        return normed


class FastLlama(LanguageModel):
    """`LanguageModel` over LLaMA's layers without the library's forward."""

    shares: ClassVar[bool] = True

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config = model.config
        self.heads = int(config.num_attention_heads)
        self.layers = [Layer(layer) for layer in self.core.layers]
        self.norm = RmsNorm(self.core.norm)
        self.head = Product(model.lm_head)
        self.rotary = self.core.layers[0].self_attn.rotary_emb
        self.native = NativeDecoder(self) if NativeDecoder.runs(self) else None

    @staticmethod
    def runs(model: Any) -> bool:
        """LLaMA as the library defines it, on one device, without hooks, and no attention kernel forced to "eager"."""
        core = model.get_decoder()
        if not isinstance(core, LlamaModel) or getattr(model, "hf_device_map", None):
            return False
        eager = getattr(model.config, "_attn_implementation", "eager") == "eager"
        plain = all(type(layer) in KNOWN_LAYERS and not hasattr(layer, "_hf_hook") for layer in core.layers)
        devices = {parameter.device for parameter in core.layers.parameters()}
        return plain and not eager and len(devices) == 1 and getattr(model.config, "pretraining_tp", 1) == 1

    def logits(self, states: Tensor) -> Tensor:
        return self.head(states)

    def prefill(self, rows: Sequence[Tensor], chains: Sequence[Chain]) -> tuple[Tensor, Tensor]:
        """Embeddings (L_i, D), each behind its chain, to the rows' own cache data and their last states (n, D)."""
        batch = PackedRows(self.spec, [len(row) for row in rows], chains)
        states = self._run(torch.cat(list(rows)), batch.positions, batch.attention, batch.last)
        return batch.data, states

    def prefill_segment(self, row: Tensor, chain: Chain) -> Tensor:
        """Keys and values (layers, 2, kv_heads, L, head_dim) of embeddings (L, D) behind `chain`."""
        batch = PackedRows(self.spec, [len(row)], [chain])
        self._run(row, batch.positions, batch.attention, None)
        return batch.data[:, :, 0]

    def decode(self, ids: Sequence[int], cache: RowCache) -> Tensor:
        embeds, positions = self.embed(ids), cache.positions()
        if self.native is not None and len(ids) <= native_decode_rows(embeds.dtype):
            cache.make_room()
            logits = self.native.step(embeds, *self._rotation(positions, embeds), cache)
        else:
            logits = self.logits(self._run(embeds, positions, DecodeStep(cache).attention, slice(None)))
        cache.advance()
        return logits

    def _run(self, x: Tensor, positions: Sequence[int], attention: Attention, wanted: Tensor | slice | None) -> Tensor:
        """Embeddings (N, D) at `positions` to the final states of the `wanted` rows; None: only keys and values."""
        heads, kv_heads, size = self.heads, self.spec.kv_heads, self.spec.head_dim
        cos, sin = self._rotation(positions, x)
        for index, layer in enumerate(self.layers):
            qkv = layer.qkv(layer.norm(x)).view(len(x), heads + 2 * kv_heads, size)
            turned = qkv[:, : heads + kv_heads]  # q and k are rotated in place
            other = turned.roll(size // 2, -1)
            turned.mul_(cos).addcmul_(other, sin)
            query, keys_values = qkv[:, :heads], qkv[:, heads:].view(len(x), 2, kv_heads, size)
            last = index == len(self.layers) - 1
            if last and wanted is None:
                attention(index, query[:0], keys_values, True)
                return x
            if last:
                query, x = query[wanted], x[wanted]
            x = x + layer.out(attention(index, query, keys_values, last))
            x = layer.feed_forward(x)
        return self.norm(x)

    def _rotation(self, positions: Sequence[int], x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines (N, 1, head_dim), from the model's own tables (so with its rope scaling)."""
        cos, sin = self.rotary(x, seq_len=max(positions) + 1)
        at = torch.tensor(positions, device=x.device)
        sin = sin[at].unsqueeze(1)
        half = sin.shape[-1] // 2
        return cos[at].unsqueeze(1), torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
