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
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn
from transformers import LlamaModel
from transformers.models.llama import modeling_llama

from llava.engine.cache import KVCache
from llava.engine.linear import Product
from llava.engine.model_runner import LanguageModel
from llava.engine.native.decoder import NativeDecoder
from llava.engine.packing import DecodeStep, VarlenBatch
from llava.engine.prefix_cache import Chain
from llava.engine.sampling import Sampler
from llava.model.language_model.packed import LlamaDecoderLayer
from llava.placement import native_decode_rows, runs_fused_rms_norm

Attention = Callable[[int, Tensor, Tensor, bool], Tensor]
Rotation = tuple[Tensor, Tensor]
KNOWN_LAYERS = (LlamaDecoderLayer, modeling_llama.LlamaDecoderLayer)


def build_model_runner(model: Any) -> LanguageModel:
    """The fastest way to run `model`: `LlamaRunner` where it applies, the library's forward otherwise."""
    return LlamaRunner(model) if LlamaRunner.runs(model) else LanguageModel(model)


class Layer:
    """One decoder layer's weights, ready to use, all on `device`."""

    def __init__(self, layer: LlamaDecoderLayer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.device = layer.input_layernorm.weight.device
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
    """Root mean square norm, computed in float32 and scaled in the model's dtype, as in transformers.

    On CUDA it is torch's fused kernel, which scales before rounding: one launch instead of six, and a smaller error.
    """

    def __init__(self, module: Any) -> None:
        self.weight, self.eps = module.weight, module.variance_epsilon

    def __call__(self, x: Tensor) -> Tensor:
        if runs_fused_rms_norm(x, self.weight):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.float()
        scale = wide.square().mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        normed: Tensor = (wide * scale).to(x.dtype) * self.weight
        return normed


class LlamaRunner(LanguageModel):
    """`LanguageModel` over LLaMA's layers without the library's forward."""

    shares: ClassVar[bool] = True

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config = model.config
        self.heads = int(config.num_attention_heads)
        self.layers = [Layer(layer) for layer in self.core.layers]
        self.norm = RmsNorm(self.core.norm)
        self.head = Product(model.lm_head)
        self.head_device = next(model.lm_head.parameters()).device
        self.rotary = self.core.layers[0].self_attn.rotary_emb
        self.native = NativeDecoder(self) if NativeDecoder.runs(self) else None

    @staticmethod
    def runs(model: Any) -> bool:
        """Whether this class can run `model`: LLaMA layers, each on one device, and attention that is not "eager"."""
        core = model.get_decoder()
        if not isinstance(core, LlamaModel):
            return False
        eager = getattr(model.config, "_attn_implementation", "eager") == "eager"
        plain = all(type(layer) in KNOWN_LAYERS and _only_moves(layer) for layer in core.layers)
        whole = all(len({parameter.device for parameter in layer.parameters()}) == 1 for layer in core.layers)
        return plain and whole and not eager and getattr(model.config, "pretraining_tp", 1) == 1

    def logits(self, states: Tensor) -> Tensor:
        return self.head(states.to(self.head_device, non_blocking=True))

    def prefill(self, rows: Sequence[Tensor], chains: Sequence[Chain]) -> tuple[Tensor, Tensor]:
        """Embeddings (L_i, D), each behind its chain, to the rows' own cache data and their last states (n, D)."""
        batch = VarlenBatch(self.spec, [len(row) for row in rows], chains)
        rotation = self._rotation(batch.positions, batch.end)
        return batch.data, self._run(torch.cat(list(rows)), rotation, batch.attention, batch.last)

    def prefill_segment(self, row: Tensor, chain: Chain) -> Tensor:
        """Keys and values (layers, 2, kv_heads, L, head_dim) of embeddings (L, D) behind `chain`."""
        batch = VarlenBatch(self.spec, [len(row)], [chain])
        self._run(row, self._rotation(batch.positions, batch.end), batch.attention, None)
        return batch.data[:, :, 0]

    def decode(self, ids: Sequence[int], cache: KVCache, sampler: Sampler | None = None) -> Tensor:
        step = DecodeStep(ids, cache, sampler)
        embeds, rotation = self.embed(step.ids), self._rotation(step.positions, step.end)
        if self.native is not None and len(ids) <= native_decode_rows(embeds.dtype):
            logits = self.native.step(embeds, *rotation, cache)
        else:
            logits = self.logits(self._run(embeds, rotation, step.attention, slice(None)))
        cache.advance()
        return logits

    def _run(self, x: Tensor, rotation: Rotation, attention: Attention, wanted: Tensor | slice | None) -> Tensor:
        """Embeddings (N, D) to the final states of the `wanted` rows; None: only keys and values are computed.

        `rotation` rotates queries and keys. Activations follow the layers from device to device.
        """
        heads, kv_heads, size = self.heads, self.spec.kv_heads, self.spec.head_dim
        cos, sin = (part.to(x.device, non_blocking=True) for part in rotation)
        for index, layer in enumerate(self.layers):
            if layer.device != x.device:
                x, cos, sin = (part.to(layer.device, non_blocking=True) for part in (x, cos, sin))
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
                wanted = wanted.to(x.device, non_blocking=True) if isinstance(wanted, Tensor) else wanted
                query, x = query[wanted], x[wanted]
            x = x + layer.out(attention(index, query, keys_values, last))
            x = layer.feed_forward(x)
        return self.norm(x.to(self.norm.weight.device, non_blocking=True))

    def _rotation(self, positions: Tensor, end: int) -> Rotation:
        """Cosines and signed sines (N, 1, head_dim) of `positions` (N,), all below `end`, from the model's own tables,
        rope scaling included."""
        like = self.layers[0].norm.weight  # of the tables' device and dtype
        cos, sin = self.rotary(like, seq_len=end)
        at = positions.to(cos.device, non_blocking=True)
        sin = sin[at].unsqueeze(1)
        half = sin.shape[-1] // 2
        return cos[at].unsqueeze(1), torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)


def _only_moves(module: Any) -> bool:
    """Whether the module has no accelerate hook, or one that only moves its inputs between devices."""
    hook = getattr(module, "_hf_hook", None)
    return hook is None or (type(hook) is AlignDevicesHook and not hook.offload)
