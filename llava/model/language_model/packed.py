"""LLaMA decoder that also runs over packed sequences, without padding, for training.

The sequences of a batch are concatenated to `(N, D)`. Norms, projections and the MLP run over all N tokens at once;
only attention distinguishes sequences. Padded batches (generation, evaluation) take the forward of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama

from llava.model.language_model.fused import Context, LlamaMLP, RMSNorm, Rotate, normalized_linear, normalized_mlp
from llava.model.transfer import upload
from llava.utils import require

MIN_FILL = 0.8  # sequences share an attention call if the shortest has at least this fraction of the longest's tokens


@dataclass(frozen=True)
class PaddedGroup:
    """`count` sequences of similar length, padded to `length` tokens for attention."""

    count: int
    length: int


def attention_groups(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of sequences that share an attention call, in which they are padded to the first, the longest."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    groups: list[list[int]] = []
    for index in order:
        if groups and lengths[index] >= MIN_FILL * lengths[groups[-1][0]]:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


class PackedBatch:
    """Sequences of `lengths` tokens, concatenated to N tokens, and their padded groups for attention.

    `cu_seqlens` `(sequences + 1,)` int32 are the boundaries. `pad_index` `(M,)` maps the M >= N tokens of all groups to
    packed tokens (padding repeats the last token of its sequence), `unpad_index` `(N,)` maps packed tokens to theirs.
    Padding follows its sequence and attention is causal, so no real token attends to it.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = list(lengths)
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        self.groups: list[PaddedGroup] = []
        padded: list[Tensor] = []
        unpad_index = torch.empty(starts[-1], dtype=torch.long)
        offset = 0
        for members in attention_groups(self.lengths):
            longest = self.lengths[members[0]]
            for index in members:
                length = self.lengths[index]
                padded.append(torch.arange(longest).clamp(max=max(0, length - 1)) + starts[index])
                unpad_index[starts[index] : starts[index] + length] = torch.arange(offset, offset + length)
                offset += longest
            self.groups.append(PaddedGroup(len(members), longest))
        positions = torch.cat([torch.arange(length) for length in self.lengths])  # (N,)
        self.cu_seqlens, self.pad_index, self.unpad_index, self.positions = upload(
            [torch.tensor(starts, dtype=torch.int32), torch.cat(padded), unpad_index, positions], device
        )
        self.padded = starts[-1] != offset or len(self.groups) > 1
        self._masks: dict[tuple[int, torch.dtype], Tensor] = {}
        self._rotary: tuple[Tensor, Tensor] | None = None

    def mask(self, length: int, dtype: torch.dtype) -> Tensor:
        """Causal mask `(length, length)`: 0, and the smallest value of `dtype` at later positions; cached."""
        key = (length, dtype)
        if key not in self._masks:
            blocked = torch.full((length, length), torch.finfo(dtype).min, dtype=dtype, device=self.cu_seqlens.device)
            self._masks[key] = blocked.triu(1)
        return self._masks[key]

    def rotary(self, embedding: Callable[..., tuple[Tensor, Tensor]], like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each token, `(N, 1, head_dim / 2)` in the dtype of `like`; the same for all layers."""
        if self._rotary is None or self._rotary[0].dtype != like.dtype:
            cos, sin = embedding(like, seq_len=max(self.lengths))
            half = cos.shape[-1] // 2
            self._rotary = cos[self.positions, None, :half], sin[self.positions, None, :half]
        return self._rotary


class LlamaDecoderLayer(modeling_llama.LlamaDecoderLayer):
    """Decoder layer over a padded or a packed batch; named as in transformers, for device maps and FSDP."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)
        self.hidden_size = config.hidden_size
        attention = modeling_llama.LLAMA_ATTENTION_CLASSES[config._attn_implementation]
        self.self_attn = attention(config=config, layer_idx=layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | PackedBatch | None = None,
        *args: Any,
        keep: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]:
        """As in transformers; over a packed batch `(N, D)`, with `keep` `(S,)` the outputs `(S, D)` of these tokens."""
        if not isinstance(attention_mask, PackedBatch):
            return cast("tuple[Tensor, ...]", super().forward(hidden_states, attention_mask, *args, **kwargs))
        kept = hidden_states if keep is None else hidden_states.index_select(0, keep)
        hidden = kept + self.attention(hidden_states, attention_mask, keep)
        return (hidden + normalized_mlp(self.post_attention_layernorm, self.mlp, hidden),)

    def attention(self, x: Tensor, batch: PackedBatch, keep: Tensor | None = None) -> Tensor:
        """Norm and causal self-attention within sequences: `(N, D)` to `(N, D)`, or to `(S, D)` with `keep` `(S,)`."""
        block = self.self_attn
        projected = normalized_linear(self.input_layernorm, (block.q_proj, block.k_proj, block.v_proj), x)
        q, k, v = (rearrange(part, "n (h d) -> n h d", d=block.head_dim) for part in projected)
        cos, sin = batch.rotary(block.rotary_emb, v)
        q, k = Rotate.apply(q, cos, sin), Rotate.apply(k, cos, sin)
        out = attend(q, k, v, batch, type(block), block.attention_dropout if self.training else 0.0)
        out = out if keep is None else out.index_select(0, keep)
        return cast("Tensor", block.o_proj(rearrange(out, "n h d -> n (h d)")))


class LlamaModel(modeling_llama.LlamaModel):
    """LLaMA core of the layers above."""

    def __init__(self, config: LlamaConfig) -> None:
        super(modeling_llama.LlamaModel, self).__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self._use_sdpa = config._attn_implementation == "sdpa"
        self._use_flash_attention_2 = config._attn_implementation == "flash_attention_2"
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, *args: Any, batch: PackedBatch | None = None, keep: Tensor | None = None, **kwargs: Any) -> Any:
        """As in transformers; with `batch`, run over `inputs_embeds` `(N, D)` and return hidden states `(N, D)`.

        With `keep` `(S,)`, return those of these tokens, `(S, D)`: the last layer computes the others' keys and values
        only.
        """
        if batch is None:
            return super().forward(*args, **kwargs)
        hidden = kwargs["inputs_embeds"]
        for index, layer in enumerate(self.layers, 1):
            run = partial(layer, keep=keep if index == len(self.layers) else None)
            if self.gradient_checkpointing and self.training:
                hidden = self._gradient_checkpointing_func(run, hidden, batch)[0]
            else:
                hidden = run(hidden, batch)[0]
        return self.norm(hidden)


class _Pad(torch.autograd.Function):
    """Packed tokens `(N, ...)` to those of the padded groups `(M, ...)`; the gradients of padding are zero."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, pad_index: Tensor, unpad_index: Tensor) -> Tensor:
        ctx.save_for_backward(unpad_index)
        return x.index_select(0, pad_index)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


class _Unpad(torch.autograd.Function):
    """The inverse of `_Pad`; writes each gradient once, where that of `index_select` would be summed row by row."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, unpad_index: Tensor) -> Tensor:
        ctx.shape = x.shape
        ctx.save_for_backward(unpad_index)
        return x.index_select(0, unpad_index)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].new_zeros(ctx.shape).index_copy_(0, ctx.saved_tensors[0], grads[0]), None


def attend(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, kind: type[nn.Module], dropout: float = 0.0) -> Tensor:
    """Causal attention within the sequences of a packed batch.

    `q` `(N, heads, head_dim)`, `k` and `v` `(N, key_value_heads, head_dim)`; returns the shape of `q`. `kind` is the
    attention class of transformers, which selects FlashAttention, `scaled_dot_product_attention` or eager attention.
    """
    if issubclass(kind, modeling_llama.LlamaFlashAttention2):
        longest, cu_seqlens = max(batch.lengths), batch.cu_seqlens
        flash: Tensor = require("flash_attn", "flash").flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, dropout_p=dropout, causal=True
        )
        return flash
    core = _sdpa if issubclass(kind, modeling_llama.LlamaSdpaAttention) else _eager
    if batch.padded:
        q, k, v = (_Pad.apply(part, batch.pad_index, batch.unpad_index) for part in (q, k, v))
    outputs, start = [], 0
    for group in batch.groups:
        end = start + group.count * group.length
        query, key, value = (rearrange(part[start:end], "(b t) h d -> b h t d", t=group.length) for part in (q, k, v))
        outputs.append(rearrange(core(query, key, value, batch, dropout), "b h t d -> (b t) h d"))
        start = end
    out = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return cast("Tensor", _Unpad.apply(out, batch.unpad_index)) if batch.padded else out


def _sdpa(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, dropout: float) -> Tensor:
    """`q` `(B, heads, T, head_dim)`, `k` and `v` `(B, key_value_heads, T, head_dim)`; returns the shape of `q`."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (repeat(part, "b h t d -> b (h g) t d", g=groups) for part in (k, v))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


def _eager(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, dropout: float) -> Tensor:
    """As `_sdpa`, with the attention weights in memory; faster for short sequences on a CPU."""
    count, heads, length, width = q.shape
    groups = heads // k.shape[1]
    q = rearrange(q, "b (h g) t d -> (b h) (g t) d", g=groups)
    k, v = (rearrange(part, "b h t d -> (b h) t d") for part in (k, v))
    mask = batch.mask(length, q.dtype).repeat(groups, 1)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=width**-0.5)
    weights = torch.softmax(scores, dim=-1)
    if dropout:
        weights = F.dropout(weights, dropout)
    return rearrange(torch.bmm(weights.to(v.dtype), v), "(b h) (g t) d -> b (h g) t d", b=count, g=groups)
