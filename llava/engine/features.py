"""Image features: encoded in batches and cached by content, so that an image is encoded once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llava.engine.cache import LRUCache
from llava.engine.sequence import HashedImage, ImageInput
from llava.engine.tower import TowerRunner
from llava.errors import RequestError
from llava.images import preprocess_image
from llava.placement import to_device

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor, PreTrainedModel

_BATCH_SIZE = 16

Features = dict[bytes, Tensor]  # (n, D) by digest


class FeatureEncoder:
    """Encoder of images to projected features (n, D), with an LRU cache of `budget` bytes.

    PIL images are preprocessed with `aspect_ratio` (default: the model's setting); tensors are used as they are.
    """

    def __init__(
        self, model: PreTrainedModel, image_processor: CLIPImageProcessor | None, aspect_ratio: str | None, budget: int
    ) -> None:
        self.model = model
        self.image_processor = image_processor
        self.aspect_ratio = aspect_ratio
        self.tower = TowerRunner.build(model)
        self.store = LRUCache(budget)
        self.encoded = 0
        self.hits = 0  # images whose features were cached or encoded for another image of the same call

    @property
    def tokens_per_image(self) -> int:
        """Tokens of one image in a prompt; raises `RequestError` if the model has no vision tower."""
        count = int(getattr(self.model, "num_image_tokens", 0))
        if not count:
            raise RequestError("The request has images, but this model has no vision tower; send text only.")
        return count

    def encode(self, images: Iterable[HashedImage]) -> Features:
        """Features by digest; those not in the cache are computed, images of one size together."""
        asked = list(images)
        wanted = {image.digest: image for image in asked}
        features = {digest: cached for digest in wanted if (cached := self.store.get(digest)) is not None}
        self.hits += len(asked) - len(wanted) + len(features)
        by_shape: dict[torch.Size, list[tuple[bytes, Tensor]]] = {}
        for digest, image in wanted.items():
            if digest not in features:
                pixels = self._pixels(image.content)  # (3, S, S)
                by_shape.setdefault(pixels.shape, []).append((digest, pixels))
        for group in by_shape.values():
            for at in range(0, len(group), _BATCH_SIZE):
                features.update(self._compute(group[at : at + _BATCH_SIZE]))
        return features

    def _compute(self, group: Sequence[tuple[bytes, Tensor]]) -> Features:
        batch = torch.stack([pixels for _, pixels in group])  # (K, 3, S, S)
        sent = to_device(batch, self.model.device).to(self.model.dtype)
        with nullcontext() if self.tower is None else self.tower.active():
            features = self.model.encode_images(sent)  # (K, n, D)
        self.encoded += len(group)
        computed = {digest: row.clone() for (digest, _), row in zip(group, features, strict=True)}
        for digest, row in computed.items():
            self.store.put(digest, row)
        return computed

    def _pixels(self, content: ImageInput) -> Tensor:
        if isinstance(content, Tensor):
            return content
        if self.image_processor is None:
            raise RequestError("The request has PIL images, but the engine has no image processor; send tensors.")
        return preprocess_image(content, self.image_processor, self.aspect_ratio)
