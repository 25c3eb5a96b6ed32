"""Mixins shared by all chat models: configuration, forward pass, loss, generation, saving."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava.constants import IGNORE_INDEX
from llava.errors import ConfigError
from llava.model.checkpoint import read_json
from llava.model.config import read_settings
from llava.model.language_model.lm_head import LMHead, supervised_loss
from llava.model.language_model.loss import CrossEntropy, TokenLoss, Tokens
from llava.model.language_model.packed import PackedBatch
from llava.model.llava_arch import LlavaMetaForCausalLM, PastKeyValues, past_length_of
from llava.model.saving import replacing_weights, savable_generation_config
from llava.model.splice import Images
from llava.model.transfer import upload

if TYPE_CHECKING:  # the mixin precedes a configuration of transformers
    from transformers import PretrainedConfig as Config
else:
    Config = object


@dataclass
class LlavaOutput(CausalLMOutputWithPast):
    """Output with the attention mask after the splice, which cached generation needs for its next step."""

    attention_mask: Tensor | None = None


class LlavaConfigMixin(Config):
    """Mixin of a configuration; `accepts` lists the `model_type`s it reads: its own and its base's."""

    model_type: str
    accepts: ClassVar[tuple[str, ...]]

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Read the config of a directory; raises `ConfigError` for a `model_type` not in `accepts`.

        Raises `CheckpointError` for settings that are not supported.
        """
        settings, kwargs = cls.get_config_dict(name, **kwargs)
        found = settings.pop("model_type", cls.model_type)
        if found not in cls.accepts:
            raise ConfigError(f"{name} holds a {found!r} model; this class reads {', '.join(cls.accepts)}.")
        return cls.from_dict(read_settings(settings, cls, name), **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        return read_json(Path(json_file))


class LlavaForCausalLMMixin(LlavaMetaForCausalLM):
    """Mixin of a causal language model of transformers; place it before the library's class."""

    base_model_prefix: str
    lm_head: nn.Module
    supports_packing = False  # whether the core takes a `PackedBatch`
    loss_function: TokenLoss = CrossEntropy()  # training replaces it by name (`--loss`)
    hf_device_map: dict[str, str]  # present only if the model is split over devices, as libraries expect

    def post_init(self) -> None:
        self.set_output_embeddings(self.get_output_embeddings())
        super().post_init()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Set the head; a linear layer becomes an `LMHead` with the same parameters."""
        super().set_output_embeddings(
            LMHead.of(new_embeddings) if type(new_embeddings) is nn.Linear else new_embeddings
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LlavaForCausalLMMixin:
        """Refuse `.to`, `.cpu`, `.half` and the like on a model that is split over devices."""
        if getattr(self, "hf_device_map", None):
            raise ConfigError(
                f"This model is split over {', '.join(sorted(set(self.hf_device_map.values())))} and cannot be moved "
                "or cast; load it again with another device, dtype or device map."
            )
        return cast("LlavaForCausalLMMixin", super()._apply(fn, recurse))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PastKeyValues = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images: Images | None = None,
        image_sizes: object = None,
        return_dict: bool | None = None,
        modalities: object = None,
        padding_side: str = "right",
        cache_position: Tensor | None = None,
        row_weights: Tensor | None = None,
    ) -> LlavaOutput | tuple[object, ...]:
        """Splice image features, run the core, and compute logits and loss.

        Args:
            input_ids: `(B, T)`, with -200 at images.
            attention_mask: `(B, T)`.
            labels: `(B, T)`, with -100 at unsupervised positions.
            images: in any layout of `splice.encode_slots`.
            image_sizes, modalities, cache_position: accepted for compatibility and ignored, but see `generate`.
            row_weights: `(B,)`; the loss is the sum over rows of the weight times the sum of the row's token losses.

        Returns:
            `logits` `(B, T', V)` over the spliced length T', and with `labels` the float32 cross-entropy of the next
            token: its mean over the supervised tokens of the batch (0 without any), or weighted by `row_weights`. In
            training mode with `labels`, only supervised positions are projected, in chunks, and `logits` is `None`.
        """
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "images": images}
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("input_ids or inputs_embeds must be given.")
            extra = use_cache or output_attentions or output_hidden_states or return_dict is False
            continued = past_key_values is not None or position_ids is not None
            if self.supports_packing and self.training and labels is not None and not (extra or continued):
                return LlavaOutput(loss=self._packed_loss(batch, labels, row_weights))
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels = (
                self.prepare_inputs_labels_for_multimodal(
                    input_ids, position_ids, attention_mask, past_key_values, labels, images, padding_side=padding_side
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
            tokens, supervised = supervised_tokens(hidden, labels, batch)
            chosen = None if logits is None else logits.flatten(0, 1).index_select(0, supervised)
            loss = supervised_loss(self.lm_head, tokens, row_weights, self.loss_function, chosen)
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
            return cast("tuple[object, ...]", result.to_tuple())
        return result

    def _packed_loss(self, batch: dict[str, Any], labels: Tensor, row_weights: Tensor | None) -> Tensor:
        """Training loss over the real tokens of the batch."""
        embeds, lengths, packed_labels = self.pack_inputs_and_labels(**batch, labels=labels)  # (N, D)
        ends = torch.tensor(lengths).cumsum(0)
        targets = F.pad(packed_labels[1:], (0, 1), value=IGNORE_INDEX)  # (N,), on the host
        targets[ends - 1] = IGNORE_INDEX  # the next token belongs to another sequence
        supervised = (targets != IGNORE_INDEX).nonzero().flatten()
        rows = torch.bucketize(supervised, ends, right=True)
        columns = supervised - F.pad(ends[:-1], (1, 0))[rows]
        keep, targets, rows, columns = upload([supervised, targets[supervised], rows, columns], embeds.device)
        # Adapters and quantized layers need not take an empty batch.
        last = {"keep": keep} if len(supervised) else {}
        hidden = self.get_model()(inputs_embeds=embeds, batch=PackedBatch(lengths, embeds.device), **last)
        tokens = Tokens(hidden if last else hidden.index_select(0, keep), targets, rows, columns, batch)
        return supervised_loss(self.lm_head, tokens, row_weights, self.loss_function)

    def generate(self, inputs: Tensor | None = None, *args: Any, image_sizes: object = None, **kwargs: Any) -> Any:
        """Generate as in transformers; with `image_sizes`, the returned ids are without those of the prompt.

        Newer callers, such as lmms-eval, pass `image_sizes` and decode all returned ids.
        """
        output = super().generate(inputs, *args, **kwargs)
        prompt = kwargs.get("input_ids") if inputs is None else inputs
        if image_sizes is None or prompt is None:
            return output
        if isinstance(output, Tensor):
            return output[:, prompt.shape[1] :]
        output.sequences = output.sequences[:, prompt.shape[1] :]
        return output

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: PastKeyValues = None,
        inputs_embeds: Tensor | None = None,
        images: Images | None = None,
        **kwargs: object,
    ) -> dict[str, object]:
        """The inputs of transformers plus `images`; the spliced batch is padded left."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs
        )
        return {**inputs, "images": images, "padding_side": "left"} if images is not None else dict(inputs)

    def _update_model_kwargs_for_generation(
        self, outputs: LlavaOutput, model_kwargs: dict[str, object], **kwargs: object
    ) -> dict[str, object]:
        if outputs.attention_mask is not None and past_length_of(outputs.past_key_values):
            model_kwargs["attention_mask"] = outputs.attention_mask.long()
        return dict(super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs))

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, state_dict: dict[str, Tensor] | None = None, **kwargs: object
    ) -> None:
        """Save in the published layout; a loaded tower is saved with the layers that no feature needs.

        Weight files of an earlier save with another number of shards are removed.
        """
        tower = self.get_vision_tower()
        if tower is not None and tower.is_loaded and kwargs.get("is_main_process", True):
            state_dict = dict(self.state_dict() if state_dict is None else state_dict)
            prefix = f"{self.base_model_prefix}.vision_tower."
            rest = {prefix + name: tensor for name, tensor in tower.unused_tensors().items()}
            if any(name.startswith(prefix) for name in state_dict):
                state_dict.update(rest)
        generation = getattr(self, "generation_config", None)
        if isinstance(generation, GenerationConfig):
            self.generation_config = savable_generation_config(generation)
        is_writer = kwargs.get("is_main_process", True)
        with replacing_weights(Path(save_directory)) if is_writer else nullcontext():
            super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        self.generation_config = generation


def supervised_tokens(hidden: Tensor, labels: Tensor, batch: dict[str, Any]) -> tuple[Tokens, Tensor]:
    """The tokens of `hidden` `(B, T, D)` whose next label in `labels` `(B, T)` is not -100, and their flat indices."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten().to(hidden.device)  # (B * T,)
    supervised = (targets != IGNORE_INDEX).nonzero().flatten()  # the only synchronisation of this loss on CUDA
    rows, columns = supervised // labels.shape[1], supervised % labels.shape[1]
    states = hidden.flatten(0, 1).index_select(0, supervised)
    return Tokens(states, targets.index_select(0, supervised), rows, columns, batch), supervised
