"""What a batch of prompts has in common, and so is computed once: the plan of a prefill."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from llava.constants import IMAGE_TOKEN_INDEX
from llava.engine.pictures import Picture
from llava.engine.prefixes import MIN_SHARED, Chain, Elements, Segment, Span, common_length

MIN_SAVED = 64  # tokens that sharing must save: a segment has a price at every later step
_PICTURE = 2**40  # above every token id


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt; `ids` hold -200 per picture."""

    ids: tuple[int, ...]
    pictures: tuple[Picture, ...]

    @cached_property
    def elements(self) -> Elements:
        """The ids, every picture as a number of its own."""
        if not self.pictures:
            return self.ids
        numbers = iter([_PICTURE + int.from_bytes(picture.digest, "big") for picture in self.pictures])
        return tuple(next(numbers) if token == IMAGE_TOKEN_INDEX else token for token in self.ids)


@dataclass(eq=False)
class Work:
    """A prompt on its way through a prefill: `done` elements are covered by `chain`.

    `index` is its number in the batch, None for one that waits and only counts as a reason to share. `ends[i]` tokens
    are taken by the first i elements.
    """

    index: int | None
    prompt: Prompt
    ends: tuple[int, ...]
    chain: Chain = ()
    done: int = 0

    @property
    def number(self) -> int:
        """Its number in the batch; only for those that are in it."""
        assert self.index is not None
        return self.index

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Those not covered by the chain."""
        return self.prompt.pictures[self.prompt.ids[: self.done].count(IMAGE_TOKEN_INDEX) :]

    @property
    def rest(self) -> Elements:
        return self.prompt.elements[self.done :]

    @property
    def limit(self) -> int:
        """Elements that may be shared from here on: the last one must be computed to have logits."""
        return len(self.prompt.elements) - 1 - self.done

    def tokens(self, count: int) -> int:
        """How many tokens the next `count` elements take."""
        return self.ends[self.done + count] - self.ends[self.done]

    def advance(self, span: Span) -> None:
        self.chain = (*self.chain, span)
        self.done += span.used


def is_picture(element: int) -> bool:
    return element >= _PICTURE


def share(works: Sequence[Work], compute: Callable[[Work, int], Segment]) -> None:
    """Compute what at least two of `works` have in common behind their chains, and advance all of them past it.

    `compute(work, count)` makes a segment of a work's next `count` elements.
    """
    groups: dict[tuple[tuple[int, int], ...], list[Work]] = {}
    for work in works:
        groups.setdefault(tuple((id(span.segment), span.used) for span in work.chain), []).append(work)
    for group in groups.values():
        _share(sorted(group, key=lambda work: work.rest), compute)


def _share(group: list[Work], compute: Callable[[Work, int], Segment]) -> None:
    """`group` is sorted by what is left, so neighbours are those with most in common."""
    if len(group) < 2 or all(work.index is None for work in group):
        return
    rests = [work.rest[: work.limit] for work in group]
    common = [common_length(left, right) for left, right in pairwise(rests)]
    count = min(common)
    tokens = group[0].tokens(count)
    if tokens >= MIN_SHARED and tokens * (len(group) - 1) >= MIN_SAVED:
        segment = compute(group[0], count)
        for work in group:
            work.advance(Span(segment, count))
    for part in _split(group, [length == count for length in common]):
        _share(part, compute)


def _split(group: list[Work], cuts: Sequence[bool]) -> Iterator[list[Work]]:
    """Parts of `group`, cut behind the members whose entry in `cuts` is true."""
    part = [group[0]]
    for work, cut in zip(group[1:], cuts, strict=True):
        if cut:
            yield part
            part = []
        part.append(work)
    yield part
