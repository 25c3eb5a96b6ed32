"""The vision tower as the chat model sees it: found late, loaded strictly, stopped where its features are taken.

Behaviour is that of spec/model.md §2.3, without its defects: strict weights in the target dtype (M2), frozen modules
stay in eval mode (M27), and layers after `mm_vision_select_layer` are neither loaded nor run (`design.md`, decision 3).
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava.errors import CheckpointError, ConfigError
from llava.model.checkpoint import (
    TOWER_PREFIXES,
    check_depth,
    config_errors,
    has_weights,
    iter_tensors,
    layer_index,
    weight_shapes,
)
from llava.model.multimodal_encoder.builder import TowerSpec, find_tower, read_tower_settings, tower_spec
from llava.model.weights import empty_weights, load_weights

logger = logging.getLogger(__name__)
FEATURES = ("patch", "cls_patch")
LONGEST_SIDE = 4096  # pixels; what a checkpoint may ask every image to be made into


class VisionTower(nn.Module):
    """Images `(K, 3, S, S)` to features `(K, n, C)`; `.vision_tower` is the model once `load_model` has run.

    `name` is a directory or hub name; `args` carries `mm_vision_select_layer`, and optionally
    `mm_vision_select_feature`, `mm_vision_image_size` and `mm_vision_tower_config` (the tower's settings as a chat
    checkpoint keeps them). Until a property needs it, nothing is looked up.
    """

    def __init__(self, name: str, args: Any, *, checkpoint_dir: Path | None = None) -> None:
        super().__init__()
        self.name = name
        with config_errors(checkpoint_dir or name):
            self.select_layer = int(args.mm_vision_select_layer)
        self.select_feature = getattr(args, "mm_vision_select_feature", None) or "patch"
        if self.select_feature not in FEATURES:
            raise ConfigError(f"mm_vision_select_feature={self.select_feature!r} is not one of {', '.join(FEATURES)}.")
        self.image_size: int | None = getattr(args, "mm_vision_image_size", None)
        self.checkpoint_dir = checkpoint_dir
        stored = getattr(args, "mm_vision_tower_config", None)
        self._settings: dict[str, Any] | None = stored if isinstance(stored, dict) else None
        self.rest_of: tuple[Path, str] | None = None

    # --- what it is -------------------------------------------------------------------------------------------

    @cached_property
    def directory(self) -> Path | None:
        """Where the tower lies; `None` when only the chat checkpoint knows it (its settings are stored there)."""
        try:
            return find_tower(self.name, self.checkpoint_dir)
        except CheckpointError:
            if self._settings is None:
                raise
            return None

    @cached_property
    def settings(self) -> dict[str, Any]:
        if self._settings is not None:
            return self._settings
        if self.directory is None:
            raise CheckpointError(f"The vision tower {self.name!r} was not found.")
        return read_tower_settings(self.directory)

    @cached_property
    def spec(self) -> TowerSpec:
        return tower_spec(self.settings, self.name)

    @cached_property
    def config(self) -> Any:
        """The tower's own configuration, with the layers of the whole tower."""
        with config_errors(self.name):
            config = self.spec.config(self.settings)
        vision = self.spec.vision(config)
        for key in ("hidden_size", "num_hidden_layers", "patch_size"):
            value = getattr(vision, key, None)
            if type(value) is not int or value < 1:
                raise CheckpointError(f"The vision tower {self.name!r} has {key}={value!r} in its configuration.")
        return config

    @cached_property
    def depth(self) -> int:
        """How many layers lie before the selected features: the index into the L + 1 hidden states (§1.7)."""
        layers = int(self.spec.vision(self.config).num_hidden_layers)
        depth = self.select_layer + (layers + 1 if self.select_layer < 0 else 0)
        if not 0 <= depth <= layers:
            raise ConfigError(
                f"mm_vision_select_layer={self.select_layer} does not exist in {self.name!r} with its {layers} layers."
            )
        return depth

    @cached_property
    def image_processor(self) -> Any:
        directory = self.directory if self.directory is not None else Path(self.name)
        with config_errors(self.checkpoint_dir or self.name):
            processor = self.spec.processor(directory, self.image_size)
            sides = sorted(processor.crop_size[side] for side in ("height", "width"))
        if not self.spec.vision(self.config).patch_size <= sides[0] <= sides[1] <= LONGEST_SIDE:
            raise CheckpointError(
                f"The vision tower {self.name!r} would be shown images of {sides[0]} to {sides[1]} px; correct "
                "mm_vision_image_size, or the tower's preprocessor_config.json."
            )
        return processor

    @property
    def is_loaded(self) -> bool:
        return hasattr(self, "vision_tower")

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def image_hidden_size(self) -> int:
        """Width of the patch features; differs from `hidden_size` where the tower has queries of their own width."""
        return int(self.spec.vision(self.config).hidden_size)

    @property
    def num_patches(self) -> int:
        """Patches of one image at the resolution actually used (M26)."""
        crop, patch = self.image_processor.crop_size, self.spec.vision(self.config).patch_size
        return int((crop["height"] // patch) * (crop["width"] // patch))

    @property
    def num_features(self) -> int:
        """Tokens one image takes in the language model."""
        return self.num_patches + (self.select_feature == "cls_patch") + self.spec.queries(self.config)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.vision_tower.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.vision_tower.parameters()).device

    @property
    def dummy_feature(self) -> Tensor:
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    # --- loading ----------------------------------------------------------------------------------------------

    def load_model(
        self,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        from_checkpoint: bool = True,
    ) -> None:
        """Load the weights up to the selected layer, strictly, and freeze them.

        Weights inside the chat checkpoint win when the set is complete (§11.3, VT-4), unless `from_checkpoint` is
        false; then the tower's own directory is read. Which one was used is logged.
        """
        if self.is_loaded:
            return
        source, prefix, table = self.source(from_checkpoint)
        config = copy.deepcopy(self.config)
        vision, grid = self.spec.vision(config), math.isqrt(table - 1)
        if grid != vision.image_size // vision.patch_size:
            logger.info("tower positions: the stored table has a %dx%d grid, not %d px", grid, grid, vision.image_size)
            vision.image_size = grid * vision.patch_size
        model = self.empty(config, source)
        tensors = (
            (name.removeprefix(prefix), tensor)
            for name, tensor in iter_tensors(source, lambda name: name.startswith(prefix) and self.needs(name, prefix))
            if tensor is not None
        )
        load_weights(model, tensors, dtype=dtype or torch.float32, device=device or "cpu", source=str(source),
             optional=self.spec.unused)  # fmt: skip
        self.vision_tower = model.requires_grad_(False).eval()
        self.rest_of = (source, prefix)
        logger.info("vision tower %s: features after layer %d, from %s", self.name, self.depth, source)

    def empty(self, config: Any, source: Path) -> nn.Module:
        """The tower up to the selected layer, without memory for its weights, which `source` holds."""
        for part in (self.settings, *self.settings.values()):
            check_depth(part.get("num_hidden_layers") if isinstance(part, dict) else None, source)
        with config_errors(self.name), empty_weights():
            return self.spec.build(config, self.depth)

    def stored_shapes(self, from_checkpoint: bool) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights that `load_model` would read, from the headers of their files."""
        source, prefix, _ = self.source(from_checkpoint)
        shapes = weight_shapes(source).items()
        return {n.removeprefix(prefix): s for n, s in shapes if n.startswith(prefix) and self.needs(n, prefix)}

    def needs(self, name: str, prefix: str) -> bool:
        name = name.removeprefix(prefix)
        index = layer_index(name, self.spec.layers) if self.spec.layers else None
        return not name.startswith(self.spec.unused) and (index is None or index < self.depth)

    def source(self, from_checkpoint: bool) -> tuple[Path, str, int]:
        """The directory to read, the prefix of the tower's keys in it, and the rows of its position table."""
        if from_checkpoint and self.checkpoint_dir is not None and has_weights(self.checkpoint_dir):
            shapes = weight_shapes(self.checkpoint_dir)
            for prefix in TOWER_PREFIXES:
                layers = {layer_index(name, prefix + (self.spec.layers or "")) for name in shapes}
                positions = prefix + self.spec.positions
                if positions in shapes and (
                    self.spec.layers is None or all(index in layers for index in range(self.depth))
                ):
                    return self.checkpoint_dir, prefix, shapes[positions][-2]
        if self.directory is None:
            find_tower(self.name, self.checkpoint_dir)  # raises with the places tried
            raise CheckpointError(f"The vision tower {self.name!r} has settings but no weights.")
        shapes = weight_shapes(self.directory)
        if self.spec.positions not in shapes:
            raise CheckpointError(
                f"{self.directory} lacks {self.spec.positions!r}: it does not hold the tower it names."
            )
        return self.directory, "", shapes[self.spec.positions][-2]

    def unused_tensors(self) -> dict[str, Tensor]:
        """The weights that were not loaded because no feature needs them, read now: a full save stays complete."""
        if self.rest_of is None:
            return {}
        source, prefix = self.rest_of
        parts = {name for name, _ in self.vision_tower.named_children()}
        wanted = iter_tensors(source, lambda name: name.startswith(prefix) and not self.needs(name, prefix))
        rest = ((name.removeprefix(prefix), tensor) for name, tensor in wanted if tensor is not None)
        return {f"vision_tower.{name}": tensor.to(self.dtype) for name, tensor in rest if name.split(".")[0] in parts}

    # --- running ----------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> VisionTower:
        """A frozen tower stays in eval mode whatever the enclosing model does (M27)."""
        trainable = any(parameter.requires_grad for parameter in self.parameters())
        return super().train(mode and trainable)

    def forward(self, images: Tensor | Iterable[Tensor]) -> Any:
        """Features `(K, n, C)` of `(K, 3, H, W)` images, in the images' dtype; a list is encoded one by one.

        A tower with queries gives a pair: patch features and query features `(K, q, hidden_size)`.

        Gradients flow only when some parameter of the tower is trainable.
        """
        if not isinstance(images, Tensor):
            return [self._encode(image.unsqueeze(0)) for image in images]
        return self._encode(images)

    def _encode(self, images: Tensor) -> Any:
        if not self.is_loaded:
            raise CheckpointError(f"The vision tower {self.name!r} is not loaded; call load_model() first.")
        trainable = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        with nullcontext() if trainable else torch.no_grad():
            output = self.vision_tower(images.to(self.device, self.dtype))
            features = self.feature_select(output.last_hidden_state).to(images.dtype)  # (K, n, C)
            queries = getattr(output, "query_features", None)
            return features if queries is None else (features, queries.to(images.dtype))

    def feature_select(self, tokens: Tensor) -> Tensor:
        """Drop the class token for `patch`, keep it for `cls_patch`."""
        return tokens[:, 1:] if self.select_feature == "patch" else tokens
