"""Requests, completions, and the state of a sequence inside the engine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections import abc, deque
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral, Real
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import torch
from PIL import Image

from llava.constants import IMAGE_TOKEN_INDEX
from llava.engine.detokenizer import Detokenizer, TextStream
from llava.errors import RequestError
from llava.images import to_rgb

if TYPE_CHECKING:
    from llava.engine.guided import Guide
    from llava.engine.logits import TokenTable

ImageInput = Image.Image | torch.Tensor
FinishReason = Literal["stop", "length", "cancelled", "error"]
CacheKeys = tuple[int, ...]

GUIDE_FAILED: Final = "The structure of the answer is too complex; simplify the schema or expression: "
_NOT_FINITE: Final = "The model computed NaN or infinity for this request; try another dtype, such as bfloat16."
_MAX_LOGPROBS: Final = 20
_PUBLISHED: Final = ("max_new_tokens", "temperature", "top_p", "seed", "stop", "num_beams")
_IMAGE_KEY: Final = 2**40  # cache keys of images start here, above every token id
_ADAPTER_KEY: Final = 2**130  # above the cache keys of images
_PENALTIES: Final = ("presence_penalty", "frequency_penalty", "repetition_penalty")
_TYPES: Final[tuple[tuple[type, str, tuple[str, ...]], ...]] = (
    (Integral, "an integer", ("max_new_tokens", "num_beams", "seed", "top_k", "logprobs")),
    (Real, "a number", ("temperature", "top_p", "min_p", *_PENALTIES)),
)


@dataclass(frozen=True)
class HashedImage:
    """An image with the hash of its content; images with equal digests have equal features.

    `size` is the width and height before preprocessing, where it is known. `projector` is the number of a LoRA adapter
    with its own projector, else 0.
    """

    digest: bytes
    content: ImageInput
    size: tuple[int, int] | None = None
    projector: int = 0

    def projected_by(self, projector: int) -> HashedImage:
        """The image with the projector of another adapter, and a digest of both."""
        own = hashlib.blake2b(self.digest, digest_size=16, salt=projector.to_bytes(8, "big")).digest()
        return dataclasses.replace(self, digest=own, projector=projector)


def hash_image(image: ImageInput | HashedImage) -> HashedImage:
    """Hash an image: its size or dtype and every pixel, of a PIL image in RGB. A `HashedImage` is returned as it is.

    Raises `RequestError` for anything but a PIL image or a tensor (3, S, S), and `ImageError` for a damaged image.
    """
    if isinstance(image, HashedImage):
        return image
    if not isinstance(image, Image.Image) and not (isinstance(image, torch.Tensor) and image.shape[:-2] == (3,)):
        found = f"a tensor {tuple(image.shape)}" if isinstance(image, torch.Tensor) else type(image).__name__
        raise RequestError(
            f"An image of the request is {found}; give a PIL image (llava.images.open_image opens a file) or a "
            "preprocessed tensor (3, S, S)."
        )
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(image, Image.Image):
        image = to_rgb(image)
        digest.update(f"RGB {image.size}".encode())
        digest.update(image.tobytes())
    else:
        digest.update(f"{image.dtype} {tuple(image.shape)}".encode())
        digest.update(image.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return HashedImage(digest.digest(), image)


@dataclass(frozen=True)
class GuidedDecodingParams:
    """Structure of an answer: a JSON schema, a regular expression that it matches as a whole, or a list of choices.

    Give exactly one. Needs the package llguidance (`pip install llava[serve]`). Raises `RequestError`.
    """

    json: str | abc.Mapping[str, object] | None = None
    regex: str | None = None
    choice: abc.Sequence[str] | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("json", "regex", "choice") if getattr(self, name) is not None]
        if len(given) != 1:
            raise RequestError(
                f"guided_decoding takes one of json, regex and choice, got {' and '.join(given) or 'none'}."
            )
        texts = () if isinstance(self.choice, str) else self.choice
        if texts is not None and not (texts and all(isinstance(text, str) and text for text in texts)):
            raise RequestError(f"choice must be a list of texts that are not empty, got {self.choice!r}.")
        if not isinstance(self.regex, (str, type(None))):
            raise RequestError(f"regex must be a string, got {self.regex!r}.")

    @property
    def name(self) -> str:
        return "JSON schema" if self.json is not None else "regular expression" if self.regex is not None else "choice"

    @property
    def source(self) -> tuple[str, str]:
        """The kind of the structure, and its text."""
        if self.regex is not None:
            return "regex", self.regex
        if self.choice is not None:
            return "choice", json.dumps(list(self.choice))
        try:
            schema = json.loads(self.json) if isinstance(self.json, str) else self.json
            if not isinstance(schema, (abc.Mapping, bool)):
                raise ValueError("it is not an object")
            return "json", json.dumps(schema)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"The JSON schema cannot be used: {error}.") from error


@dataclass(frozen=True)
class SamplingParams:
    """Decoding parameters of one request.

    A `temperature` of 0 decodes greedily. A `seed` makes a sampled answer reproducible, independent of the other
    requests in the batch. `num_beams` above 1 runs beam search outside the batch and streams only the final text.

    `top_k` (0: off), then `top_p`, then `min_p` (relative to the most probable token) limit the tokens to sample from.
    `presence_penalty` and `frequency_penalty` lower the logits of generated tokens, `repetition_penalty` divides those
    of tokens in the prompt or answer (multiplies negative ones); `logit_bias` is added first, by token id. `logprobs`
    returns the log probability of each token and of that many of the most probable ones, from the logits before all
    of these. `guided_decoding` restricts the answer to a structure.
    Raises `RequestError` for a value out of range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    num_beams: int = 1
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: abc.Mapping[int, float] = field(default_factory=dict, hash=False)
    logprobs: int | None = None
    guided_decoding: GuidedDecodingParams | None = None

    def __post_init__(self) -> None:
        for kind, wanted, names in _TYPES:
            for name in names:
                value = getattr(self, name)
                if not isinstance(value, kind) and not (name in ("seed", "logprobs") and value is None):
                    raise RequestError(f"{name} must be {wanted}, got {value!r}.")
        stop: object = self.stop
        if not isinstance(stop, (tuple, list)) or not all(isinstance(text, str) for text in stop):
            raise RequestError(f"stop must be a tuple of strings, got {stop!r}.")
        for name in ("max_new_tokens", "num_beams"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not (math.isfinite(self.temperature) and 0.0 <= self.temperature <= 100.0):
            raise RequestError(f"temperature must be in [0, 100] (0 decodes greedily), got {self.temperature}.")
        if not 0.0 < self.top_p <= 1.0:  # also refuses NaN
            raise RequestError(f"top_p must be in (0, 1], got {self.top_p}.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise RequestError(f"seed must be in [0, 2^63), got {self.seed}.")
        self._check_logits()

    def _check_logits(self) -> None:
        """Check the parameters that change or report logits."""
        if self.top_k < 0:
            raise RequestError(f"top_k must be at least 0 (0 is off), got {self.top_k}.")
        if not 0.0 <= self.min_p <= 1.0:
            raise RequestError(f"min_p must be in [0, 1], got {self.min_p}.")
        for name in _PENALTIES[:2]:
            if not -2.0 <= getattr(self, name) <= 2.0:
                raise RequestError(f"{name} must be in [-2, 2], got {getattr(self, name)}.")
        if not 0.0 < self.repetition_penalty <= 10.0:
            raise RequestError(f"repetition_penalty must be in (0, 10], got {self.repetition_penalty}.")
        if self.logprobs is not None and not 0 <= self.logprobs <= _MAX_LOGPROBS:
            raise RequestError(f"logprobs must be in [0, {_MAX_LOGPROBS}], got {self.logprobs}.")
        if not isinstance(self.logit_bias, abc.Mapping):
            raise RequestError(f"logit_bias must map token ids to numbers, got {self.logit_bias!r}.")
        if not isinstance(self.guided_decoding, (GuidedDecodingParams, type(None))):
            raise RequestError(f"guided_decoding must be GuidedDecodingParams, got {self.guided_decoding!r}.")
        biases: list[tuple[object, object]] = [*self.logit_bias.items()]
        for token, bias in biases:
            if not isinstance(token, Integral) or not isinstance(bias, Real) or not abs(float(bias)) <= 100.0:
                raise RequestError(f"logit_bias must map token ids to numbers in [-100, 100], got {token!r}: {bias!r}.")
        if self.num_beams > 1 and (extra := set(self.as_dict()) - set(_PUBLISHED)):
            raise RequestError(f"num_beams above 1 cannot be combined with {', '.join(sorted(extra))}.")

    def as_dict(self) -> dict[str, object]:
        """The parameters to record beside answers: the published ones, and others that differ from their defaults.

        This keeps records of versions with fewer parameters comparable.
        """
        values, defaults = dataclasses.asdict(self), {one.name: one.default for one in dataclasses.fields(self)}
        defaults["logit_bias"] = {}
        return {name: value for name, value in values.items() if name in _PUBLISHED or value != defaults[name]}


GREEDY = SamplingParams()


class TokenLogprobs(NamedTuple):
    """Log probability of a generated token, and those of the most probable tokens at its position, with ids."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Request:
    """A rendered prompt with one `<image>` per image, or its token ids with -200 per image, and sampling parameters.

    Control tokens are recognized in a string, except in the text of a `RenderedPrompt` (`Conversation.get_prompt`).
    An image is a PIL image, which the engine preprocesses, a preprocessed float tensor (3, S, S), or a `HashedImage`
    of either. With `cache_prefix` the prompt and its answer are stored in the prefix cache, for the next turn of the
    conversation. Without `strip` the answer keeps white space at both ends and the space before its first word. `lora`
    is the name of an adapter of the engine, None for its base.
    """

    prompt: str | abc.Sequence[int]
    images: abc.Sequence[ImageInput | HashedImage] = ()
    params: SamplingParams = GREEDY
    cache_prefix: bool = True
    strip: bool = True
    lora: str | None = None


@dataclass(frozen=True)
class Completion:
    """The answer to a request.

    `text` contains no special tokens, ends before the first stop string, and is stripped. `token_ids` are the new
    tokens as generated, including the end token; `prompt_tokens` counts image tokens. `logprobs`, if requested, are
    those of the new tokens without the end token.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    error: str | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(eq=False)
class RequestHandle:
    """A submitted request. Iterate it for text as it is generated, or call `result()`; both drive the engine."""

    drive: abc.Callable[[], bool]
    prompt_tokens: int
    completion: Completion | None = None
    cancelled: bool = False
    _pieces: deque[str] = field(default_factory=deque)
    _logprobs: deque[TokenLogprobs] = field(default_factory=deque)

    @property
    def done(self) -> bool:
        return self.completion is not None

    def cancel(self) -> None:
        """Stop this request at the engine's next step; its completion holds the tokens generated so far."""
        self.cancelled = True

    def push(self, text: str, logprobs: TokenLogprobs | None = None) -> None:
        """Add generated text and the log probabilities of a token; called by the engine."""
        if text:
            self._pieces.append(text)
        if logprobs is not None:
            self._logprobs.append(logprobs)

    def take(self) -> str:
        """Return the text generated since the last call, without driving the engine."""
        pieces = []
        while self._pieces:
            pieces.append(self._pieces.popleft())
        return "".join(pieces)

    def take_logprobs(self) -> list[TokenLogprobs]:
        """Return the log probabilities since the last call, without running the engine."""
        return [self._logprobs.popleft() for _ in range(len(self._logprobs))]

    def __iter__(self) -> abc.Iterator[str]:
        while True:
            piece = self.take()
            if piece:
                yield piece
            elif self.done:
                return
            else:
                self.drive()

    def result(self) -> Completion:
        """Drive the engine until the request is finished."""
        while self.completion is None:
            self.drive()
        return self.completion


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt; `ids` contain -200 for every image. `adapter` is the number of a LoRA adapter, 0 for none."""

    ids: tuple[int, ...]
    images: tuple[HashedImage, ...]
    adapter: int = 0

    @cached_property
    def cache_keys(self) -> CacheKeys:
        """The token ids, with one number derived from the digest for every image.

        The first one is different for every adapter, and so all paths in the prefix cache are.
        """
        keys = self.ids
        if self.images:
            image_keys = iter([_IMAGE_KEY + int.from_bytes(image.digest, "big") for image in self.images])
            keys = tuple(next(image_keys) if token == IMAGE_TOKEN_INDEX else token for token in keys)
        if self.adapter:
            offset = self.adapter * (_ADAPTER_KEY if is_image_key(keys[0]) else -_IMAGE_KEY)
            keys = (keys[0] + offset, *keys[1:])
        return keys


def is_image_key(cache_key: int) -> bool:
    """Whether a cache key stands for an image."""
    return cache_key >= _IMAGE_KEY


@dataclass(eq=False)
class Sequence:
    """A request inside the engine: its prompt, generated tokens and output text."""

    prompt: Prompt
    params: SamplingParams
    handle: RequestHandle
    max_new_tokens: int
    end_ids: frozenset[int]
    generator: torch.Generator | None
    detokenizer: Detokenizer
    stream: TextStream
    cache_prefix: bool
    max_tokens: int  # of prompt and answer
    table: TokenTable | None = None
    guide: Guide | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    detokenized: int = 0  # tokens decoded to text
    needs_chunks: bool = False  # its prompt does not fit into the budget of a whole step
    submitted: float = field(default_factory=time.perf_counter)

    def append(self, token: int) -> FinishReason | None:
        """Append the next token; return the finish reason if it follows from the tokens alone."""
        self.tokens.append(token)
        if token in self.end_ids:
            return "stop"
        if self.table is not None:
            self.table.append(token)
        if self.guide is not None:
            self.guide.append(token)
            if self.guide.is_complete:
                return "stop"
        return "length" if len(self.tokens) >= self.max_new_tokens else None

    @property
    def failure(self) -> str:
        """Why no token could be sampled."""
        return GUIDE_FAILED + self.guide.error if self.guide and self.guide.error else _NOT_FINITE

    def add_logprobs(self, logprobs: TokenLogprobs | None) -> None:
        """Report the log probabilities of the last token, unless it ends the answer or none could be sampled."""
        if logprobs is not None and logprobs.token >= 0 and logprobs.token not in self.end_ids:
            self.logprobs.append(logprobs)
            self.handle.push("", logprobs)

    def detokenize(self) -> bool:
        """Decode new tokens and push their text to the handle; true if a stop string has ended the answer."""
        for token in self.tokens[self.detokenized :]:
            if token not in self.end_ids and not self.stream.stopped:
                self.handle.push(self.stream.push(self.detokenizer.push(token)))
        self.detokenized = len(self.tokens)
        return self.stream.stopped

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        """Push the remaining text and set the completion."""
        if self.detokenize() and reason == "length":
            reason = "stop"
        self.handle.push(self.stream.push(self.detokenizer.flush(), final=True))
        self.handle.completion = Completion(
            self.stream.text,
            tuple(self.tokens),
            reason,
            self.handle.prompt_tokens,
            error,
            None if self.params.logprobs is None else tuple(self.logprobs),
        )
