"""Names that forks and users of the reference import, with their published values and meaning."""

from __future__ import annotations

import asyncio
import importlib
from typing import Any

import pytest

NAMES = {
    "llava": "LlavaLlamaForCausalLM",
    "llava.constants": "IGNORE_INDEX IMAGE_TOKEN_INDEX DEFAULT_IMAGE_TOKEN DEFAULT_IMAGE_PATCH_TOKEN "
    "DEFAULT_IM_START_TOKEN DEFAULT_IM_END_TOKEN LOGDIR CONTROLLER_HEART_BEAT_EXPIRATION WORKER_HEART_BEAT_INTERVAL",
    "llava.conversation": "conv_templates SeparatorStyle Conversation default_conversation",
    "llava.mm_utils": "tokenizer_image_token process_images get_model_name_from_path KeywordsStoppingCriteria "
    "load_image_from_base64 expand2square",
    "llava.utils": "disable_torch_init build_logger server_error_msg moderation_msg violates_moderation "
    "pretty_print_semaphore",
    "llava.model": "LlavaLlamaForCausalLM LlavaConfig LlavaMptForCausalLM LlavaMptConfig",
    "llava.model.builder": "load_pretrained_model",
    "llava.model.llava_arch": "LlavaMetaModel LlavaMetaForCausalLM",
    "llava.model.language_model.llava_llama": "LlavaConfig LlavaLlamaModel LlavaLlamaForCausalLM",
    "llava.model.language_model.llava_mpt": "LlavaMptConfig LlavaMptModel LlavaMptForCausalLM",
    "llava.model.multimodal_encoder.builder": "build_vision_tower",
    "llava.model.multimodal_encoder.clip_encoder": "CLIPVisionTower",
    "llava.model.multimodal_projector.builder": "build_vision_projector IdentityMap",
    "llava.model.utils": "auto_upgrade",
    "llava.model.consolidate": "consolidate_ckpt",
    "llava.model.apply_delta": "apply_delta",
    "llava.model.make_delta": "make_delta",
    "llava.train.train": "train ModelArguments DataArguments TrainingArguments LazySupervisedDataset "
    "DataCollatorForSupervisedDataset preprocess preprocess_multimodal preprocess_v1 preprocess_plain "
    "preprocess_llama_2 make_supervised_data_module safe_save_model_for_hf_trainer find_all_linear_names "
    "smart_tokenizer_and_embedding_resize get_mm_adapter_state_maybe_zero_3 get_peft_state_maybe_zero_3 "
    "get_peft_state_non_lora_maybe_zero_3 maybe_zero_3 rank0_print main",
    "llava.train.llava_trainer": "LLaVATrainer LengthGroupedSampler split_to_even_chunks get_length_grouped_indices "
    "get_modality_length_grouped_indices",
    "llava.train.llama_flash_attn_monkey_patch": "replace_llama_attn_with_flash_attn",
    "llava.eval.run_llava": "eval_model load_image",
    "llava.eval.model_vqa": "eval_model get_chunk split_list",
    "llava.eval.model_vqa_loader": "eval_model create_data_loader",
    "llava.eval.m4c_evaluator": "EvalAIAnswerProcessor TextVQAAccuracyEvaluator",
    "llava.eval.eval_textvqa": "prompt_processor",
    "llava.serve.controller": "Controller DispatchMethod",
    "llava.serve.model_worker": "ModelWorker heart_beat_worker",
    "llava.serve.cli": "main load_image",
    "llava.serve.gradio_web_server": "build_demo get_model_list",
}

CONSTANTS = {
    "CONTROLLER_HEART_BEAT_EXPIRATION": 30,
    "WORKER_HEART_BEAT_INTERVAL": 15,
    "LOGDIR": ".",
    "IGNORE_INDEX": -100,
    "IMAGE_TOKEN_INDEX": -200,
    "DEFAULT_IMAGE_TOKEN": "<image>",
    "DEFAULT_IMAGE_PATCH_TOKEN": "<im_patch>",
    "DEFAULT_IM_START_TOKEN": "<im_start>",
    "DEFAULT_IM_END_TOKEN": "<im_end>",
}


@pytest.mark.parametrize("module", NAMES)
def test_names_can_be_imported(module: str) -> None:
    loaded = importlib.import_module(module)
    assert [name for name in NAMES[module].split() if not hasattr(loaded, name)] == []


@pytest.mark.parametrize(("name", "value"), CONSTANTS.items())
def test_constants_have_their_published_values(name: str, value: Any) -> None:
    assert getattr(importlib.import_module("llava.constants"), name) == value


def test_reexports_are_the_same_objects() -> None:
    from llava import images, mm_utils
    from llava.conversation import Conversation, SeparatorStyle, conv_templates, default_conversation

    assert mm_utils.process_images is images.process_images and mm_utils.expand2square is images.expand2square
    assert default_conversation is conv_templates["default"]
    assert all(isinstance(template, Conversation) for template in conv_templates.values())
    assert {"SINGLE", "TWO", "MPT", "PLAIN", "LLAMA_2"} <= set(SeparatorStyle.__members__)


def test_messages_of_web_pages_are_text() -> None:
    from llava.utils import moderation_msg, pretty_print_semaphore, server_error_msg

    assert "refresh" in server_error_msg and "moderation" in moderation_msg.lower()
    assert pretty_print_semaphore(asyncio.Semaphore(1)) == "Semaphore(value=1, locked=False)"
