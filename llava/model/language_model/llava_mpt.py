"""MPT with images: configuration, core and causal language model.

Blocks and head are those of transformers. Attention is not, because theirs ignores `clip_qkv` and `alibi_bias_max`,
fails beyond `max_seq_len` and for numbers of heads other than powers of two, and does not support `Cache`. Positions
enter through the ALiBi bias only (Press et al., arXiv:2108.12409).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, MptConfig, MptForCausalLM, MptModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.mpt.modeling_mpt import MptAttention

from llava.errors import ConfigError
from llava.model.language_model.causal_lm import LlavaConfigMixin, LlavaForCausalLMMixin
from llava.model.llava_arch import LlavaMetaModel, PastKeyValues, past_length_of
from llava.model.registry import LanguageModelSpec
from llava.model.splice import Images

LayerPast = tuple[Cache, int]


class LlavaMptConfig(LlavaConfigMixin, MptConfig):
    """`MptConfig` with the keys of `LlavaConfig`; raises `ConfigError` for variants of MPT that are not implemented."""

    model_type = "llava_mpt"
    accepts: ClassVar[tuple[str, ...]] = ("llava_mpt", "mpt")
    attribute_map: ClassVar[dict[str, str]] = {**MptConfig.attribute_map, "max_position_embeddings": "max_seq_len"}

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        attention = self.attn_config
        wanted = {
            "attn_type": (attention.attn_type, "multihead_attention"),
            "alibi": (attention.alibi, True),
            "qk_ln": (attention.qk_ln, False),
            "prefix_lm": (attention.prefix_lm, False),
            "no_bias": (self.no_bias, True),
            "expansion_ratio": (self.expansion_ratio, 4),
            "logit_scale": (self.logit_scale, None),
            "norm_type": (str(self.norm_type).removeprefix("low_precision_"), "layernorm"),
        }
        for key, (found, supported) in wanted.items():
            if found != supported:
                raise ConfigError(
                    f"This MPT has {key}={found!r}; only {key}={supported!r} is supported; use another base."
                )


class LlavaMptAttention(MptAttention):
    """Attention with fused QKV, optional clamping, ALiBi, and softmax in float32."""

    def __init__(self, config: LlavaMptConfig) -> None:
        super().__init__(config)
        self.clip_qkv: float | None = config.attn_config.clip_qkv

    def forward(
        self,
        hidden_states: Tensor,
        position_bias: Tensor,
        past_key_value: LayerPast | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, None]:
        """Attend over `(B, T, D)`.

        `position_bias` is `(H, 1, S)`, `attention_mask` `(B or 1, 1, T, S)` with True at hidden keys; `past_key_value`
        is a cache and the index of this layer in it.
        """
        qkv = self.Wqkv(hidden_states)
        if self.clip_qkv:
            qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
        query, key, value = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=self.n_heads)
        if past_key_value is not None:
            cache, layer = past_key_value
            key, value = cache.update(key, value, layer)  # (B, H, S, d)
        scores = query @ key.transpose(-1, -2) * self.softmax_scale + position_bias  # (B, H, T, S) float32
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask, torch.finfo(query.dtype).min)
        weights = scores.float().softmax(dim=-1).to(value.dtype)
        weights = nn.functional.dropout(weights, p=self.attn_dropout_p, training=self.training)
        context = rearrange(weights @ value, "b h t d -> b t (h d)")
        return self.out_proj(context), weights, None


class LlavaMptModel(LlavaMetaModel, MptModel):
    """MPT core with `vision_tower` and `mm_projector`."""

    config_class = LlavaMptConfig
    num_heads: int
    wte: nn.Module
    blocks: nn.ModuleList
    norm_f: nn.Module
    _gradient_checkpointing_func: Callable[..., tuple[Tensor, ...]]

    def __init__(self, config: LlavaMptConfig) -> None:
        MptModel.__init__(self, config)
        for block in self.blocks:
            block.attn = LlavaMptAttention(config)
        self.init_vision(config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: PastKeyValues = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        position_ids: Tensor | None = None,
    ) -> BaseModelOutputWithPast | tuple[object, ...]:
        """Compute hidden states `(B, T, D)` of ids `(B, T)` or embeddings `(B, T, D)` after P past positions.

        `attention_mask` is `(B, P + T)`. A `Cache` is returned as such, a legacy tuple as a tuple. `position_ids` are
        ignored.
        """
        config = self.config
        hidden = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        checkpointed = self.gradient_checkpointing and self.training
        use_cache = (config.use_cache if use_cache is None else use_cache) and not checkpointed
        past = past_length_of(past_key_values)
        cache: Cache | None = past_key_values
        if not isinstance(cache, Cache) and (use_cache or past):
            cache = DynamicCache.from_legacy_cache(cache)
        bias = alibi(self.num_heads, past + hidden.shape[1], config.attn_config.alibi_bias_max, hidden.device)
        hidden_keys = _hidden_keys(hidden, past, attention_mask)
        states, attentions = [], []
        for index, block in enumerate(self.blocks):
            states.append(hidden)
            layer_past = None if cache is None else (cache, index)
            if checkpointed:
                hidden = self._gradient_checkpointing_func(
                    block.__call__, hidden, bias, hidden_keys, None, False, False
                )[0]
            else:
                hidden, *weights = block(hidden, bias, hidden_keys, layer_past, False, bool(output_attentions))
                attentions += weights
        hidden = self.norm_f(hidden)
        if use_cache and cache is not None and cache is not past_key_values:
            cache = cache.to_legacy_cache()
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cache if use_cache else None,
            hidden_states=(*states, hidden) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return output if return_dict is not False else cast("tuple[object, ...]", output.to_tuple())


def alibi(heads: int, length: int, bias_max: int, device: torch.device) -> Tensor:
    """ALiBi bias `(H, 1, S)` in float32 of S keys relative to the last: -slope times distance (arXiv:2108.12409).

    Slopes are powers of two down to `2^-bias_max`, interleaved as in MPT unless `heads` is a power of two.
    """
    whole = 2 ** math.ceil(math.log2(heads))
    slopes = torch.arange(1, whole + 1, dtype=torch.float32, device=device).mul(-bias_max / whole).exp2()
    if whole != heads:
        slopes = torch.cat([slopes[1::2], slopes[::2]])[:heads]
    distances = torch.arange(1 - length, 1, dtype=torch.float32, device=device)  # (S,), the last is 0
    return slopes.view(-1, 1, 1) * distances


def _hidden_keys(hidden: Tensor, past: int, attention_mask: Tensor | None) -> Tensor | None:
    """Mask `(B or 1, 1, T, P + T)`, True at hidden keys; `None` if all keys are visible."""
    new = hidden.shape[1]
    columns = torch.arange(past + new, device=hidden.device)
    hidden_keys = (columns > columns[past:, None])[None, None]  # (1, 1, T, P + T)
    if attention_mask is not None:
        hidden_keys = hidden_keys | ~attention_mask.to(hidden.device, torch.bool)[:, None, None]
    elif new == 1:
        return None
    return hidden_keys


class LlavaMptForCausalLM(LlavaForCausalLMMixin, MptForCausalLM):
    """Chat model on MPT."""

    config_class = LlavaMptConfig
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"transformer\.vision_tower\."]
    _supports_cache_class = True
    _no_split_modules: ClassVar[list[str]] = ["MptBlock", "InternVisionEncoderLayer", "CLIPEncoderLayer"]

    def __init__(self, config: LlavaMptConfig) -> None:
        super(MptForCausalLM, self).__init__(config)
        self.transformer = LlavaMptModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_model(self) -> LlavaMptModel:
        return self.transformer

    def get_decoder(self) -> LlavaMptModel:
        return self.transformer

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: PastKeyValues = None,
        inputs_embeds: Tensor | None = None,
        images: Images | None = None,
        **kwargs: object,
    ) -> dict[str, object]:
        """As in the base class; an empty `Cache` counts as no past."""
        past = past_key_values if past_length_of(past_key_values) else None
        inputs = super().prepare_inputs_for_generation(input_ids, past, inputs_embeds, images, **kwargs)
        return {**inputs, "past_key_values": past_key_values}


AutoConfig.register(LlavaMptConfig.model_type, LlavaMptConfig, exist_ok=True)
AutoModelForCausalLM.register(LlavaMptConfig, LlavaMptForCausalLM, exist_ok=True)
LANGUAGE_MODEL = LanguageModelSpec(LlavaMptConfig, LlavaMptForCausalLM, attention=("eager",))
