"""Prompts to keys, values and first logits: batches of like lengths, with shared beginnings computed once.

Rows are padded on the right, which causal attention makes harmless, so no mask is needed and every row is computed as
if it were alone. Requests that begin with the same tokens and pictures (system prompt, image) share that part: it is
computed once, kept in a bounded store, and only the questions behind it run as a batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.engine.cache import BoundedStore, CacheSpec, RowCache
from llava.engine.features import FeatureEncoder, Picture

PrefixKey = tuple[tuple[int, ...], tuple[bytes, ...]]


class LanguageModel:
    """The decoder and head of a causal language model, as the engine uses them."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.core = model.get_decoder()
        config = model.config
        self.context_length = int(config.max_position_embeddings)
        self.spec = CacheSpec(
            layers=config.num_hidden_layers,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            dtype=model.dtype,
            device=model.device,
        )

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Text tokens (T,) to embeddings (T, D)."""
        embeddings: Tensor = self.core.get_input_embeddings()(torch.tensor(ids, device=self.spec.device))
        return embeddings

    def forward(self, embeds: Tensor, cache: RowCache, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        """Embeddings (B, T, D) at `positions` (B or 1, T), behind what `cache` holds, to final states (B, T, D)."""
        output = self.core(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
        states: Tensor = output.last_hidden_state
        return states

    def logits(self, states: Tensor) -> Tensor:
        """Final states (B, D) to logits (B, V)."""
        logits: Tensor = self.model.lm_head(states)
        return logits


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt (`ids` hold -200 per picture) and where its shareable beginning ends (0: nothing to share)."""

    ids: tuple[int, ...]
    pictures: tuple[Picture, ...]

    @cached_property
    def split(self) -> int:
        """Number of ids up to and with the last picture, 0 when nothing would follow or nothing precedes."""
        images = [at for at, token in enumerate(self.ids) if token == IMAGE_TOKEN_INDEX]
        return images[-1] + 1 if images and images[-1] + 1 < len(self.ids) else 0

    @cached_property
    def key(self) -> PrefixKey | None:
        at = self.split
        return (self.ids[:at], tuple(picture.digest for picture in self.pictures)) if at else None


@dataclass(frozen=True)
class Prefilled:
    """Some of the prompts, by number: their keys and values, lengths, and logits (n, V) of their first new token."""

    indices: list[int]
    data: Tensor
    lengths: list[int]
    logits: Tensor


class Prefiller:
    """Runs prompts through the model, see the module's docstring."""

    def __init__(self, lm: LanguageModel, features: FeatureEncoder, *, max_tokens: int, prefix_budget: int) -> None:
        self.lm = lm
        self.features = features
        self.max_tokens = max_tokens
        self.prefixes = BoundedStore(prefix_budget)
        self.computed_tokens = 0
        self.shared_tokens = 0

    def run(self, prompts: Sequence[Prompt], expected: Collection[PrefixKey | None] = ()) -> Iterator[Prefilled]:
        """Prefill `prompts`, yielding them in groups. `expected` are the keys of requests still waiting."""
        counts = Counter([*(prompt.key for prompt in prompts), *expected])
        alone: list[int] = []
        behind: list[tuple[int, PrefixKey]] = []
        for index, prompt in enumerate(prompts):
            if prompt.key is not None and (counts[prompt.key] > 1 or prompt.key in self.prefixes):
                behind.append((index, prompt.key))
            else:
                alone.append(index)
        kept = {key: found for _, key in behind if (found := self.prefixes.get(key)) is not None}
        missing = {key: prompts[index] for index, key in behind if key not in kept}
        features = self.features.encode(
            picture
            for prompt in [*missing.values(), *(prompts[index] for index in alone)]
            for picture in prompt.pictures
        )
        kept.update(self._compute_prefixes(missing, features))
        yield from self._whole(prompts, alone, features)
        by_length: dict[int, list[tuple[int, Tensor]]] = {}
        for index, key in behind:
            by_length.setdefault(kept[key].shape[-2], []).append((index, kept[key]))
        for group in by_length.values():
            yield from self._behind_prefix(prompts, group)

    def _compute_prefixes(
        self, missing: dict[PrefixKey, Prompt], features: dict[bytes, Tensor]
    ) -> dict[PrefixKey, Tensor]:
        """Keys and values (layers, 2, kv_heads, T, head_dim) of new shared beginnings."""
        keys = list(missing)
        embeds = [self._embed(missing[key], features, missing[key].split) for key in keys]
        computed: dict[PrefixKey, Tensor] = {}
        for batch in _batches([len(row) for row in embeds], self.max_tokens):
            data, _ = self._forward([embeds[index] for index in batch])
            for row, index in enumerate(batch):
                computed[keys[index]] = data[:, :, row, :, : len(embeds[index])].clone()
                self.prefixes.put(keys[index], computed[keys[index]])
        return computed

    def _whole(
        self, prompts: Sequence[Prompt], indices: list[int], features: dict[bytes, Tensor]
    ) -> Iterator[Prefilled]:
        embeds = {index: self._embed(prompts[index], features) for index in indices}
        for batch in _batches([len(embeds[index]) for index in indices], self.max_tokens):
            chosen = [indices[at] for at in batch]
            data, last = self._forward([embeds[index] for index in chosen])
            yield Prefilled(chosen, data, [len(embeds[index]) for index in chosen], self.lm.logits(last))

    def _behind_prefix(self, prompts: Sequence[Prompt], group: list[tuple[int, Tensor]]) -> Iterator[Prefilled]:
        """Prompts (by number, with their prefixes of one length): what follows the prefix, as a batch."""
        tails = [prompts[index].ids[prompts[index].split :] for index, _ in group]
        for batch in _batches([len(tail) for tail in tails], self.max_tokens):
            prefixes = [group[at][1] for at in batch]
            data, last = self._forward([self.lm.embed(tails[at]) for at in batch], prefixes)
            lengths = [prefixes[0].shape[-2] + len(tails[at]) for at in batch]
            self.shared_tokens += prefixes[0].shape[-2] * len(batch)
            yield Prefilled([group[at][0] for at in batch], data, lengths, self.lm.logits(last))

    def embed(self, prompt: Prompt) -> Tensor:
        """The whole prompt as embeddings (L, D), its pictures encoded as needed."""
        return self._embed(prompt, self.features.encode(prompt.pictures))

    def _embed(self, prompt: Prompt, features: dict[bytes, Tensor], stop: int | None = None) -> Tensor:
        """(L, D) of the first `stop` ids, pictures in place."""
        if not prompt.pictures:
            return self.lm.embed(prompt.ids[:stop])
        ids = torch.tensor(prompt.ids[:stop], device=self.lm.spec.device)
        blocks = [features[picture.digest] for picture in prompt.pictures]
        embeddings: Tensor = self.lm.model.embed_prompt(ids, blocks)
        return embeddings

    def _forward(self, rows: Sequence[Tensor], prefixes: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """Right-padded rows (L_i, D), behind an equally long prefix each, to cache data and last states (n, D)."""
        behind = prefixes[0].shape[-2] if prefixes else 0
        lengths = torch.tensor([len(row) for row in rows])
        embeds = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)  # (n, L, D)
        cache = RowCache.for_prefill(self.lm.spec, len(rows), behind, behind + embeds.shape[1])
        for row, prefix in enumerate(prefixes):
            cache.data[:, :, row, :, :behind] = prefix
        positions = torch.arange(behind, behind + embeds.shape[1], device=embeds.device).unsqueeze(0)
        states = self.lm.forward(embeds, cache, positions)
        self.computed_tokens += int(lengths.sum())
        return cache.data, states[torch.arange(len(rows)), lengths - 1]


def _batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Row numbers in batches of at most `max_tokens` padded tokens, shortest rows first, little padding in each."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[index]
        if batch and (length * (len(batch) + 1) > max_tokens or length > 1.25 * lengths[batch[0]] + 8):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
