"""Multimodal mixins of a causal language model: vision tower, projector, and splicing of features into the text.

`LlavaMetaModel` is the mixin of the core, `LlavaMetaForCausalLM` that of the model with the head.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
)
from llava.errors import CheckpointError, RequestError
from llava.model.checkpoint import EMBEDDINGS, compare_shapes, has_tensors, projector_state, read_tensors
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.tower import TowerLayers, VisionTower
from llava.model.multimodal_projector.builder import build_vision_projector, projected_tokens
from llava.model.splice import Images, SpliceLayout, encode_slots, encode_used_slots, splice_batch, splice_prompt
from llava.model.transfer import to_host, upload
from llava.model.zero import gathered

if TYPE_CHECKING:  # the mixins precede a class of transformers
    from transformers import PreTrainedModel as Module

    from llava.arguments import ModelArguments
else:
    Module = nn.Module

PastKeyValues: TypeAlias = Cache | tuple[tuple[Tensor, ...], ...] | None
NO_IMAGE = "The prompt contains <image>, but no image was given; pass one image per <image>."


class LlavaMetaModel(Module):
    """Mixin of the language model's core; place it before the library's class.

    With `mm_vision_tower` in the configuration it creates a projector and a tower whose loading is delayed.
    """

    vision_tower: VisionTower
    mm_projector: nn.Module
    _num_image_tokens: int | None = None

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.init_vision(config)

    def init_vision(self, config: PretrainedConfig) -> None:
        """Create tower and projector; for cores that do not call `LlavaMetaModel.__init__`."""
        if getattr(config, "mm_vision_tower", None):
            self.vision_tower = build_vision_tower(config, checkpoint_directory(config), delay_load=True)
            self.mm_projector = build_vision_projector(config)

    def get_vision_tower(self) -> VisionTower | None:
        return getattr(self, "vision_tower", None)

    @property
    def num_image_tokens(self) -> int:
        """The number of embeddings one image becomes in the prompt, after the projector; 0 without a tower."""
        tower = self.get_vision_tower()
        if tower is None:
            return 0
        if self._num_image_tokens is None:
            self._num_image_tokens = projected_tokens(self.config, *tower.feature_shapes)
        return self._num_image_tokens

    def initialize_vision_modules(
        self, model_args: ModelArguments, fsdp: object = None, dtype: torch.dtype | None = None
    ) -> None:
        """Load the tower, write the `mm_*` keys of the configuration, and create or keep the projector.

        A projector that fits is kept. The tower is loaded in `dtype` (default float32). `fsdp` is accepted for
        compatibility and ignored.
        """
        config = self.config
        self._num_image_tokens = None
        same_tower = model_args.vision_tower == getattr(config, "mm_vision_tower", None)
        if not same_tower:
            config.mm_vision_tower_config = None
        config.mm_vision_tower = model_args.vision_tower
        config.use_mm_proj = True
        config.mm_projector_type = getattr(model_args, "mm_projector_type", "linear")
        config.mm_vision_select_layer = model_args.mm_vision_select_layer
        config.mm_vision_select_feature = model_args.mm_vision_select_feature
        if image_size := getattr(model_args, "mm_vision_image_size", None):
            config.mm_vision_image_size = image_size
        existing = self.get_vision_tower()
        if existing is None or not existing.is_loaded:
            tower = build_vision_tower(config, checkpoint_directory(config), delay_load=True)
            tower.load_model(dtype=dtype, from_checkpoint=same_tower)
            self.vision_tower = tower
        config.mm_hidden_size = self.vision_tower.hidden_size
        if self.vision_tower.image_hidden_size != config.mm_hidden_size:
            config.mm_image_hidden_size = self.vision_tower.image_hidden_size
        config.mm_vision_tower_config = self.vision_tower.settings
        self._initialize_projector(getattr(model_args, "pretrain_mm_mlp_adapter", None))

    def _initialize_projector(self, adapter: str | None) -> None:
        projector = build_vision_projector(self.config)
        current = getattr(self, "mm_projector", None)
        if type(current) is not type(projector) or parameter_shapes(current) != parameter_shapes(projector):
            self.mm_projector = projector
        for parameter in self.mm_projector.parameters():
            parameter.requires_grad_(True)
        if adapter:
            self.load_projector(Path(adapter))
            self.load_tuned_positions(Path(adapter))

    def load_projector(self, file: Path) -> None:
        """Load an `mm_projector.bin` or `.safetensors`, strictly."""
        if not has_tensors(file):
            raise CheckpointError(
                f"There is no projector file {str(file)!r}; run the pretraining stage first, or correct "
                "--pretrain_mm_mlp_adapter."
            )
        state = projector_state(read_tensors(file), file)
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        compare_shapes(shapes, parameter_shapes(self.mm_projector), file)
        copy_into(self.mm_projector, state)

    def load_tuned_positions(self, file: Path) -> None:
        """Load the tower's positions from a projector file that was trained with `tune_vit_pos_embedding`."""
        marker = "vision_tower.vision_tower.embeddings."
        tuned = {name.split(marker, 1)[1]: value for name, value in read_tensors(file).items() if marker in name}
        if any("position_embedding" in name for name in tuned):
            copy_into(cast("nn.Module", self.vision_tower.vision_tower.embeddings), tuned)


class LlavaMetaForCausalLM(Module):
    """Mixin of the model with the head; the core is `get_model()`."""

    def get_model(self) -> LlavaMetaModel:
        raise NotImplementedError(f"{type(self).__name__} must define get_model()")  # pragma: no cover

    def get_vision_tower(self) -> VisionTower | None:
        return self.get_model().get_vision_tower()

    @property
    def num_image_tokens(self) -> int:
        """The number of embeddings one image becomes in the prompt, after the projector; 0 without a tower."""
        return self.get_model().num_image_tokens

    def encode_images(self, images: Tensor, projector: nn.Module | None = None) -> Tensor:
        """Encode and project images `(K, 3, S, S)` to features `(K, n, D)`, by default with the model's projector."""
        return self._project(self.get_model().vision_tower(images), projector)

    def encode_images_by_layer(
        self, images: Tensor, projector: nn.Module | None = None, layers: TowerLayers | None = None
    ) -> Generator[None, None, Tensor]:
        """As `encode_images` without gradients, in parts: yields after each layer of the tower, or of `layers`."""
        return self._project((yield from self.get_model().vision_tower.encode_by_layer(images, layers)), projector)

    def _project(self, features: Tensor | tuple[Tensor, ...], projector: nn.Module | None) -> Tensor:
        projector = self.get_model().mm_projector if projector is None else projector
        parameter = next(projector.parameters(), None)
        if parameter is not None:
            features = features.to(parameter) if isinstance(features, Tensor) else tuple(
                part.to(parameter) for part in features
            )  # fmt: skip
        projected: Tensor = projector(features)
        return projected

    def embed_prompt(self, input_ids: Sequence[int] | Tensor, features: Sequence[Tensor]) -> Tensor:
        """Embed one prompt `(T,)`, its placeholders replaced by `features` (each `(n_i, D)`): `(L, D)`.

        Ids given as a list or a CPU tensor need no synchronisation.
        """
        embedding = self.get_model().get_input_embeddings()
        device = embedding.weight.device
        if isinstance(input_ids, Tensor):
            device = input_ids.device if input_ids.device.type != "cpu" else device
            input_ids = input_ids.tolist()

        def embed(ids: list[int]) -> Tensor:
            index = torch.tensor(ids, dtype=torch.long)
            # Offloaded weights are on the meta device; their hook moves the ids to its execution device.
            embeds: Tensor = embedding(index if device.type == "meta" else upload([index], device)[0])
            return embeds

        return splice_prompt(input_ids, features, embed)

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: PastKeyValues,
        labels: Tensor | None,
        images: Images | None,
        image_sizes: object = None,
        modalities: object = None,
        *,
        padding_side: str = "right",
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, PastKeyValues, Tensor | None, Tensor | None]:
        """Splice image features into a batch.

        Returns `(input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels)`; `input_ids` is
        `None` when embeddings replace it. Ids without a placeholder pass through unchanged without images and when a
        past is continued. `image_sizes` and `modalities` are accepted for compatibility and ignored.
        """
        past = past_length_of(past_key_values)
        ids, host_mask, host_labels = to_host(input_ids, attention_mask, labels)
        has_placeholder = bool((cast("Tensor", ids) == IMAGE_TOKEN_INDEX).any())
        if images is None or self.get_vision_tower() is None or (past and not has_placeholder):
            if has_placeholder:
                raise RequestError(NO_IMAGE)
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        spliced = splice_batch(
            cast("Tensor", ids),
            self._embed_text(input_ids),
            encode_slots(images, self.encode_images),
            attention_mask=host_mask,
            labels=host_labels,
            past_length=past,
            padding_side=padding_side,
        )
        masked = attention_mask is not None or not spliced.full
        return (
            None,
            spliced.position_ids if masked or past else None,
            spliced.attention_mask if masked else None,
            past_key_values,
            spliced.inputs_embeds,
            spliced.labels,
        )

    def pack_inputs_and_labels(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, images: Images | None
    ) -> tuple[Tensor, list[int], Tensor]:
        """Splice a batch and concatenate it without padding.

        Returns embeddings `(N, D)`, the length of each sequence, and labels `(N,)` on the CPU.
        """
        ids, mask, host_labels = to_host(input_ids, attention_mask, labels)
        assert ids is not None and host_labels is not None
        embeds = self._embed_text(input_ids)
        slots: Sequence[Tensor] = []
        if images is not None and self.get_vision_tower() is not None:
            layout = SpliceLayout.of(ids, mask, len(images))
            slots = encode_used_slots(images, self.encode_images, layout.counts)
        elif bool((ids == IMAGE_TOKEN_INDEX).any()):
            raise RequestError(NO_IMAGE)
        else:
            layout = SpliceLayout.of(ids, mask)
        rows = layout.splice(embeds, slots)
        row_labels = layout.splice(host_labels, [host_labels.new_full((len(slot),), IGNORE_INDEX) for slot in slots])
        return (
            torch.cat([piece for row in rows for piece in row]),
            [sum(map(len, row)) for row in rows],
            torch.cat([piece for row in row_labels for piece in row]),
        )

    def _embed_text(self, input_ids: Tensor) -> Tensor:
        """Token embeddings `(B, T, D)`, those of id 0 at placeholders.

        If `<im_start>` and `<im_end>` are trained with the projector alone, only the neighbours of a placeholder get
        gradients.
        """
        image_at = input_ids == IMAGE_TOKEN_INDEX
        embeds: Tensor = self.get_model().get_input_embeddings()(input_ids.masked_fill(image_at, 0))
        config = self.config
        if getattr(config, "tune_mm_mlp_adapter", False) and getattr(config, "mm_use_im_start_end", False):
            trained = torch.zeros_like(image_at)
            trained[:, :-1] |= image_at[:, 1:]
            trained[:, 1:] |= image_at[:, :-1]
            embeds = torch.where(trained.unsqueeze(-1), embeds, embeds.detach())
        return embeds

    def initialize_vision_tokenizer(self, model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> None:
        """Add the image tokens to tokenizer and embeddings, and set which embeddings are trained."""
        if model_args.mm_use_im_patch_token:
            tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
            grow_embeddings(self, len(tokenizer), new_rows=0)
        tune_adapter = getattr(model_args, "tune_mm_mlp_adapter", False)
        if model_args.mm_use_im_start_end:
            added = tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
            grow_embeddings(self, len(tokenizer), new_rows=added)
            if tune_adapter:
                self.get_input_embeddings().requires_grad_(True)
                self.get_output_embeddings().requires_grad_(False)
            adapter = getattr(model_args, "pretrain_mm_mlp_adapter", None)
            if adapter:
                load_token_rows(self, Path(adapter))
        elif model_args.mm_use_im_patch_token and tune_adapter:
            self.get_input_embeddings().requires_grad_(False)
            self.get_output_embeddings().requires_grad_(False)


def checkpoint_directory(config: PretrainedConfig) -> Path | None:
    return Path(config.name_or_path) if getattr(config, "name_or_path", "") else None


def past_length_of(past_key_values: PastKeyValues) -> int:
    """The number of cached positions."""
    if past_key_values is None:
        return 0
    if hasattr(past_key_values, "get_seq_length"):
        return int(past_key_values.get_seq_length())
    return int(past_key_values[-1][-1].shape[-2])


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters by name, unpartitioned also under ZeRO-3."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters()}


def copy_into(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy tensors into a module's parameters by name; parameters partitioned by ZeRO-3 are gathered first."""
    parameters = {name: parameter for name, parameter in module.named_parameters() if name in state}
    with gathered(list(parameters.values())), torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name].to(parameter.dtype))


def grow_embeddings(model: PreTrainedModel, size: int, *, new_rows: int) -> None:
    """Resize both embeddings to at least `size` rows; the last `new_rows` become the mean of the others."""
    if size > parameter_shapes(model.get_input_embeddings())["weight"][0]:
        model.resize_token_embeddings(size)
    if not new_rows:
        return
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        with gathered([embedding.weight]), torch.no_grad():
            weight = embedding.weight
            weight[size - new_rows : size] = weight[: size - new_rows].mean(dim=0, keepdim=True)


def load_token_rows(model: PreTrainedModel, file: Path) -> None:
    """Load the embeddings of `<im_start>` and `<im_end>` from a projector file."""
    state = read_tensors(file)
    key = next((name for name in EMBEDDINGS if name in state), None)
    if key is None:
        raise CheckpointError(
            f"{file} holds no token embeddings ({' or '.join(EMBEDDINGS)}): it was trained without "
            "--mm_use_im_start_end; use the same setting in both stages."
        )
    rows = state[key]
    weight = model.get_input_embeddings().weight
    with gathered([weight]), torch.no_grad():
        if rows.shape == weight.shape:
            weight[-2:] = rows[-2:].to(weight.dtype)
        elif rows.shape == (2, weight.shape[1]):
            weight[-2:] = rows.to(weight.dtype)
        else:
            raise CheckpointError(
                f"{file} holds {tuple(rows.shape)} token embeddings, but the model has {tuple(weight.shape)}."
            )
