"""What every chat model does the same, whatever language model is inside: forward, loss, generation, saving (§8)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava.constants import IGNORE_INDEX
from llava.errors import ConfigError
from llava.model.language_model.packed import Rows
from llava.model.llava_arch import LlavaMetaForCausalLM, past_length_of
from llava.model.splice import Images
from llava.model.transfer import upload


@dataclass
class LlavaOutput(CausalLMOutputWithPast):
    """Adds the attention mask after the splice, which the next step of a cached generation continues (M7)."""

    attention_mask: Tensor | None = None


class LlavaConfigMixin:
    """Mixin before the library's configuration: `accepts` names the `model_type`s it reads, its own and its base's."""

    model_type: str
    accepts: ClassVar[tuple[str, ...]]

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Read a directory's config; another `model_type` than `accepts` is a `ConfigError`."""
        library: Any = cls
        settings, kwargs = library.get_config_dict(name, **kwargs)
        found = settings.pop("model_type", cls.model_type)
        if found not in cls.accepts:
            raise ConfigError(f"{name} holds a {found!r} model; this class reads {', '.join(cls.accepts)}.")
        return library.from_dict(settings, **kwargs)


class LlavaForCausalLMMixin(LlavaMetaForCausalLM):
    """Mixin before the library's causal language model; `images` come in any layout of `splice.encode_slots`."""

    base_model_prefix: str
    lm_head: nn.Module
    runs_packed = False  # whether the core takes `rows`, the real tokens of a batch laid end to end
    hf_device_map: dict[str, str]  # set when spread over devices, absent otherwise: libraries ask whether it is there

    def loss_function(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of float logits `(S, V)` at the supervised positions; training replaces it by name (`--loss`)."""
        return mean_loss(logits, targets)

    def _apply(self, fn: Any, recurse: bool = True) -> LlavaForCausalLMMixin:
        """What `.to`, `.cpu` and their like go through: a model on several devices stays where it is (MGPU-3)."""
        if getattr(self, "hf_device_map", None):
            raise ConfigError(
                f"This model is spread over {', '.join(sorted(set(self.hf_device_map.values())))} and cannot be moved "
                "or cast; load it again with another device, dtype or device map."
            )
        library: Any = super()
        moved: LlavaForCausalLMMixin = library._apply(fn, recurse)
        return moved

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images: Images | None = None,
        return_dict: bool | None = None,
        padding_side: str = "right",
        cache_position: Tensor | None = None,
    ) -> LlavaOutput | tuple[Any, ...]:
        """Splice, run the core, and project to the vocabulary (§8.2).

        `input_ids`, `labels`, `attention_mask`: `(B, T)`, -200 at images, -100 at unsupervised labels. The loss is the
        mean float32 cross-entropy of the next token, 0 when nothing is supervised. In training mode with labels only
        the supervised positions are projected and `logits` is `None`; otherwise logits are `(B, T', V)` over the
        expanded length T'. `cache_position` of newer libraries is accepted and not needed.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("input_ids or inputs_embeds must be given.")
            asks_more = use_cache or output_attentions or output_hidden_states or return_dict is False
            given = past_key_values is not None or position_ids is not None
            if self.runs_packed and self.training and labels is not None and not (asks_more or given):
                return LlavaOutput(loss=self._packed_loss(input_ids, attention_mask, labels, images))
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels = (
                self.prepare_inputs_labels_for_multimodal(
                    input_ids, position_ids, attention_mask, past_key_values, labels, images, padding_side
                )
            )
        outputs = self.get_model()(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        hidden = outputs.last_hidden_state  # (B, T', D)
        logits, loss = None, None
        if labels is None or not self.training:
            logits = self.lm_head(hidden)
        if labels is not None:
            loss = supervised_loss(hidden, labels, self.lm_head, logits, self.loss_function)
        result = LlavaOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            attention_mask=attention_mask if inputs_embeds is not None else None,
        )
        if return_dict is False:
            result.attention_mask = None
            values: tuple[Any, ...] = result.to_tuple()
            return values
        return result

    def _packed_loss(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, images: Images | None
    ) -> Tensor:
        """The training loss, computed over the real tokens of the batch alone."""
        embeds, lengths, packed_labels = self.pack_inputs_and_labels(input_ids, attention_mask, labels, images)
        hidden = self.get_model()(inputs_embeds=embeds, rows=Rows(lengths, embeds.device))  # (N, D)
        targets = F.pad(packed_labels[1:], (0, 1), value=IGNORE_INDEX)  # (N,), on the host
        targets[torch.tensor(lengths).cumsum(0) - 1] = IGNORE_INDEX  # a row's last token does not predict the next row
        supervised = (targets != IGNORE_INDEX).nonzero().flatten()
        supervised, targets = upload([supervised, targets[supervised]], hidden.device)
        return self.loss_function(self.lm_head(hidden.index_select(0, supervised)), targets)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The library's inputs plus `images`; rows are padded left, whatever side the prompts came padded on."""
        images = kwargs.pop("images", None)
        library: Any = super()
        inputs: dict[str, Any] = library.prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs
        )
        if images is not None:
            inputs.update(images=images, padding_side="left")
        return inputs

    def _update_model_kwargs_for_generation(
        self, outputs: LlavaOutput, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        if outputs.attention_mask is not None and past_length_of(outputs.past_key_values):
            model_kwargs["attention_mask"] = outputs.attention_mask.long()
        library: Any = super()
        updated: dict[str, Any] = library._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        return updated

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Save in the published layout: a loaded tower is saved whole, with the layers no feature needs (§11.3)."""
        tower = self.get_vision_tower()
        if tower is not None and tower.is_loaded and kwargs.get("is_main_process", True):
            state_dict = dict(self.state_dict() if state_dict is None else state_dict)
            prefix = f"{self.base_model_prefix}.vision_tower."
            rest = {prefix + name: tensor for name, tensor in tower.unused_tensors().items()}
            if any(name.startswith(prefix) for name in state_dict):
                state_dict.update(rest)
        library: Any = super()
        library.save_pretrained(save_directory, state_dict=state_dict, **kwargs)


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in float32; `logits` `(S, V)`, `targets` `(S,)`; 0 for S = 0."""
    return F.cross_entropy(logits.float(), targets, reduction="sum") / max(1, len(targets))


def supervised_loss(
    hidden: Tensor,
    labels: Tensor,
    head: nn.Module,
    logits: Tensor | None = None,
    loss_function: Callable[[Tensor, Tensor], Tensor] = mean_loss,
) -> Tensor:
    """Mean next-token cross-entropy in float32 over labels that are not -100 (0 when there are none, T12).

    `hidden` `(B, T, D)`, `labels` `(B, T)`. Without `logits` only supervised positions are projected.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten().to(hidden.device)  # (B * T,)
    supervised = (targets != IGNORE_INDEX).nonzero().flatten()  # the only synchronisation of this loss on CUDA
    if logits is None:
        logits = head(hidden.flatten(0, 1).index_select(0, supervised))
    else:
        logits = logits.flatten(0, 1).index_select(0, supervised)
    return loss_function(logits, targets.index_select(0, supervised))
