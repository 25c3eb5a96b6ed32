"""Beginnings of prompts that were computed before: a tree of segments, found by content, within a budget of bytes.

A prompt is a sequence of elements: token ids, and one number a picture (its digest). A segment holds the keys and
values of some elements behind its parent; a prompt may use a segment up to any element and go on differently, so system
prompts, pictures, questions and earlier turns of a chat are all found alike. Least recently used leaves go first.
Whoever uses a segment holds it: what is evicted here lives on until its last row is done, and is then freed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.engine.sequence import Picture

MIN_SHARED = 8  # tokens: shorter pieces cost more in attention than they save

Elements = tuple[int, ...]


@dataclass(eq=False)
class Segment:
    """Keys and values (layers, 2, kv_heads, P, head_dim) of `elements`; the first i of them take `ends[i]` columns."""

    elements: Elements
    ends: tuple[int, ...]
    data: Tensor | None
    parent: Segment | None = None
    key: tuple[int, int] = (0, 0)
    children: dict[tuple[int, int], Segment] = field(default_factory=dict)
    stored: bool = False


@dataclass(frozen=True)
class Span:
    """The first `used` elements of a segment."""

    segment: Segment
    used: int

    @property
    def tokens(self) -> int:
        return self.segment.ends[self.used]

    @property
    def widths(self) -> list[int]:
        """Tokens of each of its elements."""
        ends = self.segment.ends[: self.used + 1]
        return [right - left for left, right in pairwise(ends)]

    @property
    def data(self) -> Tensor:
        """(layers, 2, kv_heads, tokens, head_dim), a view."""
        assert self.segment.data is not None
        return self.segment.data[..., : self.tokens, :]


Chain = tuple[Span, ...]


def tokens_of(chain: Chain) -> int:
    return sum(span.tokens for span in chain)


class PrefixCache:
    """The tree. `budget` bounds the bytes of all segments that can be found."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.bytes = 0
        self._root = Segment((), (0,), None, stored=True)
        self._segments: OrderedDict[Segment, None] = OrderedDict()  # every segment after all of its descendants

    def __len__(self) -> int:
        return len(self._segments)

    def match(self, elements: Elements, limit: int, *, shortest: int = MIN_SHARED) -> tuple[Chain, int]:
        """The longest known beginning of `elements[:limit]`, and how many elements it covers.

        It does not end with a span of less than `shortest` tokens.
        """
        chain: list[Span] = []
        here, used, at = self._root, 0, 0
        while at < limit:
            child = here.children.get((used, elements[at]))
            if child is None:
                break
            used = common_length(child.elements, elements[at:limit])
            chain.append(Span(child, used))
            here, at = child, at + used
        while chain and chain[-1].tokens < shortest:
            at -= chain.pop().used
        self._touch(chain)
        return tuple(chain), at

    def insert(self, behind: Chain, elements: Elements, widths: Sequence[int], data: Tensor) -> Segment:
        """A segment of `elements`, each of `widths` columns, behind `behind`; it can be found if its parent can and it
        fits. `data` becomes the store's: give a tensor that is not part of a larger one.
        """
        segment = Segment(elements, tuple(running_sum(widths)), data)
        if not self._attach(behind, segment):
            before = [element for span in behind for element in span.segment.elements[: span.used]]
            sizes = [width for span in behind for width in span.widths]
            self.add((*before, *elements), [*sizes, *widths], data, tokens_of(behind))
        return segment

    def add(self, elements: Elements, widths: Sequence[int], data: Tensor, first: int) -> None:
        """Store a copy of what is not known of `elements` yet; `data` are their columns from `first` on."""
        chain, done = self.match(elements, len(elements), shortest=0)
        known = tokens_of(chain)
        fresh = data[..., max(0, known - first) :, :]
        if known >= first and fresh.shape[-2] >= MIN_SHARED and fresh.nbytes <= self.budget:
            self._attach(chain, Segment(elements[done:], tuple(running_sum(widths[done:])), fresh.clone()))

    def _attach(self, behind: Sequence[Span], segment: Segment) -> bool:
        """Make `segment` findable; false where another one begins alike, its parent is gone, or it does not fit."""
        assert segment.data is not None
        parent, used = (behind[-1].segment, behind[-1].used) if behind else (self._root, 0)
        size, key = segment.data.nbytes, (used, segment.elements[0])
        continues = used < len(parent.elements) and parent.elements[used] == segment.elements[0]
        if not parent.stored or continues or key in parent.children or size > self.budget:
            return False
        self._touch(behind)
        ancestors = {span.segment for span in behind}
        while self.bytes + size > self.budget:
            oldest = next(iter(self._segments))
            if oldest in ancestors:
                return False  # nothing else is left to evict
            self._evict(oldest)
        parent.children[key] = segment
        segment.parent, segment.key, segment.stored = parent, key, True
        self._segments[segment] = None
        self._touch(behind)
        self.bytes += size
        return True

    def _touch(self, chain: Sequence[Span]) -> None:
        for span in reversed(chain):
            self._segments.move_to_end(span.segment)

    def clear(self) -> None:
        while self._segments:
            self._evict(next(iter(self._segments)))

    def _evict(self, segment: Segment) -> None:
        assert segment.parent is not None and segment.data is not None and not segment.children
        del self._segments[segment]
        del segment.parent.children[segment.key]
        segment.parent, segment.stored = None, False  # whoever still uses it must not hold its ancestors
        self.bytes -= segment.data.nbytes


def running_sum(widths: Sequence[int]) -> list[int]:
    """0 and the sums of the first 1, 2, … widths."""
    sums = [0]
    for width in widths:
        sums.append(sums[-1] + width)
    return sums


def common_length(left: Sequence[int], right: Sequence[int]) -> int:
    """How many first items are equal."""
    shorter = min(len(left), len(right))
    if tuple(left[:shorter]) == tuple(right[:shorter]):
        return shorter
    return next(at for at in range(shorter) if left[at] != right[at])


# --- What a batch of prompts has in common, and so is computed once: the plan of a prefill ----------------------------


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
