"""Image features: encoded in batches and cached by content, so that an image is encoded once."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

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
        self.projectors: list[nn.Module | None] = [None]  # by `HashedImage.projector`; None is the model's
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

    @property
    def layers(self) -> int:
        """Parts of `encode_by_layer` for one image: the layers of the tower, or 1."""
        return max(1, len(self.model.get_vision_tower().layers))

    @cached_property
    def layer_tokens(self) -> float:
        """Tokens of an image per layer of the tower; 1 without a tower."""
        return self.tokens_per_image / self.layers if getattr(self.model, "num_image_tokens", 0) else 1.0

    def missing(self, images: Iterable[HashedImage]) -> int:
        """Number of distinct images that are not in the cache."""
        return len({image.digest for image in images if image.digest not in self.store})

    def encode(self, images: Iterable[HashedImage]) -> Features:
        """Features by digest; those not in the cache are computed, images of one size together."""
        features, missing = self._look_up(images)
        by_shape: dict[tuple[int, torch.Size], list[tuple[bytes, Tensor]]] = {}
        for image in missing:
            pixels = self._pixels(image.content)  # (3, S, S)
            by_shape.setdefault((image.projector, pixels.shape), []).append((image.digest, pixels))
        for (number, _), group in by_shape.items():
            for at in range(0, len(group), _BATCH_SIZE):
                digests, batch = zip(*group[at : at + _BATCH_SIZE], strict=True)
                with nullcontext() if self.tower is None else self.tower.active():
                    encoded = self.model.encode_images(self._upload(batch), **self._projector(number))  # (K, n, D)
                features.update(self._store(digests, encoded))
        return features

    def encode_by_layer(self, images: Iterable[HashedImage]) -> Generator[None, None, Features]:
        """As `encode`, image by image; yields after each layer of the tower."""
        features, missing = self._look_up(images)
        layers = None if self.tower is None else self.tower.layers
        for image in missing:
            sent = self._upload([self._pixels(image.content)])
            encoded = yield from self.model.encode_images_by_layer(
                sent, layers=layers, **self._projector(image.projector)
            )  # (1, n, D)
            features.update(self._store([image.digest], encoded))
        return features

    def _projector(self, number: int) -> dict[str, nn.Module]:
        """The argument `projector` of `encode_images`, if it is not the model's."""
        own = self.projectors[number]
        return {} if own is None else {"projector": own}

    def _look_up(self, images: Iterable[HashedImage]) -> tuple[Features, list[HashedImage]]:
        """The cached features, and the distinct images without."""
        asked = list(images)
        wanted = {image.digest: image for image in asked}
        features = {digest: cached for digest in wanted if (cached := self.store.get(digest)) is not None}
        self.hits += len(asked) - len(wanted) + len(features)
        return features, [image for digest, image in wanted.items() if digest not in features]

    def _upload(self, pixels: Sequence[Tensor]) -> Tensor:
        """Pixels (3, S, S) of K images as a batch (K, 3, S, S) on the model's device."""
        return to_device(torch.stack(list(pixels)), self.model.device).to(self.model.dtype)

    def _store(self, digests: Sequence[bytes], encoded: Tensor) -> Features:
        self.encoded += len(digests)
        computed = {digest: row.clone() for digest, row in zip(digests, encoded, strict=True)}
        for digest, row in computed.items():
            self.store.put(digest, row)
        return computed

    def _pixels(self, content: ImageInput) -> Tensor:
        if isinstance(content, Tensor):
            return content
        if self.image_processor is None:
            raise RequestError("The request has PIL images, but the engine has no image processor; send tensors.")
        return preprocess_image(content, self.image_processor, self.aspect_ratio)
