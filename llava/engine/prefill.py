"""Prefill: prompts to keys, values and first logits, with common prefixes computed once.

Cached prefixes come from the prefix cache. Prefixes that several prompts of the batch, or of those waiting, have in
common are computed once and cached. The remaining tokens run in batches of rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.engine.features import FeatureEncoder, Features
from llava.engine.model_runner import ModelRunner
from llava.engine.prefix_cache import (
    MIN_SHARED,
    Node,
    Prefix,
    PrefixCache,
    PrefixMatch,
    common_prefix_length,
    num_tokens,
    token_ends,
)
from llava.engine.sequence import CacheKeys, HashedImage, Prompt, is_image_key
from llava.engine.statistics import Clock
from llava.errors import RequestError

MIN_SAVED: Final = 64  # tokens a shared prefix must save; it costs time in every decode step


@dataclass(frozen=True)
class PrefillOutput:
    """Keys and values of some prompts, by index: `data` (layers, 2, n, kv_heads, T, head_dim), left-aligned.

    `lengths` are the rows' tokens behind `prefixes`; `logits` (n, V) are those of the first new tokens.
    """

    indices: list[int]
    data: Tensor
    lengths: list[int]
    prefixes: list[Prefix]
    logits: Tensor


@dataclass(eq=False)
class PrefillItem:
    """A prompt during a prefill; `prefix` covers its first `done` cache keys.

    `index` is its position in the batch, or None for a waiting prompt. `ends[i]` is the number of tokens of the first i
    cache keys; `computed` counts the tokens of the prefix that were computed for this prompt.
    """

    index: int | None
    prompt: Prompt
    ends: tuple[int, ...]
    prefix: Prefix = ()
    done: int = 0
    computed: int = 0

    @property
    def images(self) -> tuple[HashedImage, ...]:
        """Images behind the prefix."""
        return self.prompt.images[self.prompt.ids[: self.done].count(IMAGE_TOKEN_INDEX) :]

    @property
    def rest(self) -> CacheKeys:
        """Cache keys behind the prefix."""
        return self.prompt.cache_keys[self.done :]

    @property
    def limit(self) -> int:
        """Cache keys that may still be shared; the last one must be computed to obtain logits."""
        return len(self.prompt.cache_keys) - 1 - self.done

    def num_tokens(self, count: int) -> int:
        """Tokens of the next `count` cache keys."""
        return self.ends[self.done + count] - self.ends[self.done]

    def advance(self, match: PrefixMatch) -> None:
        self.prefix = (*self.prefix, match)
        self.done += match.num_keys


class Prefiller:
    """Prefill of batches of prompts, at most `max_tokens` in one forward pass, with a prefix cache."""

    def __init__(
        self, runner: ModelRunner, features: FeatureEncoder, max_tokens: int, prefix_budget: int, clock: Clock
    ) -> None:
        self.runner = runner
        self.features = features
        self.max_tokens = max_tokens
        self.prefix_cache = PrefixCache(prefix_budget)
        self.clock = clock
        self.prompt_tokens = self.computed_tokens = self.cached_tokens = 0
        self.hits = self.images = 0  # prompts with cached tokens, and images of all prompts

    def run(self, prompts: Sequence[Prompt], waiting: Sequence[Prompt] = ()) -> Iterator[PrefillOutput]:
        """Prefill `prompts` and yield them in groups. Prefixes they share with `waiting` prompts are cached."""
        items = [self._item(index, prompt) for index, prompt in enumerate(prompts)]
        features = self._encode(image for item in items for image in item.images)
        later = [self._item(None, prompt) for prompt in waiting]
        plan_shared_prefixes([*items, *later], lambda item, count: self._compute_node(item, count, features))
        for item in items:
            self._compute_chunks(item, features)
            self._count(item)
        rows = [self._embed(item.prompt, features, item.done, len(item.prompt.ids)) for item in items]
        for batch in self._batches(items, [len(row) for row in rows]):
            yield self._prefill_rows(batch, [items[at] for at in batch], [rows[at] for at in batch])

    def new_tokens(self, prompt: Prompt, previous: Prompt | None) -> int:
        """Tokens of `prompt` that are neither cached nor shared with `previous`, which is prefilled just before."""
        item = self._item(None, prompt)
        shared = 0 if previous is None else common_prefix_length(previous.cache_keys, prompt.cache_keys)
        return item.ends[-1] - item.ends[max(item.done, shared)]

    def cache(self, prompt: Prompt, tokens: Sequence[int], prefix: Prefix, data: Tensor) -> None:
        """Store a finished sequence in the prefix cache, for the next turn of its conversation.

        `data` (layers, 2, kv_heads, length, head_dim) are its keys and values behind `prefix`; `tokens` are the
        generated tokens among them.
        """
        cache_keys = prompt.cache_keys + tuple(tokens)
        first = num_tokens(prefix) if self.runner.shares_prefixes else 0
        self.prefix_cache.add(cache_keys, self._token_counts(cache_keys), data, first)

    def embed(self, prompt: Prompt) -> Tensor:
        """Embeddings (L, D) of a whole prompt."""
        embeds = self._embed(prompt, self._encode(prompt.images), 0, len(prompt.ids))
        self.prompt_tokens += len(embeds)
        self.computed_tokens += len(embeds)
        self.images += len(prompt.images)
        return embeds

    def _encode(self, images: Iterable[HashedImage]) -> Features:
        with self.clock.measure("tower"):
            return self.features.encode(images)

    def _count(self, item: PrefillItem) -> None:
        """Count a prompt of the batch whose prefix is complete."""
        cached = num_tokens(item.prefix) - item.computed
        self.prompt_tokens += item.ends[-1]
        self.cached_tokens += cached
        self.hits += cached > 0
        self.images += len(item.prompt.images)

    def _item(self, index: int | None, prompt: Prompt) -> PrefillItem:
        prefix, done = self.prefix_cache.match(prompt.cache_keys, len(prompt.cache_keys) - 1)
        return PrefillItem(index, prompt, token_ends(self._token_counts(prompt.cache_keys)), prefix, done)

    def _token_counts(self, cache_keys: CacheKeys) -> list[int]:
        return [self.features.tokens_per_image if is_image_key(key) else 1 for key in cache_keys]

    def _compute_node(self, item: PrefillItem, count: int, features: Features) -> Node:
        """Compute and cache the next `count` cache keys of `item`."""
        cache_keys = item.prompt.cache_keys[: item.done + count]
        embeds = self._embed(item.prompt, features, item.done, len(cache_keys))
        data = self.runner.prefill_kv(embeds, item.prefix, item.prompt.adapter)
        self.computed_tokens += len(embeds)
        item.computed += len(embeds)
        return self.prefix_cache.insert(item.prefix, cache_keys, self._token_counts(cache_keys), data)

    def _compute_chunks(self, item: PrefillItem, features: Features) -> None:
        """Chunked prefill of a prompt that is too long for one forward pass, up to its last chunk."""
        size = max(self.max_tokens, MIN_SHARED)
        while item.num_tokens(item.limit) >= size:
            count = max(1, bisect_right(item.ends, item.ends[item.done] + size) - 1 - item.done)
            count = min(count, item.limit)
            item.advance(PrefixMatch(self._compute_node(item, count, features), count))

    def _prefill_rows(self, indices: list[int], items: Sequence[PrefillItem], rows: Sequence[Tensor]) -> PrefillOutput:
        prefixes = [item.prefix for item in items]
        data, last = self.runner.prefill(rows, prefixes, [item.prompt.adapter for item in items])
        self.computed_tokens += sum(map(len, rows))
        lengths = [len(row) for row in rows]
        if not self.runner.shares_prefixes:  # the rows contain their prefixes
            lengths = [length + num_tokens(prefix) for length, prefix in zip(lengths, prefixes, strict=True)]
            prefixes = [()] * len(items)
        return PrefillOutput(indices, data, lengths, prefixes, self.runner.logits(last))

    def _embed(self, prompt: Prompt, features: Features, start: int, stop: int) -> Tensor:
        """Embeddings (L, D) of ids `start` to `stop`. Raises `RequestError` if L is not the number of planned slots."""
        ids = prompt.ids[start:stop]
        first = prompt.ids[:start].count(IMAGE_TOKEN_INDEX)
        images = prompt.images[first : first + ids.count(IMAGE_TOKEN_INDEX)]
        if not images:
            return self.runner.embed(ids)
        embeds: Tensor = self.runner.model.embed_prompt(ids, [features[image.digest] for image in images])
        planned = sum(self._token_counts(prompt.cache_keys[start:stop]))
        if len(embeds) != planned:
            raise RequestError(
                f"The model returned {len(embeds)} embeddings for {planned} token slots ({len(images)} image(s) of "
                f"{self.features.tokens_per_image} tokens each); send images of the model's input size."
            )
        return embeds

    def _batches(self, items: Sequence[PrefillItem], lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices of items to run together: at most `max_tokens` with padding, and of similar length."""
        shares = self.runner.shares_prefixes
        behind = [len(item.prefix) > 0 if shares else num_tokens(item.prefix) for item in items]
        batch: list[int] = []
        for at in sorted(range(len(items)), key=lambda at: (behind[at], lengths[at])):
            if batch and (
                behind[at] != behind[batch[0]]
                or lengths[at] * (len(batch) + 1) > self.max_tokens
                or lengths[at] > 1.5 * lengths[batch[0]] + 32
            ):
                yield batch
                batch = []
            batch.append(at)
        if batch:
            yield batch


def plan_shared_prefixes(items: Sequence[PrefillItem], compute: Callable[[PrefillItem, int], Node]) -> None:
    """Compute the prefixes that at least two of `items` share behind their cached ones, and advance the items.

    `compute(item, count)` returns a node of an item's next `count` cache keys; the item is not a waiting one.
    """
    groups: dict[tuple[tuple[int, int], ...], list[PrefillItem]] = {}
    for item in items:
        groups.setdefault(tuple((id(match.node), match.num_keys) for match in item.prefix), []).append(item)
    for group in groups.values():
        _plan(sorted(group, key=lambda item: item.rest), compute)


def _plan(group: list[PrefillItem], compute: Callable[[PrefillItem, int], Node]) -> None:
    """Plan a group sorted by its remaining cache keys, so that neighbours share the longest prefixes."""
    if len(group) < 2 or all(item.index is None for item in group):
        return
    common = [
        common_prefix_length(left, right) for left, right in pairwise([item.rest[: item.limit] for item in group])
    ]
    count = min(common)
    tokens = group[0].num_tokens(count)
    if tokens >= MIN_SHARED and tokens * (len(group) - 1) >= MIN_SAVED:
        node = compute(next(item for item in group if item.index is not None), count)
        for item in group:
            item.advance(PrefixMatch(node, count))
    part = [group[0]]
    for item, length in zip(group[1:], common, strict=True):
        if length == count:
            _plan(part, compute)
            part = []
        part.append(item)
    _plan(part, compute)
