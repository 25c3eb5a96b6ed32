"""The reference implementation's computation, as a baseline.

The whole tower runs, keeps all hidden states and materialises its attention. Logits are computed at all positions.
Questions are answered one at a time with `generate`, encoding the image each time.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llava.constants import IGNORE_INDEX
from llava.model.language_model.fused import RMSNorm
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.intern_vit_6b import InternAttention, InternVisionModel


def naive_attention(self: InternAttention, x: Tensor) -> Tensor:
    batch, tokens, width = x.shape
    heads = self.num_heads
    q, k, v = self.qkv(x).chunk(3, dim=-1)
    q, k = self.q_norm(q), self.k_norm(k)
    q, k, v = (t.view(batch, tokens, heads, width // heads).transpose(1, 2) for t in (q, k, v))
    weights = ((q * (width // heads) ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
    out: Tensor = self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))
    return out


def use_reference_tower(model: LlavaLlamaForCausalLM, directory: str, dtype: torch.dtype) -> None:
    """Replace the tower of a loaded model by the complete one, run to the end with all hidden states kept."""
    wrapper = model.get_model().vision_tower
    whole = InternVisionModel.from_pretrained(directory, torch_dtype=dtype).requires_grad_(False).eval()
    for module in whole.modules():
        if isinstance(module, InternAttention):
            module.forward = MethodType(naive_attention, module)  # type: ignore[method-assign]
    wrapper.vision_tower = whole

    def encode(self: Any, images: Tensor) -> Tensor:
        with torch.no_grad():
            states = self.vision_tower(images.to(self.dtype), output_hidden_states=True).hidden_states
        features: Tensor = states[self.select_layer][:, 1:].to(images.dtype)
        return features

    wrapper.forward = MethodType(encode, wrapper)


def use_reference_way(model: LlavaLlamaForCausalLM) -> None:
    """Replace the tower, and the norms by the library's own, for training."""
    use_reference_tower(model, model.config.mm_vision_tower, model.dtype)
    for module in model.get_model().modules():
        if isinstance(module, RMSNorm):
            module.forward = MethodType(LlamaRMSNorm.forward, module)  # type: ignore[method-assign]


def loss_at_all_positions(model: LlavaLlamaForCausalLM, batch: dict[str, Any]) -> Tensor:
    """Cross-entropy over logits of every position of the padded batch, shifted by one."""
    ids, positions, mask, _, embeds, labels = model.prepare_inputs_labels_for_multimodal(
        batch["input_ids"], None, batch["attention_mask"], None, batch["labels"], batch["images"]
    )
    hidden = model.model(
        input_ids=ids, inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    logits = model.lm_head(hidden)
    assert labels is not None
    shifted = logits[:, :-1].contiguous().view(-1, logits.shape[-1])
    return F.cross_entropy(shifted, labels[:, 1:].reshape(-1), ignore_index=IGNORE_INDEX)
