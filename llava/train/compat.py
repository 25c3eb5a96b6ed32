"""Functions of the published training script under their published names, over the implementations of this package.

`llava.train.train` re-exports them; forks import them from there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from llava import conversation
from llava.arguments import LORA_BIASES
from llava.constants import IGNORE_INDEX
from llava.conversation import SeparatorStyle
from llava.data.labels import preprocess
from llava.errors import TemplateError
from llava.model.llava_arch import grow_embeddings
from llava.model.zero import gathered
from llava.train.model_setup import is_trained_with_lora

Sources = Sequence[Sequence[Mapping[str, str]]]
NamedTensors = Iterable[tuple[str, Tensor]]


def rank0_print(*args: object) -> None:
    """Print on local rank 0 only."""
    if os.environ.get("LOCAL_RANK", "0") in ("0", "-1"):
        print(*args)  # noqa: T201 - published behavior


def _preprocess_style(
    sources: Sources, tokenizer: PreTrainedTokenizerBase, has_image: bool, style: SeparatorStyle
) -> dict[str, list[Tensor]]:
    template = conversation.default_conversation
    if template.sep_style is not style:
        raise TemplateError(
            f"This function needs a template of style {style.name}, but conversation.default_conversation has "
            f"{template.sep_style.name}; set another template, or call preprocess, which takes any."
        )
    return preprocess(sources, tokenizer, has_image)


def _padded(tokenizer: PreTrainedTokenizerBase, rows: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    pad = tokenizer.pad_token_id or 0
    return {
        "input_ids": pad_sequence(rows["input_ids"], batch_first=True, padding_value=pad),
        "labels": pad_sequence(rows["labels"], batch_first=True, padding_value=IGNORE_INDEX),
    }


def preprocess_v1(sources: Sources, tokenizer: PreTrainedTokenizerBase, has_image: bool = False) -> dict[str, Tensor]:
    """`input_ids` and `labels` (N, T) int64 of conversations under a template of style TWO (v1), right-padded."""
    return _padded(tokenizer, _preprocess_style(sources, tokenizer, has_image, SeparatorStyle.TWO))


def preprocess_llama_2(
    sources: Sources, tokenizer: PreTrainedTokenizerBase, has_image: bool = False
) -> dict[str, Tensor]:
    """`input_ids` and `labels` (N, T) int64 of conversations under a template of style LLAMA_2, right-padded."""
    return _padded(tokenizer, _preprocess_style(sources, tokenizer, has_image, SeparatorStyle.LLAMA_2))


def preprocess_plain(sources: Sources, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Tensor]]:
    """`input_ids` and `labels`, one (T,) int64 tensor each per caption, under a template of style PLAIN."""
    return _preprocess_style(sources, tokenizer, True, SeparatorStyle.PLAIN)


def maybe_zero_3(param: Tensor, ignore_status: bool = False, name: str | None = None) -> Tensor:
    """A CPU copy of a tensor, gathered first if ZeRO-3 has partitioned it.

    `ignore_status` and `name` are accepted for compatibility: they silence a warning about parameters in use.
    """
    with gathered([param] if isinstance(param, nn.Parameter) else [], modifier_rank=None):
        return param.detach().to("cpu", copy=True)


def _state(named_params: NamedTensors, wanted: Callable[[str, Tensor], bool]) -> dict[str, Tensor]:
    return {name: maybe_zero_3(param) for name, param in named_params if wanted(name, param)}


def get_peft_state_maybe_zero_3(named_params: NamedTensors, bias: str) -> dict[str, Tensor]:
    """Adapter weights on the CPU, with the biases that `bias` ("none", "all", "lora_only") trains."""
    if bias not in LORA_BIASES:
        raise NotImplementedError(f"bias must be one of {', '.join(LORA_BIASES)}, got {bias!r}.")
    return _state(named_params, lambda name, _: is_trained_with_lora(name, bias))


def get_peft_state_non_lora_maybe_zero_3(
    named_params: NamedTensors, require_grad_only: bool = True
) -> dict[str, Tensor]:
    """Weights outside the adapters on the CPU; with `require_grad_only` the trained ones alone."""
    return _state(named_params, lambda name, p: "lora_" not in name and (p.requires_grad or not require_grad_only))


def get_mm_adapter_state_maybe_zero_3(named_params: NamedTensors, keys_to_match: Sequence[str]) -> dict[str, Tensor]:
    """Weights on the CPU whose name contains one of `keys_to_match`, such as "mm_projector"."""
    return _state(named_params, lambda name, _: any(key in name for key in keys_to_match))


def safe_save_model_for_hf_trainer(trainer: Trainer, output_dir: str) -> None:
    """Save the model, or the projector alone in stage 1, to `output_dir`; all ranks must call."""
    if trainer.args.device.type == "cuda":
        torch.cuda.synchronize()
    trainer.save_model(output_dir)


def smart_tokenizer_and_embedding_resize(
    special_tokens_dict: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    """Add special tokens and embed the new ones as the mean of the old rows, in both embeddings."""
    added = tokenizer.add_special_tokens(dict(special_tokens_dict))
    grow_embeddings(model, len(tokenizer), new_rows=added)
