"""Features of pictures, computed together for a batch and kept by content, so that a picture is encoded once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from llava.engine.cache import LRUCache
from llava.engine.sequence import ImageInput, Picture
from llava.errors import RequestError
from llava.images import preprocess_image
from llava.placement import to_device

_ENCODE_AT_ONCE = 16


class FeatureEncoder:
    """Pictures in, projected features (n, D) out, through a bounded store.

    PIL images are preprocessed by `aspect_ratio` (the model's own setting by default); tensors are taken as they are.
    """

    def __init__(self, model: Any, image_processor: Any, *, aspect_ratio: str | None, budget: int) -> None:
        self.model = model
        self.image_processor = image_processor
        self.aspect_ratio = aspect_ratio
        self.store = LRUCache(budget)
        self.encoded = 0

    @property
    def tokens_per_image(self) -> int:
        """Feature tokens of one preprocessed picture; raises `RequestError` when the model takes none."""
        if not (count := getattr(self.model, "num_image_tokens", 0)):
            raise RequestError("The request has images, but this model has no vision tower; send text only.")
        return int(count)

    def encode(self, pictures: Iterable[Picture]) -> dict[bytes, Tensor]:
        """Features by digest, computing those not in the store, pictures of one size together."""
        wanted = {picture.digest: picture for picture in pictures}
        found = {digest: kept for digest in wanted if (kept := self.store.get(digest)) is not None}
        by_shape: dict[torch.Size, list[tuple[bytes, Tensor]]] = {}
        for digest, picture in wanted.items():
            if digest not in found:
                pixels = self._pixels(picture.content)  # (3, S, S)
                by_shape.setdefault(pixels.shape, []).append((digest, pixels))
        for group in by_shape.values():
            for at in range(0, len(group), _ENCODE_AT_ONCE):
                found.update(self._compute(group[at : at + _ENCODE_AT_ONCE]))
        return found

    def _compute(self, group: Sequence[tuple[bytes, Tensor]]) -> dict[bytes, Tensor]:
        batch = torch.stack([pixels for _, pixels in group])  # (K, 3, S, S)
        sent = to_device(batch, self.model.device).to(self.model.dtype)
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
            raise RequestError("The request has PIL images, but the engine was made without an image processor.")
        return preprocess_image(content, self.image_processor, self.aspect_ratio)
