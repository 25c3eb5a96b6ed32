"""LLaMA over the real tokens of a batch, without padding, for training.

The rows of a batch are laid end to end, `(N, D)`; norms, projections and the MLP run over all of them at once, and only
attention sees rows. Same function as the library's layers over a padded batch, which stay in charge of everything else
(generation, evaluation): a layer takes this way when it is handed `Rows` in place of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from llava.model.transfer import upload
from llava.utils import require

TOLERATED = 0.8  # rows share an attention call when the shortest has at least this share of the longest's tokens


@dataclass(frozen=True)
class Group:
    """Rows of similar length, padded to one for attention alone: `count` rows of `length` tokens."""

    count: int
    length: int


class Rows:
    """How N tokens divide into rows: `lengths` in order, and for attention the groups of rows of similar length.

    `to_groups` (M,) picks the M >= N tokens of all groups, one after the other, repeating a row's last token as its
    padding; `from_groups` (N,) finds the real ones among them again. Padding stands behind a row and attention is
    causal, so no real token sees it.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = list(lengths)
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        order = sorted(range(len(self.lengths)), key=lambda row: -self.lengths[row])
        self.groups: list[Group] = []
        taken: list[Tensor] = []
        places = torch.empty(starts[-1], dtype=torch.long)
        offset = 0
        while order:
            longest = self.lengths[order[0]]
            members = [row for row in order if self.lengths[row] >= TOLERATED * longest]
            order = order[len(members) :]
            for row in members:
                length = self.lengths[row]
                taken.append(torch.arange(longest).clamp(max=max(0, length - 1)) + starts[row])
                places[starts[row] : starts[row] + length] = torch.arange(offset, offset + length)
                offset += longest
            self.groups.append(Group(len(members), longest))
        positions = torch.cat([torch.arange(length) for length in self.lengths])  # (N,)
        borders = torch.tensor(starts, dtype=torch.int32)  # (rows + 1,)
        self.starts, self.to_groups, self.from_groups, self.positions = upload(
            [borders, torch.cat(taken), places, positions], device
        )
        self.padded = starts[-1] != offset or len(self.groups) > 1
        self._masks: dict[tuple[int, torch.dtype], Tensor] = {}
        self._rotary: tuple[Tensor, Tensor] | None = None

    def mask(self, length: int, dtype: torch.dtype) -> Tensor:
        """0 where a query may look and the dtype's lowest number elsewhere, `(length, length)`; made once."""
        key = (length, dtype)
        if key not in self._masks:
            blocked = torch.full((length, length), torch.finfo(dtype).min, dtype=dtype, device=self.starts.device)
            self._masks[key] = blocked.triu(1)
        return self._masks[key]

    def rotary(self, embedding: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each token, `(N, 1, head_dim / 2)` in the dtype of `like`; equal in all layers."""
        if self._rotary is None or self._rotary[0].dtype != like.dtype:
            cos, sin = embedding(like, seq_len=max(self.lengths))
            half = cos.shape[-1] // 2
            self._rotary = cos[self.positions, None, :half], sin[self.positions, None, :half]
        return self._rotary


class _Rotate(torch.autograd.Function):
    """Rotary position embedding of `x` (N, heads, head_dim) (Su et al., arXiv:2104.09864), halves convention."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate(grads[0], cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out = torch.empty_like(x)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out


class _Normalize(torch.autograd.Function):
    """`weight * cast(x / rms(x))`, then cast to `dtype`; float32 inside. Keeps the input and one number a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        x32 = x.float()
        scale = torch.rsqrt(torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps))
        ctx.save_for_backward(x, weight, scale)
        normalized = (x32 * scale).to(x.dtype)
        return (
            (weight * normalized).to(dtype) if normalized.dtype != weight.dtype else normalized.mul_(weight).to(dtype)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight, scale = ctx.saved_tensors
        normalized = x.float() * scale
        grad = grads[0].float()
        grad_weight = torch.linalg.vecdot(grad, normalized, dim=0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad = grad * weight.float()
        along = torch.linalg.vecdot(grad, normalized, dim=-1).div_(x.shape[-1]).unsqueeze(-1)
        grad_x = grad.addcmul_(normalized, along, value=-1).mul_(scale).to(x.dtype)
        return grad_x, grad_weight, None, None


class RMSNorm(modeling_llama.LlamaRMSNorm):
    """The library's norm with a short backward pass; under autocast its result has the dtype that is asked for next."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not self.training:  # without gradients too: a checkpointed layer must compute the same twice
            plain: Tensor = super().forward(hidden_states)
            return plain
        device = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
        out: Tensor = _Normalize.apply(hidden_states, self.weight, self.variance_epsilon, dtype)
        return out


class _Gated(torch.autograd.Function):
    """`silu(gate) * up` (Shazeer, arXiv:2002.05202), any shape; keeps the two, and computes the activation twice."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grads[0] * up, gate), F.silu(gate).mul_(grads[0])


class LlamaMLP(modeling_llama.LlamaMLP):
    """The library's MLP, which in training keeps less for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            plain: Tensor = super().forward(x)
            return plain
        gate, up = self.gate_proj(x), self.up_proj(x)
        gated = isinstance(self.act_fn, nn.SiLU) and gate.dtype == up.dtype
        out: Tensor = self.down_proj(_Gated.apply(gate, up) if gated else self.act_fn(gate) * up)
        return out


class LlamaDecoderLayer(modeling_llama.LlamaDecoderLayer):
    """The library's layer, under its name (device maps and FSDP go by it), that also runs over `Rows`."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        if not isinstance(attention_mask, Rows):
            outputs: tuple[Any, ...] = super().forward(hidden_states, attention_mask, *args, **kwargs)
            return outputs
        hidden = hidden_states + self.attention(self.input_layernorm(hidden_states), attention_mask)
        return (hidden + self.mlp(self.post_attention_layernorm(hidden)),)

    def attention(self, x: Tensor, rows: Rows) -> Tensor:
        """Causal self-attention within rows: `(N, D)` to `(N, D)`."""
        block = self.self_attn
        q = block.q_proj(x).view(len(x), block.num_heads, block.head_dim)
        k = block.k_proj(x).view(len(x), block.num_key_value_heads, block.head_dim)
        v = block.v_proj(x).view(len(x), block.num_key_value_heads, block.head_dim)
        cos, sin = rows.rotary(block.rotary_emb, v)
        q, k = _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)
        out = attend(q, k, v, rows, type(block), block.attention_dropout if self.training else 0.0)
        projected: Tensor = block.o_proj(out.reshape(len(x), -1))
        return projected


def attend(q: Tensor, k: Tensor, v: Tensor, rows: Rows, kind: type[nn.Module], dropout: float = 0.0) -> Tensor:
    """Attention of each token to its row's tokens up to itself.

    `q` `(N, heads, head_dim)`, `k` and `v` `(N, key heads, head_dim)`; the result has the shape of `q`. `kind` is the
    library's attention class, which says how: materialised, `scaled_dot_product_attention`, or FlashAttention.
    """
    if issubclass(kind, modeling_llama.LlamaFlashAttention2):
        longest = max(rows.lengths)
        flash: Tensor = require("flash_attn", "flash").flash_attn_varlen_func(
            q, k, v, rows.starts, rows.starts, longest, longest, dropout_p=dropout, causal=True
        )
        return flash
    core = _sdpa if issubclass(kind, modeling_llama.LlamaSdpaAttention) else _materialised
    if rows.padded:
        q, k, v = (part.index_select(0, rows.to_groups) for part in (q, k, v))
    done, start = [], 0
    for group in rows.groups:
        end = start + group.count * group.length
        queries, keys, values = (
            part[start:end].view(group.count, group.length, *part.shape[1:]).transpose(1, 2) for part in (q, k, v)
        )
        done.append(core(queries, keys, values, rows, dropout).transpose(1, 2).flatten(0, 1))
        start = end
    out = torch.cat(done) if len(done) > 1 else done[0]
    return out.index_select(0, rows.from_groups) if rows.padded else out


def _sdpa(q: Tensor, k: Tensor, v: Tensor, rows: Rows, dropout: float) -> Tensor:
    """`q` `(B, heads, T, head_dim)`, `k` and `v` with as many or fewer heads; the result has the shape of `q`."""
    share = q.shape[1] // k.shape[1]
    if share > 1:
        k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


def _materialised(q: Tensor, k: Tensor, v: Tensor, rows: Rows, dropout: float) -> Tensor:
    """As `_sdpa`, with the weights of attention in memory: faster for short rows on a CPU."""
    batch, heads, length, width = q.shape
    keys = k.shape[1]
    q = q.reshape(batch * keys, heads // keys * length, width)
    mask = rows.mask(length, q.dtype).repeat(heads // keys, 1)
    scores = torch.baddbmm(mask, q, k.reshape(batch * keys, length, width).transpose(1, 2), alpha=width**-0.5)
    weights = torch.softmax(scores, dim=-1)
    if dropout:
        weights = F.dropout(weights, dropout)
    return torch.bmm(weights.to(v.dtype), v.reshape(batch * keys, length, width)).view(batch, heads, length, width)


def run(model: Any, embeds: Tensor, rows: Rows) -> Tensor:
    """The core over `embeds` `(N, D)`: final hidden states `(N, D)`, with gradient checkpointing when it is on."""
    hidden = embeds
    for layer in model.layers:
        if model.gradient_checkpointing and model.training:
            hidden = model._gradient_checkpointing_func(layer.__call__, hidden, rows)[0]
        else:
            hidden = layer(hidden, rows)[0]
    normed: Tensor = model.norm(hidden)
    return normed


def install(model: Any) -> None:
    """Give the layers and norms of a freshly made core the classes of this module; weights are untouched."""
    for layer in model.layers:
        layer.__class__, layer.mlp.__class__ = LlamaDecoderLayer, LlamaMLP
        layer.input_layernorm.__class__ = layer.post_attention_layernorm.__class__ = RMSNorm
    model.norm.__class__ = RMSNorm
