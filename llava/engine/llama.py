"""Model runner for LLaMA without transformers' forward.

Compared with that, q, k, v and gate, up are one matrix product each, rows are packed without padding, shared prefixes
are read in place, the last layer computes only the positions whose logits are needed, and masks, positions and rotary
tables are computed once per step, not once per layer. Results differ only by the order of summation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Final

import torch
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn
from transformers import LlamaModel
from transformers.models.llama import modeling_llama

from llava.engine.cache import KVCache
from llava.engine.layers import DecoderLayer, FusedLinear, RMSNorm
from llava.engine.lora import LoraStep, LoraWeights
from llava.engine.model_runner import ModelRunner
from llava.engine.native.decoder import NativeDecoder
from llava.engine.native.lora import NativeLora
from llava.engine.packing import DecodeStep, Rotation, VarlenBatch
from llava.engine.prefix_cache import Prefix
from llava.engine.sampling import Sampler
from llava.model.language_model.packed import LlamaDecoderLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Modules of `DecoderLayer.projections`.
PROJECTIONS: Final = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
SUPPORTED_LAYERS = (LlamaDecoderLayer, modeling_llama.LlamaDecoderLayer)


def build_model_runner(model: PreTrainedModel) -> ModelRunner:
    """`LlamaRunner` if it supports `model`, else a `ModelRunner` over transformers' forward."""
    return LlamaRunner(model) if LlamaRunner.supports(model) else ModelRunner(model)


class LlamaRunner(ModelRunner):
    """`ModelRunner` over the weights of a LLaMA, quantised or not."""

    shares_prefixes: ClassVar[bool] = True

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.heads = int(model.config.num_attention_heads)
        self.layers = [DecoderLayer(layer) for layer in self.core.layers]
        self.norm = RMSNorm(self.core.norm)
        self.head = FusedLinear(model.lm_head)
        self.head_device = next(model.lm_head.parameters()).device
        self.rotary = self.core.layers[0].self_attn.rotary_emb
        self.native = NativeDecoder.build(self.spec, self.heads, self.layers, self.norm, self.head)
        self.reads_prefix_per_row = self.native is not None

    @staticmethod
    def supports(model: PreTrainedModel) -> bool:
        """Whether `model` has LLaMA layers, each on one device, and attention other than "eager"."""
        core = model.get_decoder()
        if not isinstance(core, LlamaModel):
            return False
        eager = getattr(model.config, "_attn_implementation", "eager") == "eager"
        known = all(type(layer) in SUPPORTED_LAYERS and _is_hook_free(layer) for layer in core.layers)
        whole = all(len({parameter.device for parameter in layer.parameters()}) == 1 for layer in core.layers)
        return known and whole and not eager and getattr(model.config, "pretraining_tp", 1) == 1

    def logits(self, states: Tensor) -> Tensor:
        return self.head(states.to(self.head_device, non_blocking=True))

    def set_lora(self, weights: LoraWeights) -> None:
        super().set_lora(weights)
        stack = self.spec.device.type == "cuda"
        for index, layer in enumerate(self.layers):
            for linear, names in zip(layer.projections, PROJECTIONS, strict=True):
                modules = {
                    f"model.layers.{index}.{name}": self.core.layers[index].get_submodule(name) for name in names
                }
                linear.lora = weights.fuse(list(modules), [one.out_features for one in modules.values()], stack=stack)
        if self.native is not None:
            linears = [linear.lora for layer in self.layers for linear in layer.projections if linear.lora]
            self.native.lora = NativeLora(linears)

    def prefill(
        self, rows: Sequence[Tensor], prefixes: Sequence[Prefix], adapters: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """As `ModelRunner.prefill`; keys and values exclude the prefixes, which may differ in length."""
        seqlens = [len(row) for row in rows]
        batch = VarlenBatch(self.spec, seqlens, prefixes)
        rotation, lora = self._rotation(batch.positions, batch.end), self.lora_step(adapters, seqlens)
        return batch.data, self._run(torch.cat(list(rows)), rotation, batch, batch.last, lora)

    def prefill_kv(self, row: Tensor, prefix: Prefix, adapter: int = 0) -> Tensor:
        batch = VarlenBatch(self.spec, [len(row)], [prefix])
        lora = self.lora_step([adapter], [len(row)])
        self._run(row, self._rotation(batch.positions, batch.end), batch, None, lora)
        return batch.data[:, :, 0]

    def decode(
        self, ids: Sequence[int], cache: KVCache, sampler: Sampler | None = None, adapters: Sequence[int] = ()
    ) -> Tensor:
        step, lora = DecodeStep(ids, cache, sampler), self.lora_step(adapters)
        embeds, rotation = self.embed(step.ids), self._rotation(step.positions, step.end)
        if self.native is not None and len(ids) <= self.native.max_rows:
            logits = self.native.step(embeds, *rotation, cache, lora)
        else:
            logits = self.logits(self._run(embeds, rotation, step, slice(None), lora))
        cache.advance()
        return logits

    def _run(
        self,
        x: Tensor,
        rotation: Rotation,
        batch: VarlenBatch | DecodeStep,
        wanted: Tensor | slice | None,
        lora: LoraStep | None,
    ) -> Tensor:
        """Embeddings (N, D) to the final states of the `wanted` rows; None computes keys and values only."""
        heads, kv_heads, size = self.heads, self.spec.kv_heads, self.spec.head_dim
        cos, sin = (part.to(x.device, non_blocking=True) for part in rotation)
        for index, layer in enumerate(self.layers):
            if layer.device != x.device:
                x, cos, sin = (part.to(layer.device, non_blocking=True) for part in (x, cos, sin))
            qkv = layer.qkv(layer.norm(x), lora).view(len(x), heads + 2 * kv_heads, size)
            query = batch.store(index, qkv, (cos, sin))
            last = index == len(self.layers) - 1
            if last and wanted is None:
                return x
            if last:
                wanted = wanted.to(x.device, non_blocking=True) if isinstance(wanted, Tensor) else wanted
                query, x = query[wanted], x[wanted]
                lora = None if lora is None else lora.last
            x = layer.out(batch.attend(index, query, last), lora, residual=x)
            x = layer.feed_forward(x, lora)
        return self.norm(x.to(self.norm.weight.device, non_blocking=True))

    def _rotation(self, positions: Tensor, end: int) -> Rotation:
        """Cosines and signed sines (N, 1, head_dim) of `positions` (N,), all below `end`, from the model's own tables,
        rope scaling included."""
        like = self.layers[0].norm.weight  # of the tables' device and dtype
        cos, sin = self.rotary(like, seq_len=end)
        index = positions.to(cos.device, non_blocking=True)
        sin = sin[index].unsqueeze(1)
        half = sin.shape[-1] // 2
        return cos[index].unsqueeze(1), torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)


def _is_hook_free(module: nn.Module) -> bool:
    """Whether the module has no accelerate hook but one that moves its inputs between devices."""
    hook: object = getattr(module, "_hf_hook", None)
    return hook is None or (isinstance(hook, AlignDevicesHook) and not hook.offload)
