"""Prefix cache: a radix tree of keys and values by token ids and image hashes, with LRU eviction.

A node holds the keys and values of a run of cache keys (token ids, and one number per image) behind its parent's.
A prompt may use a node up to any of its keys and continue differently, so system prompts, images, questions and earlier
turns of a conversation are all found. Least recently used leaves are evicted first. An evicted node stays alive until
the last sequence that uses it is finished.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from llava.engine.sequence import CacheKeys

MIN_SHARED = 8  # tokens; shorter prefixes cost more in attention than they save


@dataclass(eq=False)
class Node:
    """Keys and values `data` (layers, 2, kv_heads, P, head_dim) of `cache_keys`.

    `ends[i]` is the number of tokens of the first i cache keys. `edge` is its place among the children of `parent`: how
    many of the parent's cache keys it follows, and its first own.
    """

    cache_keys: CacheKeys
    ends: Sequence[int]
    data: Tensor
    parent: Node | None = None
    edge: tuple[int, int] = (0, 0)
    children: dict[tuple[int, int], Node] = field(default_factory=dict)
    in_tree: bool = False

    def __post_init__(self) -> None:
        if self.cache_keys and self.data.shape[-2] != self.ends[-1]:
            raise ValueError(f"{self.data.shape[-2]} tokens of keys and values for {self.ends[-1]} tokens of a prefix")


@dataclass(frozen=True)
class PrefixMatch:
    """The first `num_keys` cache keys of a node."""

    node: Node
    num_keys: int

    @property
    def num_tokens(self) -> int:
        return self.node.ends[self.num_keys]

    @property
    def data(self) -> Tensor:
        """A view (layers, 2, kv_heads, num_tokens, head_dim) of the node's keys and values."""
        return self.node.data[..., : self.num_tokens, :]


Prefix = tuple[PrefixMatch, ...]  # a path from the root


def num_tokens(prefix: Sequence[PrefixMatch]) -> int:
    return sum(match.num_tokens for match in prefix)


class PrefixCache:
    """The radix tree; `budget` limits the bytes of its nodes."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.bytes = self.evictions = 0
        self._root = Node((), (0,), torch.empty(0), in_tree=True)
        self._nodes: OrderedDict[Node, None] = OrderedDict()  # by last use; every node after all of its descendants

    def __len__(self) -> int:
        return len(self._nodes)

    def match(self, cache_keys: CacheKeys, limit: int, *, shortest: int = MIN_SHARED) -> tuple[Prefix, int]:
        """Find the longest cached prefix of `cache_keys[:limit]`; return it and the number of keys it covers.

        Its last match has at least `shortest` tokens.
        """
        prefix: list[PrefixMatch] = []
        node, used, at = self._root, 0, 0
        while at < limit:
            child = node.children.get((used, cache_keys[at]))
            if child is None:
                break
            used = common_prefix_length(child.cache_keys, cache_keys[at:limit])
            prefix.append(PrefixMatch(child, used))
            node, at = child, at + used
        while prefix and prefix[-1].num_tokens < shortest:
            at -= prefix.pop().num_keys
        self._touch(prefix)
        return tuple(prefix), at

    def insert(self, prefix: Prefix, cache_keys: CacheKeys, token_counts: Sequence[int], data: Tensor) -> Node:
        """Return a node of the `cache_keys` behind `prefix`, added to the tree if its parent is there and it fits.

        `cache_keys` start at the root; `data` (layers, 2, kv_heads, tokens, head_dim) is kept, and holds the tokens
        behind `prefix`: pass a tensor that is not part of a much larger one.
        """
        done = sum(match.num_keys for match in prefix)
        node = Node(cache_keys[done:], token_ends(token_counts[done:]), data)
        if not self._attach(prefix, node):
            self.add(cache_keys, token_counts, data, num_tokens(prefix))
        return node

    def add(self, cache_keys: CacheKeys, token_counts: Sequence[int], data: Tensor, first: int) -> None:
        """Store a copy of the part of `cache_keys` not cached yet; `data` holds their tokens from `first` on."""
        prefix, done = self.match(cache_keys, len(cache_keys), shortest=0)
        known = num_tokens(prefix)
        fresh = data[..., max(0, known - first) :, :]
        if known >= first and fresh.shape[-2] >= MIN_SHARED and fresh.nbytes <= self.budget:
            self._attach(prefix, Node(cache_keys[done:], token_ends(token_counts[done:]), fresh.clone()))

    def _attach(self, prefix: Sequence[PrefixMatch], node: Node) -> bool:
        """Add `node` to the tree; false if a sibling starts with the same key, its parent is evicted, or no room is
        left."""
        parent, used = (prefix[-1].node, prefix[-1].num_keys) if prefix else (self._root, 0)
        size, edge = node.data.nbytes, (used, node.cache_keys[0])
        continues = used < len(parent.cache_keys) and parent.cache_keys[used] == node.cache_keys[0]
        if not parent.in_tree or continues or edge in parent.children or size > self.budget:
            return False
        self._touch(prefix)
        ancestors = {match.node for match in prefix}
        while self.bytes + size > self.budget:
            oldest = next(iter(self._nodes))
            if oldest in ancestors:
                return False
            self._evict(oldest)
            self.evictions += 1
        parent.children[edge] = node
        node.parent, node.edge, node.in_tree = parent, edge, True
        self._nodes[node] = None
        self._touch(prefix)
        self.bytes += size
        return True

    def _touch(self, prefix: Sequence[PrefixMatch]) -> None:
        for match in reversed(prefix):
            self._nodes.move_to_end(match.node)

    def clear(self) -> None:
        while self._nodes:
            self._evict(next(iter(self._nodes)))

    def _evict(self, node: Node) -> None:
        assert node.parent is not None and not node.children
        del self._nodes[node]
        del node.parent.children[node.edge]
        node.parent, node.in_tree = None, False  # a sequence that still uses the node must not hold its ancestors
        self.bytes -= node.data.nbytes


def token_ends(token_counts: Sequence[int]) -> tuple[int, ...]:
    """0 and the running sums of `token_counts`."""
    return tuple(accumulate(token_counts, initial=0))


def common_prefix_length(left: Sequence[int], right: Sequence[int]) -> int:
    shorter = min(len(left), len(right))
    if tuple(left[:shorter]) == tuple(right[:shorter]):
        return shorter
    return next(at for at in range(shorter) if left[at] != right[at])
