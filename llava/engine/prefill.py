"""Prompts to keys, values and first logits, everything that prompts have in common computed once.

What the store knows of a prompt is taken from there; what several prompts of the batch, or of those waiting behind it,
begin with is computed once and stored; the rest runs in batches of rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.engine.features import FeatureEncoder
from llava.engine.model_runner import LanguageModel
from llava.engine.prefix_cache import (
    MIN_SHARED,
    Chain,
    Elements,
    PrefixCache,
    Prompt,
    Segment,
    Span,
    Work,
    common_length,
    is_picture,
    running_sum,
    share,
    tokens_of,
)

__all__ = ["Prefilled", "Prefiller", "Prompt"]

Features = dict[bytes, Tensor]


@dataclass(frozen=True)
class Prefilled:
    """Some of the prompts, by number: keys and values of their rows, the rows' own lengths, what they stand behind,
    and logits (n, V) of their first new token."""

    indices: list[int]
    data: Tensor
    lengths: list[int]
    chains: list[Chain]
    logits: Tensor


class Prefiller:
    """Runs prompts through the model, see the module's docstring. `max_tokens` bounds one forward."""

    def __init__(self, lm: LanguageModel, features: FeatureEncoder, *, max_tokens: int, prefix_budget: int) -> None:
        self.lm = lm
        self.features = features
        self.max_tokens = max_tokens
        self.prefixes = PrefixCache(prefix_budget)
        self.computed_tokens = 0
        self.shared_tokens = 0

    def run(self, prompts: Sequence[Prompt], expected: Sequence[Prompt] = ()) -> Iterator[Prefilled]:
        """Prefill `prompts`, yielding them in groups. `expected` are waiting: what they share is kept for them."""
        works = [self._open(index, prompt) for index, prompt in enumerate(prompts)]
        features = self.features.encode(picture for work in works for picture in work.pictures)
        waiting = [self._open(None, prompt) for prompt in expected]
        share([*works, *waiting], lambda work, count: self._segment(work, count, features))
        for work in works:
            self._chunk(work, features)
            self.shared_tokens += tokens_of(work.chain)
        rows = [self._embed(work.prompt, features, work.done, len(work.prompt.ids)) for work in works]
        for batch in self._batches(works, [len(row) for row in rows]):
            yield self._rows([works[at] for at in batch], [rows[at] for at in batch])

    def new_tokens(self, prompt: Prompt, before: Prompt | None) -> int:
        """How many tokens of `prompt` are known neither from the store nor from `before`, computed just before it."""
        work = self._open(None, prompt)
        same = 0 if before is None else common_length(before.elements, prompt.elements)
        return work.ends[-1] - work.ends[max(work.done, same)]

    def keep(self, prompt: Prompt, tokens: Sequence[int], chain: Chain, own: Tensor) -> None:
        """Store what a finished row computed, for the next turn of its conversation.

        `own` (layers, 2, kv_heads, length, head_dim) are the row's columns behind `chain`; `tokens` the generated ones
        that have keys and values.
        """
        elements = prompt.elements + tuple(tokens)
        self.prefixes.add(elements, self._widths(elements), own, tokens_of(chain) if self.lm.shares else 0)

    def embed(self, prompt: Prompt) -> Tensor:
        """The whole prompt as embeddings (L, D), its pictures encoded as needed."""
        return self._embed(prompt, self.features.encode(prompt.pictures), 0, len(prompt.ids))

    def _open(self, index: int | None, prompt: Prompt) -> Work:
        chain, done = self.prefixes.match(prompt.elements, len(prompt.elements) - 1)
        return Work(index, prompt, tuple(running_sum(self._widths(prompt.elements))), chain, done)

    def _widths(self, elements: Elements) -> list[int]:
        """Tokens of each element."""
        return [self.features.tokens_per_image if is_picture(element) else 1 for element in elements]

    def _segment(self, work: Work, count: int, features: Features) -> Segment:
        """The next `count` elements of `work`, computed and stored."""
        embeds = self._embed(work.prompt, features, work.done, work.done + count)
        data = self.lm.prefill_segment(embeds, work.chain)
        self.computed_tokens += len(embeds)
        elements = work.rest[:count]
        return self.prefixes.insert(work.chain, elements, self._widths(elements), data)

    def _chunk(self, work: Work, features: Features) -> None:
        """Compute a prompt that is too long for one forward piece by piece, up to its last piece."""
        size = max(self.max_tokens, MIN_SHARED)
        while work.tokens(work.limit) >= size:
            count = max(1, bisect_right(work.ends, work.ends[work.done] + size) - 1 - work.done)
            work.advance(Span(self._segment(work, min(count, work.limit), features), min(count, work.limit)))

    def _rows(self, works: Sequence[Work], rows: Sequence[Tensor]) -> Prefilled:
        chains = [work.chain for work in works]
        data, last = self.lm.prefill(rows, chains)
        self.computed_tokens += sum(map(len, rows))
        lengths = [len(row) + (0 if self.lm.shares else tokens_of(chain)) for row, chain in zip(rows, chains)]
        held: list[Chain] = chains if self.lm.shares else [()] * len(works)
        return Prefilled([work.number for work in works], data, lengths, held, self.lm.logits(last))

    def _embed(self, prompt: Prompt, features: Features, start: int, stop: int) -> Tensor:
        """(L, D) of ids `start` to `stop`, pictures in place."""
        ids = prompt.ids[start:stop]
        first = prompt.ids[:start].count(IMAGE_TOKEN_INDEX)
        pictures = prompt.pictures[first : first + ids.count(IMAGE_TOKEN_INDEX)]
        if not pictures:
            return self.lm.embed(ids)
        embeddings: Tensor = self.lm.model.embed_prompt(ids, [features[picture.digest] for picture in pictures])
        return embeddings

    def _batches(self, works: Sequence[Work], lengths: Sequence[int]) -> Iterator[list[int]]:
        """Numbers of works to run together: at most `max_tokens` with padding, and not too different in length."""
        behind = [tokens_of(work.chain) if not self.lm.shares else len(work.chain) > 0 for work in works]
        batch: list[int] = []
        for at in sorted(range(len(works)), key=lambda at: (behind[at], lengths[at])):
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
