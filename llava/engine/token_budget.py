"""Chunked prefill: how much prompt work one step may do beside requests that decode.

A long prompt, and the vision tower of an image, would otherwise stop all running requests for their whole time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from llava.engine.features import FeatureEncoder
from llava.engine.sequence import Sequence as SequenceState
from llava.errors import ConfigError

TokenLimit = int | Literal["auto"] | None

_SHARE: Final = 0.6  # of the time of a decode step, for the prompts of one step: a token then takes 1.6 times as long
_RUNNING_PER_WAITING: Final = 8  # with fewer running requests for each that waits, prompts get more time
_BURST_TOKENS: Final = 8  # requests with at most as many belong to a burst of arrivals, which is prefilled as a batch
_LEAST: Final = {"cpu": 16, "cuda": 128}  # tokens of a chunk; fewer take as long, since all weights are read
_STEPS_BETWEEN_TIMINGS: Final = 32  # after as many steps with prompts, one without is timed; not on the CPU


@dataclass(eq=False)
class StepBudget:
    """Prompt work left in one step, in tokens or seconds; `token` and `layer` are the costs of a prompt token and of a
    tower layer for one image. `least` is the number of tokens of the smallest chunk, 0 for none at all."""

    remaining: float = math.inf
    token: float = 1.0
    layer: float = 1.0
    least: int = 1
    tokens: int = 0  # done
    layers: int = 0

    @property
    def is_limited(self) -> bool:
        return self.remaining < math.inf

    @property
    def spent(self) -> float:
        return self.cost(self.tokens, self.layers)

    def cost(self, tokens: int, layers: int) -> float:
        return tokens * self.token + layers * self.layer

    def spend(self, tokens: int = 0, layers: int = 0) -> None:
        self.tokens += tokens
        self.layers += layers
        self.remaining -= self.cost(tokens, layers)

    def chunk(self, most: int) -> int:
        """Tokens of the next chunk, `most` at most."""
        return min(most, max(self.least, int(self.remaining / self.token))) if self.is_limited else most


class TokenBudget:
    """Limit of the prompt tokens of a step while requests decode.

    `limit` is `max_num_batched_tokens`: the tokens of one step, of which each running request takes one, or None for no
    limit. With "auto" prompts get 0.6 of the time that the decode step takes, and more if fewer than eight requests run
    for each that waits; a burst of arrivals, and as many waiting requests as running ones, are not limited. The costs
    are learned from the times of earlier steps; before, a layer costs `FeatureEncoder.layer_tokens`.
    """

    def __init__(self, limit: TokenLimit, device: str, features: FeatureEncoder) -> None:
        if limit is not None and limit != "auto" and not (isinstance(limit, int) and limit >= 1):
            raise ConfigError(
                f'max_num_batched_tokens (--max-num-batched-tokens) must be at least 1, or "auto", got {limit!r}.'
            )
        self.limit = limit
        self._features = features
        self._least = _LEAST.get(device, 16)
        self._on_host = device == "cpu"  # elsewhere only the whole step can be timed without synchronizing
        self._mixed = 0  # steps with prompts since the last one without
        self._decode = self._token = self._layer = 0.0  # seconds
        self._began = self._between = 0.0

    def begin(self, running: Sequence[SequenceState], waiting: int) -> StepBudget:
        """The budget of a step, given the running and the number of waiting requests."""
        if self.limit == "auto":
            self._began = time.perf_counter()
        if self.limit is None or not running or not waiting:
            return StepBudget()
        if isinstance(self.limit, int):
            return StepBudget(max(1, self.limit - len(running)), layer=self._features.layer_tokens)
        settled = sum(len(sequence.tokens) > _BURST_TOKENS for sequence in running)
        if waiting >= settled:
            return StepBudget()
        if not self._on_host and (not self._decode or self._mixed >= _STEPS_BETWEEN_TIMINGS):
            return StepBudget(0.0, least=0)
        if not self._token:  # nothing has been timed yet
            return StepBudget(self._least, layer=self._features.layer_tokens, least=self._least)
        seconds = self._decode * _SHARE * max(1.0, _RUNNING_PER_WAITING * waiting / settled)
        return StepBudget(seconds, self._token, self._layer, self._least)

    def prefilled(self) -> None:
        """Note the end of the prompts' part of the step."""
        if self.limit == "auto":
            self._between = time.perf_counter()

    def end(self, budget: StepBudget, rows: int) -> None:
        """Learn from a step that decoded `rows`."""
        if self.limit != "auto":
            return
        now = time.perf_counter()
        self._mixed = self._mixed + 1 if budget.spent else 0
        prefill, decode = self._between - self._began, now - self._between
        if not self._on_host:
            prefill, decode = now - self._began - self._decode, now - self._began
        if rows and (self._on_host or not budget.spent):
            self._decode = decode if not self._decode else 0.8 * self._decode + 0.2 * decode
        if not budget.spent or prefill <= 0:
            return
        if not self._token:  # small chunks are less efficient: start low
            self._token = 2 * prefill / (budget.tokens + budget.layers * self._features.layer_tokens)
            self._layer = self._token * self._features.layer_tokens
        elif budget.is_limited and budget.spent >= self._least * self._token:  # else the time is mostly overhead
            ratio = min(2.0, max(0.5, prefill / budget.spent))
            ratio = ratio if ratio > 1 else math.sqrt(ratio)  # grow slowly: a step that is too long is felt
            self._token *= ratio if budget.tokens else 1.0
            self._layer *= ratio if budget.layers else 1.0
