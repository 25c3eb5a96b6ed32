"""Next-token sampling: greedy, or temperature, top-k, top-p and min-p with one random generator per request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from llava.engine.guided import Guide
from llava.engine.logits import TokenTable, adjust_logits, mask_logits, table_columns
from llava.engine.sequence import SamplingParams
from llava.engine.sequence import Sequence as SequenceState
from llava.model.transfer import Numbers, upload_columns

_TABLE_COLUMNS: Final = 5
NO_TOKEN: Final = -1  # sampled from logits that are not finite
_MIN_TEMPERATURE: Final = 1e-6  # a float32 logit divided by less may overflow


def make_generator(params: SamplingParams) -> torch.Generator | None:
    """A CPU generator for a sampled request (seeded by the system if `seed` is None), None for a greedy one.

    With one generator per request, the other requests in the batch do not change its draws.
    """
    if params.temperature == 0.0:
        return None
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return generator


class Sampler:
    """Sampler of the next token of every row of one step.

    On CUDA all rows are sampled together and the logits stay on the GPU: each request's generator draws one number,
    and `host_params` returns the values to upload, ideally in the step's single copy (`upload_columns`). On other
    devices the sampled rows are processed one by one on the CPU. The same seed draws different tokens in the two ways.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams],
        generators: Sequence[torch.Generator | None],
        tables: Sequence[TokenTable | None] = (),
        guides: Sequence[Guide | None] = (),
    ) -> None:
        self.params = params
        self.generators = generators
        self.tables = tables if any(tables) else ()  # empty before the first token if only generated tokens count
        self.guides = guides if any(guide is not None for guide in guides) else ()
        self._device_params: Sequence[Tensor] = ()

    @classmethod
    def of(cls, rows: Sequence[SequenceState]) -> Sampler:
        """The sampler of running sequences."""
        columns = zip(*((row.params, row.generator, row.table, row.guide) for row in rows), strict=True)
        return cls(*map(list, columns))

    @property
    def is_greedy(self) -> bool:
        return all(generator is None for generator in self.generators)

    @property
    def num_logprobs(self) -> int | None:
        """Number of most probable tokens to report, the maximum of the rows; None if no row requests any."""
        return max((one.logprobs for one in self.params if one.logprobs is not None), default=None)

    def host_params(self) -> list[Numbers]:
        """Values of every row to upload; empty if all rows are greedy and no logits change.

        Temperature (0: greedy), top_p and a uniform draw in [0, 1) if a row is sampled, with top_k and min_p if a row
        has one of them; then the columns of `adjust_logits`.
        """
        columns: list[Numbers] = []
        if not self.is_greedy:
            draws = [0.0 if one is None else float(torch.rand((), generator=one)) for one in self.generators]
            columns = [
                [float(one.temperature) for one in self.params],
                [float(one.top_p) for one in self.params],
                draws,
            ]
            if any(one.top_k or one.min_p for one in self.params):
                columns += [[one.top_k for one in self.params], [float(one.min_p) for one in self.params]]
        return [*columns, *table_columns(self.tables)]

    def set_device_params(self, params: Sequence[Tensor]) -> None:
        """Set the uploaded `host_params`: tensors (B,) and (n,)."""
        self._device_params = params

    def sample(self, logits: Tensor) -> Tensor:
        """Sample tokens (B,) int64 from logits (B, V), on their device; `NO_TOKEN` if the largest is not finite."""
        on_device: list[Tensor] = []
        if logits.is_cuda:
            params = self._device_params or upload_columns(self.host_params(), logits.device)
            on_device = [one.to(logits.device, non_blocking=True) for one in params]
        logits = self._process(logits, on_device)
        best = argmax(logits)
        finite = logits.gather(-1, best.unsqueeze(-1)).squeeze(-1).isfinite()
        tokens = best
        if not self.is_greedy and logits.is_cuda:
            sampled = on_device[: len(on_device) - _TABLE_COLUMNS * bool(self.tables)]
            tokens = torch.where(sampled[0] > 0, sample_top_p(logits, *sampled), best)
        elif not self.is_greedy:
            rows = zip(best.tolist(), finite.tolist(), logits.cpu(), self.params, self.generators, strict=True)
            tokens = torch.tensor(
                [
                    token if generator is None or not is_finite else _draw(row, params, generator)
                    for token, is_finite, row, params, generator in rows
                ],
                device=logits.device,
            )
        return tokens.masked_fill_(~finite, NO_TOKEN)

    def _process(self, logits: Tensor, on_device: Sequence[Tensor]) -> Tensor:
        """`logits` with biases, penalties and grammar masks: a float32 copy, or unchanged if no row has any."""
        if not self.tables and not self.guides:
            return logits
        logits = logits.to(torch.float32, copy=True)
        if self.tables:
            columns = on_device[-_TABLE_COLUMNS:] or upload_columns(table_columns(self.tables), logits.device)
            adjust_logits(logits, *columns)
        if self.guides:
            mask_logits(logits, self.guides)
        return logits


def argmax(logits: Tensor) -> Tensor:
    """Index (B,) of the first largest logit of each row (B, V); NaN counts as the largest."""
    if logits.device.type == "cpu":  # NumPy's is vectorized
        return torch.from_numpy(logits.detach().float().numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def sample_top_p(
    logits: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    draws: Tensor,
    top_k: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Tensor:
    """Sample one token (B,) per row of `logits` (B, V) by inverse transform sampling, on the device.

    `temperature`, `top_p`, `min_p` and `draws` (uniform in [0, 1)) are (B,) float32; `top_k` (0: off) is (B,) integer.
    """
    probabilities = torch.softmax(logits.float() / temperature.clamp(min=_MIN_TEMPERATURE).unsqueeze(-1), dim=-1)
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    filtered: Tensor | None = None
    if top_k is not None and min_p is not None:
        size = ordered.shape[-1]
        last = torch.where(top_k > 0, top_k, size).clamp(max=size).long() - 1
        filtered = ordered < ordered.gather(-1, last.unsqueeze(-1))  # tokens as probable as the last one are kept
        ordered = ordered.masked_fill(filtered, 0.0)
        ordered = ordered / ordered.sum(-1, keepdim=True)
        filtered = filtered | (ordered < min_p.unsqueeze(-1) * ordered[:, :1])
    before = ordered.cumsum(-1) - ordered  # mass of the strictly more probable tokens
    outside = (before >= top_p.unsqueeze(-1)) & (top_p < 1.0).unsqueeze(-1)
    outside = outside if filtered is None else outside | filtered
    mass = ordered.masked_fill(outside, 0.0).cumsum(-1)  # (B, V)
    at = torch.searchsorted(mass, draws.unsqueeze(-1) * mass[:, -1:], right=True)
    # Rounding may lift a draw past the last token of the set, and NaN is past the end.
    at = torch.minimum(at, (~outside).sum(-1, keepdim=True) - 1)
    return order.gather(-1, at).squeeze(-1)


def _draw(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Sample a token from `logits` (V,) on the CPU: the token that `torch.multinomial` draws with the same seed.

    `multinomial` divides every probability by an exponential variate and takes the largest quotient. The generator
    draws one value per vocabulary entry, but only the candidates' need the logarithm, which takes most of the time.
    """
    if 0 < params.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(params.top_k).values[-1], -torch.inf)
    tokens, probabilities = top_p_candidates(logits, params.temperature, params.top_p)
    if params.min_p > 0.0 or params.guided_decoding is not None:  # few tokens remain
        inside = (probabilities > 0) & (probabilities >= params.min_p * probabilities.max())
        tokens, probabilities = tokens[inside], probabilities[inside]
    uniform = torch.rand(len(logits), dtype=torch.float64, generator=generator)
    exponential = torch.log1p(-uniform[tokens]).neg_().float()
    return int(tokens[(probabilities / exponential).argmax()])


def top_p_candidates(logits: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Ids and probabilities (K,) of the smallest set of tokens whose softmax(logits / temperature) sums to `top_p`.

    The set contains at least one token (Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020).
    """
    probabilities = torch.softmax(logits.float() / max(temperature, _MIN_TEMPERATURE), dim=-1)  # (V,)
    if top_p >= 1.0:
        return torch.arange(len(probabilities)), probabilities
    # Tokens below (1 - top_p) / V weigh less than 1 - top_p together, so they are outside the set and need no sorting;
    # half of that leaves room for rounding.
    candidates = (probabilities >= 0.5 * (1.0 - top_p) / len(probabilities)).nonzero().squeeze(-1)
    ordered, order = probabilities[candidates].sort(descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered  # mass of the strictly more probable tokens
    inside = before < top_p
    return candidates[order[inside]], ordered[inside]
