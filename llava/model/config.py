"""Reader of `config.json`: newer spellings, and keys that change what a model computes but are not implemented.

Every program reads a configuration through `read_settings` or `check_settings`. A key is known if the configuration
class has it, or if it is listed here; an unknown one is named once in a warning, and refused if it changes numbers.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

import transformers
from transformers import PretrainedConfig

from llava.errors import CheckpointError

logger = logging.getLogger(__name__)
Settings = dict[str, Any]

# Keys that no computation reads: records of training runs, preferences of kernels, and notes of other programs; of
# language models, then of chat models, then of MPT and vision towers.
METADATA: Final = """
_attn_implementation _attn_implementation_autoset _commit_hash _flash_attn_2_enabled _from_model_config _name_or_path
_pre_quantization_dtype auto_map bos_token drop_path_rate dropout dtype eos_token gradient_checkpointing
is_llama_config max_sequence_length max_window_layers model_max_length model_name model_type name_or_path
num_nextn_predict_layers pad_token pretraining_tp quantization_config transformers.js_config unsloth_fixed
unsloth_version use_flash_attn use_sliding_window vocab_size

conv_template freeze_backbone freeze_llm freeze_mm_mlp_adapter freeze_mm_vision_resampler ignore_index
image_crop_resolution image_grid_pinpoints image_split_resolution image_token_id image_token_index mm_hidden_size
mm_image_hidden_size mm_projector_lr mm_projector_type mm_tunable_parts mm_use_im_patch_token mm_use_im_start_end
mm_vision_image_size mm_vision_select_feature mm_vision_select_layer mm_vision_tower mm_vision_tower_config
mm_vision_tower_lr multimodal_projector_bias pretrain_mm_mlp_adapter projector_hidden_act text_config
tokenizer_model_max_length tokenizer_padding_side tune_mm_mlp_adapter tune_mm_vision_resampler
tune_vit_pos_embedding unfreeze_mm_vision_tower use_mm_proj vision_config vision_feature_layer
vision_feature_select_strategy vision_tower

attn_impl fc_type ffn_config init_config initializer_factor layer_scale_init_value logit_scale_init_value
ls_init_value projection_dim text_config_dict tokenizer_name use_mean_pooling use_pad_tok_in_ffn vision_config_dict
"""
# Keys that change what a model computes, by the values with which they do not (besides null and false).
ONE: Final = """
attention_out_multiplier embedding_multiplier embedding_scale lm_head_multiplier logit_scale logits_scaling
mm_spatial_pool_stride partial_rotary_factor residual_multiplier rope_ratio rotary_pct scale_depth scale_emb
"""
OFF: Final = """
alibi attention_chunk_size attention_multiplier attn_logit_softcapping attn_temperature_tuning bias clip_qkv
dim_model_base final_logit_softcapping head_dim kv_n_heads layer_types mlp_bias mm_resampler_type no_rope_layers
parallel_attn qk_gn qk_layernorm qk_norm qkv_bias query_pre_attn_scalar rope rope_interleaved s2 sliding_window
use_bias use_parallel_residual use_qk_norm
"""
KNOWN: Final = frozenset(METADATA.split())
NEUTRAL: Final[dict[str, tuple[object, ...]]] = {
    **dict.fromkeys(ONE.split(), (1,)),
    **dict.fromkeys(OFF.split(), ()),
    "image_aspect_ratio": ("square", "pad", "crop"),
    "mm_patch_merge_type": ("flat",),
    "num_channels": (3,),
    "sliding_window_size": (-1,),
}
SUSPICIOUS: Final = re.compile(
    r"_multiplier$|softcap|logits?_scal|qk_\w*norm|rotary|rope_|_bias$|experts?$|alibi|norm_type|use_rms_norm|subln"
)
INTEGERS: Final = (
    *("head_dim", "max_sequence_length", "mm_hidden_size", "mm_image_hidden_size"),
    *("mm_vision_image_size", "mm_vision_select_layer"),
)
SPELLINGS: Final = ("dtype", "rope_parameters", "rope_condense_ratio")  # replaced by those of the pinned library
SCALED: Final = ("linear", "dynamic")


def read_settings(settings: Mapping[str, Any], config_class: type[PretrainedConfig], source: object) -> Settings:
    """The settings of a language model's `config.json` as the pinned transformers spells them.

    Raises `CheckpointError` for settings that are not supported, with key and value.
    """
    rope = rope_settings(settings, source)
    current = {key: value for key, value in {**settings, **rope}.items() if key not in SPELLINGS}
    dtype = settings.get("torch_dtype") or settings.get("dtype")
    if isinstance(dtype, str):
        current["torch_dtype"] = None if dtype == "auto" else dtype.removeprefix("torch.")
    if current.get("quantization_config", {}) is None:
        del current["quantization_config"]  # transformers cannot save it
    defaults = config_class().to_dict()
    for key, value in current.items():
        if isinstance(value, float) and (key in INTEGERS or key in defaults):
            if not math.isfinite(value):
                raise CheckpointError(f"config.json of {source} has {key}={value}; copy that of the published model.")
            if value.is_integer() and (key in INTEGERS or type(defaults.get(key)) is int):
                current[key] = int(value)
    if type(pad := current.get("pad_token_id")) is int and pad < 0:
        current["pad_token_id"] = None  # LLaMA 1 has -1 for "none"; torch would take it for the last row
    check_settings(current, config_class, source)
    return current


def check_settings(
    settings: Mapping[str, Any], config_class: type[PretrainedConfig], source: object, known: Iterable[str] = ()
) -> None:
    """Warn of keys that are not known; raise `CheckpointError` for those that would change what the model computes.

    `known` are keys beyond those of the class, for example of a model family with the same `model_type`.
    """
    defaults = config_class().to_dict()
    given = {**defaults, **settings}
    if isinstance(nested := settings.get("attn_config"), dict):  # MPT
        given = {**given, **nested}
        defaults = {**defaults, **defaults.get("attn_config", {})}
        settings = {**settings, **nested}
    unknown = []
    for key, value in settings.items():
        listed = key in NEUTRAL and not (key in defaults and key != "num_channels")
        if key in known or (not listed and (key in defaults or key in KNOWN)):
            continue
        if (listed or SUSPICIOUS.search(key)) and not _is_neutral(key, value, given):
            raise CheckpointError(
                f"config.json of {source} sets {key}={value!r}, which changes what the model computes and is not "
                f"supported{_written_by(settings)}; use another model."
            )
        if not listed:
            unknown.append(key)
    if unknown:
        _warn(f"config.json of {source} has unknown keys, which are ignored: {', '.join(sorted(unknown))}.")


@functools.cache
def _warn(message: str) -> None:
    """Log a warning, once per process."""
    logger.warning(message)


def _written_by(settings: Mapping[str, Any]) -> str:
    version = str(settings.get("transformers_version", ""))
    newer = version.partition(".")[0].isdecimal() and int(version.partition(".")[0]) >= 5
    return f" (the file was written by transformers {version}, this is {transformers.__version__})" if newer else ""


def _is_neutral(key: str, value: object, settings: Mapping[str, Any]) -> bool:
    """Whether `value` of a key that is not implemented leaves the model's function as it is."""
    if value is None or value is False or value in ([], {}, ""):
        return True
    if key.startswith("rope_") and settings.get("rope") is False:  # MPT
        return True
    neutral = NEUTRAL.get(key, (0, 1))
    if value is True:
        return any(item is True for item in neutral)
    heads, width = settings.get("num_attention_heads"), settings.get("hidden_size")
    positions = settings.get("max_position_embeddings")
    if isinstance(value, int | float) and isinstance(heads, int) and isinstance(width, int) and heads:
        if key in ("head_dim", "query_pre_attn_scalar"):
            return value * heads == width
        if key == "attention_multiplier":
            return math.isclose(value, (heads / width) ** 0.5, rel_tol=1e-4)
    if key == "sliding_window" and isinstance(value, int):
        return settings.get("use_sliding_window") is False or (isinstance(positions, int) and value >= positions)
    if isinstance(value, list) and key in ("layer_types", "no_rope_layers"):
        return all(item in ("full_attention", 1) for item in value)
    return value in neutral


def rope_settings(settings: Mapping[str, Any], source: object) -> Settings:
    """`rope_theta` and `rope_scaling` in the pinned form, from any spelling; empty if there is nothing to change.

    Transformers 5 has both in `rope_parameters`; older ones write `rope_type` as `type`; LongChat uses
    `rope_condense_ratio`. Raises `CheckpointError` for a kind of scaling that is not supported (llama3, yarn, …).
    """
    old, new = settings.get("rope_scaling"), settings.get("rope_parameters")
    ratio = settings.get("rope_condense_ratio")
    if isinstance(new, dict) and isinstance(full := new.get("full_attention"), dict):
        new = {**full, **{kind: part for kind, part in new.items() if kind != "full_attention" and part != full}}
    for name, value in (("rope_scaling", old), ("rope_parameters", new)):
        if not isinstance(value, dict | None):
            raise CheckpointError(f"{name} in config.json of {source} must be an object, got {value!r}.")
    if not (old or new) and ratio in (None, 1):
        return {}
    parts = {**(old or {}), **(new or {})}
    text = f"config.json of {source} scales its rotary embedding by {parts or {'rope_condense_ratio': ratio}}"
    refused = CheckpointError(
        f"{text}, which transformers {transformers.__version__} does not support{_written_by(settings)}: it has "
        f"{' and '.join(SCALED)} scaling by a factor; use another model."
    )
    theta = parts.pop("rope_theta", None)
    if theta is not None and settings.get("rope_theta") not in (None, theta):
        raise CheckpointError(
            f"config.json of {source} has rope_theta={settings['rope_theta']} and, in rope_parameters, {theta}; "
            "delete the wrong one."
        )
    kinds = {parts.pop(name) for name in ("rope_type", "type") if isinstance(parts.get(name), str)} or {"default"}
    factor = parts.pop("factor", None)
    if ratio not in (None, 1):
        if kinds == {"default"} and factor in (None, 1):
            kinds, factor = {"linear"}, ratio
        elif kinds != {"linear"} or factor != ratio:
            raise refused
    positions = settings.get("max_position_embeddings")
    if parts.pop("original_max_position_embeddings", None) not in (None, positions) and kinds == {"dynamic"}:
        raise refused
    if parts.pop("partial_rotary_factor", 1) not in (None, 1) or any(v is not None for v in parts.values()):
        raise refused
    result: Settings = {"rope_scaling": None}
    if theta is not None:
        result["rope_theta"] = float(theta)
    [kind] = kinds if len(kinds) == 1 else [""]
    if kind == "default" and factor in (None, 1):
        return result
    if kind not in SCALED or isinstance(factor, bool) or not isinstance(factor, int | float) or factor < 1:
        raise refused
    if factor > 1:  # a factor of 1 scales nothing up to max_position_embeddings, beyond which no prompt goes
        result["rope_scaling"] = {"type": kind, "factor": float(factor)}
    return result


def context_length(config: PretrainedConfig) -> int:
    """Context in tokens: `max_position_embeddings`, or `max_sequence_length` if that is smaller.

    With linear rope scaling `max_sequence_length` may exceed `max_position_embeddings` by the factor.
    """
    positions = int(getattr(config, "max_position_embeddings", None) or 2048)
    declared = int(getattr(config, "max_sequence_length", None) or positions)
    scaling = getattr(config, "rope_scaling", None) or {}
    stretch = scaling.get("factor", 1.0) if scaling.get("type") == "linear" else 1.0
    return min(declared, int(positions * stretch))
