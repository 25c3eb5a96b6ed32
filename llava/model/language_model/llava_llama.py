"""LLaMA (Vicuna) with images: configuration, core and causal language model."""

from __future__ import annotations

from typing import ClassVar

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llava.model.language_model.causal_lm import LlavaConfigMixin, LlavaForCausalLMMixin
from llava.model.language_model.packed import LlamaModel
from llava.model.llava_arch import LlavaMetaModel
from llava.model.registry import LanguageModelSpec


class LlavaConfig(LlavaConfigMixin, LlamaConfig):
    """`LlamaConfig` with the `mm_*` keys of LLaVA, and three keys that training writes and loading reads:

    `conv_template` (the conversation template of the training), `mm_vision_image_size` (pixels, if not the tower's
    default) and `mm_vision_tower_config` (the tower's own settings).
    """

    model_type = "llava_llama"
    accepts: ClassVar[tuple[str, ...]] = ("llava_llama", "llava", "llama")


class LlavaLlamaModel(LlavaMetaModel, LlamaModel):
    """LLaMA core with `vision_tower` and `mm_projector`."""

    config_class = LlavaConfig


class LlavaLlamaForCausalLM(LlavaForCausalLMMixin, LlamaForCausalLM):
    """Chat model on LLaMA."""

    config_class = LlavaConfig
    supports_packing = True
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"rotary_emb\.inv_freq", r"model\.vision_tower\."]
    _no_split_modules: ClassVar[list[str]] = ["LlamaDecoderLayer", "InternVisionEncoderLayer", "CLIPEncoderLayer"]

    def __init__(self, config: LlavaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LlavaLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_model(self) -> LlavaLlamaModel:
        return self.model


AutoConfig.register(LlavaConfig.model_type, LlavaConfig, exist_ok=True)
AutoModelForCausalLM.register(LlavaConfig, LlavaLlamaForCausalLM, exist_ok=True)
LANGUAGE_MODEL = LanguageModelSpec(LlavaConfig, LlavaLlamaForCausalLM)
