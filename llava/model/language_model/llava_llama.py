"""LLaMA (Vicuna) with images: configuration, core and causal language model (spec/model.md §7, §8)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from llava.model.language_model import packed
from llava.model.language_model.causal_lm import LlavaConfigMixin, LlavaForCausalLMMixin
from llava.model.llava_arch import LlavaMetaModel
from llava.model.registry import LanguageModelSpec


class LlavaConfig(LlavaConfigMixin, LlamaConfig):
    """`LlamaConfig` with the `mm_*` keys of §7, and three of ours, written by training and read at loading:

    `conv_template` (the template the checkpoint was trained with), `mm_vision_image_size` (pixels, when not the
    tower's default) and `mm_vision_tower_config` (the tower's own settings).
    """

    model_type = "llava_llama"
    accepts: ClassVar[tuple[str, ...]] = ("llava_llama", "llava", "llama")


class LlavaLlamaModel(LlavaMetaModel, LlamaModel):
    """The core: LLaMA, and under `vision_tower` and `mm_projector` what images need."""

    config_class = LlavaConfig

    def __init__(self, config: LlavaConfig) -> None:
        LlamaModel.__init__(self, config)
        packed.install(self)
        self.init_vision(config)

    def forward(self, *args: Any, rows: packed.Rows | None = None, **kwargs: Any) -> Any:
        """As the library's; with `rows`, over `inputs_embeds` `(N, D)` without padding: hidden states `(N, D)`."""
        if rows is None:
            return super().forward(*args, **kwargs)
        return packed.run(self, kwargs["inputs_embeds"], rows)


class LlavaLlamaForCausalLM(LlavaForCausalLMMixin, LlamaForCausalLM):
    """The chat model. `images` are accepted in every layout of `llava.model.splice.encode_slots`."""

    config_class = LlavaConfig
    runs_packed = True
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"rotary_emb\.inv_freq", r"model\.vision_tower\."]
    _no_split_modules: ClassVar[list[str]] = ["LlamaDecoderLayer", "InternVisionEncoderLayer", "CLIPEncoderLayer"]

    def __init__(self, config: LlavaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LlavaLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        LlamaForCausalLM.post_init(self)

    def get_model(self) -> LlavaLlamaModel:
        return self.model


AutoConfig.register(LlavaConfig.model_type, LlavaConfig, exist_ok=True)
AutoModelForCausalLM.register(LlavaConfig, LlavaLlamaForCausalLM, exist_ok=True)
LANGUAGE_MODEL = LanguageModelSpec(LlavaConfig, LlavaLlamaForCausalLM)
