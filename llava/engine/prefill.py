"""Prefill: prompts to keys, values and first logits, with common prefixes computed once.

Cached prefixes come from the prefix cache. Prefixes that several prompts of the batch, or of those waiting, have in
common are computed once and cached. The remaining tokens run in batches of rows, or one prompt in chunks over several
steps (Agrawal et al., "Sarathi-Serve", 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
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
from llava.engine.token_budget import StepBudget
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


@dataclass(eq=False)
class ChunkedPrefill:
    """A prompt between two steps of its prefill: first its images are encoded, then its tokens run in chunks.

    `embeds` (L, D) are the tokens behind the cached prefix of `item`. `node` holds their keys and values, of which
    `filled` tokens are computed.
    """

    item: PrefillItem
    encoding: Generator[None, None, Features] | None
    embeds: Tensor | None = None
    node: Node | None = None
    filled: int = 0

    @property
    def prefix(self) -> Prefix:
        """The cached prefix and the computed tokens."""
        return (*self.item.prefix, PrefixMatch(self.node, self.filled)) if self.node else self.item.prefix


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
        self.chunks = 0  # of prompts that take several passes

    def run(self, prompts: Sequence[Prompt], waiting: Sequence[Prompt] = ()) -> Iterator[PrefillOutput]:
        """Prefill `prompts` and yield them in groups. Prefixes they share with `waiting` prompts are cached."""
        items = [self._item(index, prompt) for index, prompt in enumerate(prompts)]
        features = self._encode(image for item in items for image in item.images)
        later = [self._item(None, prompt) for prompt in waiting]
        plan_shared_prefixes([*items, *later], lambda item, count: self._compute_node(item, count, features))
        whole = []
        for item in items:
            if item.num_tokens(item.limit) < max(self.max_tokens, MIN_SHARED):
                self._count(item)
                whole.append(item)
                continue
            embeds = self._embed(item.prompt, features, item.done)
            output = self.advance(ChunkedPrefill(item, None, embeds), StepBudget())
            assert output is not None
            yield output
        rows = [self._embed(item.prompt, features, item.done) for item in whole]
        for batch in self._batches(whole, [len(row) for row in rows]):
            yield self._prefill_rows([whole[at] for at in batch], [rows[at] for at in batch])

    def begin(self, prompt: Prompt) -> ChunkedPrefill:
        """Start the prefill of a prompt that `advance` continues."""
        item = self._item(0, prompt)
        return ChunkedPrefill(item, self.features.encode_by_layer(item.images))

    def advance(self, chunked: ChunkedPrefill, budget: StepBudget) -> PrefillOutput | None:
        """Continue a prefill within `budget`; the output once it is complete.

        Its keys and values become one node of the prefix cache, without the last cache key.
        """
        if chunked.encoding is not None and not self._encode_layers(chunked, budget):
            return None
        embeds, most = chunked.embeds, max(self.max_tokens, MIN_SHARED)
        assert embeds is not None
        while count := budget.chunk(min(len(embeds) - chunked.filled, most)):
            budget.spend(tokens=count)
            end = chunked.filled + count
            rest = embeds[chunked.filled : end]
            self.chunks += count < len(embeds)
            if end == len(embeds):
                return self._finish(chunked, rest)
            data = self.runner.prefill_kv(rest, chunked.prefix, chunked.item.prompt.adapter)
            if chunked.node is None:  # each token counts as a cache key, so that a chunk may end within an image
                whole = self.runner.spec.empty(1, len(embeds))[:, :, 0]
                chunked.node = Node((), range(len(embeds) + 1), whole)
            chunked.node.data[..., chunked.filled : end, :] = data
            chunked.filled = end
            if budget.is_limited:
                break
        return None

    def new_work(self, prompt: Prompt, previous: Prompt | None) -> tuple[int, int]:
        """Tokens of `prompt` that are neither cached nor shared with `previous`, which is prefilled just before, and
        the layers of the tower to run for its images."""
        item = self._item(None, prompt)
        shared = 0 if previous is None else common_prefix_length(previous.cache_keys, prompt.cache_keys)
        tokens = item.ends[-1] - item.ends[max(item.done, shared)]
        known = set() if previous is None else {image.digest for image in previous.images}
        images = [image for image in item.images if image.digest not in known]
        return tokens, self.features.missing(images) * self.features.layers if images else 0

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
        embeds = self._embed(prompt, self._encode(prompt.images), 0)
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

    def _encode_layers(self, chunked: ChunkedPrefill, budget: StepBudget) -> bool:
        """Encode the images of a prompt layer by layer; true if all are encoded and a chunk fits into the budget."""
        assert chunked.encoding is not None
        with self.clock.measure("tower"):
            done = 0
            while budget.least and (not done or budget.remaining >= budget.layer):
                try:
                    next(chunked.encoding)
                except StopIteration as stop:
                    chunked.encoding = None
                    chunked.embeds = self._embed(chunked.item.prompt, stop.value, chunked.item.done)
                    return not done or budget.remaining >= budget.least * budget.token
                done += 1
                budget.spend(layers=1)
        return False

    def _finish(self, chunked: ChunkedPrefill, rest: Tensor) -> PrefillOutput:
        """Prefill the last chunk `rest`; all but the last cache key of the prompt become a node of the prefix cache."""
        item, node, keys = chunked.item, chunked.node, chunked.item.prompt.cache_keys
        self._count(item)
        if node is None:
            return self._prefill_rows([item], [rest])
        data, last = self.runner.prefill([rest], [chunked.prefix], [item.prompt.adapter])
        node.data[..., chunked.filled :, :] = data[:, :, 0, :, -len(rest) :]
        total, first = len(node.ends) - 1, item.num_tokens(item.limit)
        self.computed_tokens += total
        prefix = item.prefix
        if item.limit:  # else the prompt ends with an image behind a cached prefix
            counts = self._token_counts(keys[:-1])
            known = self.prefix_cache.insert(item.prefix, keys[:-1], counts, node.data[..., :first, :])
            prefix = (*prefix, PrefixMatch(known, item.limit))
        logits, indices = self.runner.logits(last), [item.index or 0]
        if not self.runner.shares_prefixes:
            return PrefillOutput(indices, data, [data.shape[-2]], [()], logits)
        if not self.runner.reads_prefix_per_row:
            prefix, first = item.prefix, 0
        return PrefillOutput(indices, node.data[:, :, None, :, first:], [total - first], [prefix], logits)

    def _prefill_rows(self, items: Sequence[PrefillItem], rows: Sequence[Tensor]) -> PrefillOutput:
        prefixes = [item.prefix for item in items]
        data, last = self.runner.prefill(rows, prefixes, [item.prompt.adapter for item in items])
        self.computed_tokens += sum(map(len, rows))
        lengths = [len(row) for row in rows]
        if not self.runner.shares_prefixes:  # the rows contain their prefixes
            lengths = [length + num_tokens(prefix) for length, prefix in zip(lengths, prefixes, strict=True)]
            prefixes = [()] * len(items)
        indices = [item.index for item in items if item.index is not None]
        return PrefillOutput(indices, data, lengths, prefixes, self.runner.logits(last))

    def _embed(self, prompt: Prompt, features: Features, start: int, stop: int | None = None) -> Tensor:
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
