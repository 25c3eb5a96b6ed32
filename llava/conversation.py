"""Conversation templates and the prompt renderer shared by training, evaluation, chat and serving.

`render()` splits a prompt into spans and marks those the model generates, that is, the difference between an open and a
closed assistant turn: in ``ASSISTANT: A cat.</s>`` the span `` A cat.</s>`` is supervised. `get_prompt()` joins the
spans; training labels are derived from them in `llava.data.labels`.

Messages and the text given to `set_system` are text: the prompt records their ranges, in which
`llava.mm_utils.encode_prompt` recognizes no control tokens. `<image>` places an image in user messages only.
"""

from __future__ import annotations

import base64
import difflib
import html
import io
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.errors import TemplateError

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

Content: TypeAlias = "str | tuple[str, Image.Image, str] | None"
_PLACEHOLDER: Final = re.compile(
    f"({DEFAULT_IM_START_TOKEN}{DEFAULT_IMAGE_TOKEN}{DEFAULT_IM_END_TOKEN}|{DEFAULT_IMAGE_TOKEN})"
)


class SeparatorStyle(Enum):
    """Layouts of a prompt, see `Conversation._opening` and `Conversation._turn`."""

    SINGLE = auto()
    TWO = auto()
    MPT = auto()
    PLAIN = auto()
    LLAMA_2 = auto()
    CHATINTERN = auto()
    INTERNVL_ZH = auto()


class Span(NamedTuple):
    """A piece of a prompt; the model is trained to generate `supervised` ones."""

    text: str
    supervised: bool


class Piece(NamedTuple):
    """Characters of a prompt, either text (of a message or the system) or part of the template."""

    text: str
    is_text: bool = False


class RenderedPrompt(str):
    """A prompt and the ranges [start, end) of its characters that are text, sorted and disjoint.

    Slices, concatenations and other results of `str` methods are plain strings, which have no such ranges.
    """

    text_spans: tuple[tuple[int, int], ...]

    def __new__(cls, prompt: str, text_spans: Iterable[tuple[int, int]] = ()) -> RenderedPrompt:
        self = super().__new__(cls, prompt)
        self.text_spans = tuple(text_spans)
        return self

    @classmethod
    def from_pieces(cls, pieces: Iterable[Piece]) -> RenderedPrompt:
        """The prompt of `pieces`."""
        pieces, at, spans = list(pieces), 0, []
        for text, is_text in pieces:
            if is_text and text:
                spans.append((at, at + len(text)))
            at += len(text)
        return cls("".join(piece.text for piece in pieces), spans)

    def pieces(self) -> Iterator[Piece]:
        """The pieces of the prompt, text and template in turn; some may be empty."""
        at = 0
        for start, end in self.text_spans:
            yield Piece(self[at:start])
            yield Piece(self[start:end], True)
            at = end
        yield Piece(self[at:])

    @property
    def num_images(self) -> int:
        """Number of image placeholders, which are never text."""
        return sum(piece.text.count(DEFAULT_IMAGE_TOKEN) for piece in self.pieces() if not piece.is_text)


class _Turn(NamedTuple):
    """A rendered turn: `before` opens it, `answer` completes it, `after` follows and is never supervised."""

    before: str
    answer: list[Piece]
    after: str = ""


@dataclass
class Conversation:
    """A template and its messages. Templates are shared: `copy()` one before appending.

    A message is `[role, content]`; content is a string, `None` for the turn to be generated, or for user turns a
    tuple `(text, PIL image, process mode)`. `offset` is the number of leading few-shot messages, hidden from display.
    """

    system: str
    roles: tuple[str, str]
    messages: Any = field(default_factory=list)
    offset: int = 0
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"
    stop_str: str | None = None
    stop_token_ids: list[int] | None = None
    skip_next: bool = False
    name: str = ""
    _text_start: int | None = field(default=None, repr=False, compare=False)  # of the text set by `set_system`

    def append_message(self, role: str, content: Content) -> None:
        """Append a turn."""
        self.messages.append([role, content])

    def copy(self) -> Conversation:
        """Copy the conversation and its list of messages; `skip_next` is reset."""
        return replace(self, messages=[[role, content] for role, content in self.messages], skip_next=False)

    def dict(self) -> dict[str, Any]:
        """Fields for the request log, with image tuples reduced to their text."""
        return {
            "system": self.system,
            "roles": self.roles,
            "messages": [[role, _text(content)] for role, content in self.messages],
            "offset": self.offset,
            "sep": self.sep,
            "sep2": self.sep2,
        }

    def set_system(self, text: str) -> None:
        """Replace the system text; MPT-style templates keep the role header in front of it."""
        header = self.system.split("\n", 1)[0] + "\n" if self.sep_style is SeparatorStyle.MPT else ""
        self.system, self._text_start = header + text, len(header)

    def get_prompt(self) -> RenderedPrompt:
        """The whole prompt; raises `TemplateError` like `render`."""
        return RenderedPrompt.from_pieces(piece for pieces, _ in self._layout() for piece in pieces)

    def render(self) -> list[Span]:
        """The spans of the prompt. Raises `TemplateError` for a LLAMA_2 conversation without a first user turn."""
        spans = [Span("".join(piece.text for piece in pieces), supervised) for pieces, supervised in self._layout()]
        return [span for span in spans if span.text]

    def _layout(self) -> Iterator[tuple[list[Piece], bool]]:
        """Pieces of each span, and whether it is supervised."""
        turns = self._plain_turns()
        if self.sep_style is SeparatorStyle.LLAMA_2 and turns and not (turns[0][1] and turns[0][0] == self.roles[0]):
            raise TemplateError(
                f"Template {self.name or 'llama_2'!r} renders its system text inside the first user turn, which is "
                "missing or empty; begin with a user message."
            )
        yield self._opening(), False
        for index, (role, text) in enumerate(turns):
            is_open = text is None or (text == "" and index == len(turns) - 1)
            by_assistant = role == self.roles[1] if self.roles[0] != self.roles[1] else index % 2 == 1
            turn = self._turn(index, role, _text_pieces(text or "", by_assistant))
            yield [Piece(turn.before)], False
            if not is_open:
                # The separator of an empty answer is not supervised.
                yield turn.answer, by_assistant and text != ""
                yield [Piece(turn.after)], False

    def _opening(self) -> list[Piece]:
        if self.sep_style is SeparatorStyle.LLAMA_2:
            return []
        has_sep = self.sep_style not in (SeparatorStyle.PLAIN, SeparatorStyle.CHATINTERN)
        return [*self._system_pieces(), Piece(self.sep if has_sep else "")]

    def _system_pieces(self) -> list[Piece]:
        start = len(self.system) if self._text_start is None else self._text_start
        return [Piece(self.system[:start]), Piece(self.system[start:], True)]

    def _turn(self, index: int, role: str, text: list[Piece]) -> _Turn:
        by_user = index % 2 == 0
        sep = self.sep if by_user or self.sep2 is None else self.sep2
        match self.sep_style:
            case SeparatorStyle.SINGLE:
                return _Turn(f"{role}:", [Piece(" "), *text, Piece(self.sep)])
            case SeparatorStyle.TWO | SeparatorStyle.INTERNVL_ZH:
                return _Turn(f"{role}:", [Piece(" "), *text, Piece(sep)])
            case SeparatorStyle.MPT:
                return _Turn(role, [*text, Piece(self.sep)])
            case SeparatorStyle.PLAIN:
                return _Turn("", [*text, Piece(sep)])
            case SeparatorStyle.CHATINTERN:
                return _Turn(("<s>" if by_user else "") + f"{role}:", [*text, Piece(sep)], "\n")
            case SeparatorStyle.LLAMA_2:
                if not by_user:
                    return _Turn("", [Piece(" "), *text, Piece(f" {sep}")])
                # The tokenizer adds the first <s>.
                before = [Piece(f"{self.sep}[INST] ")]
                if index == 0:
                    before = [Piece("[INST] <<SYS>>\n"), *self._system_pieces(), Piece("\n<</SYS>>\n\n")]
                return _Turn("", [*before, *text, Piece(" [/INST]")])

    def _plain_turns(self) -> list[tuple[str, str | None]]:
        """Messages as text; the placeholder of an image in the first one moves to the front."""
        turns = [(role, _text(content)) for role, content in self.messages]
        if not turns or not isinstance(self.messages[0][1], tuple):
            return turns
        role, text = turns[0]
        text = (text or "").replace(DEFAULT_IMAGE_TOKEN, "").strip()
        if "mmtag" in self.version:
            turns[:1] = [(self.roles[0], image_placeholder(self)), (self.roles[1], "Received."), (role, text)]
        else:
            turns[0] = (role, f"{DEFAULT_IMAGE_TOKEN}\n{text}")
        return turns

    def get_images(self, return_pil: bool = False, return_org: bool = False) -> list[Image.Image | str]:
        """Images of the user turns after `offset`, in order.

        They are processed by their mode (`Pad`, `Resize`; `Default` and `Crop` leave them to the image processor), or
        returned as uploaded with `return_org`. The result holds PIL images with `return_pil`, else base64 text (PNG of
        processed images, JPEG of uploads). Raises `TemplateError` for another mode.
        """
        images: list[Image.Image | str] = []
        for _, content in self.messages[self.offset :: 2]:
            if isinstance(content, tuple):
                _, image, mode = content
                image = image if return_org else _process(image, mode)
                images.append(image if return_pil else _base64(image, "JPEG" if return_org else "PNG"))
        return images

    def to_gradio_chatbot(self) -> list[list[str | None]]:
        """`[user, assistant]` pairs after `offset`; an image is a thumbnail above the escaped text."""
        pairs: list[list[str | None]] = []
        for index, (_, content) in enumerate(self.messages[self.offset :]):
            if index % 2:
                pairs[-1][1] = content
            elif isinstance(content, tuple):
                shown = html.escape(content[0].replace(DEFAULT_IMAGE_TOKEN, "").strip(), quote=False)
                source = "data:image/jpeg;base64," + _base64(_thumbnail(content[1]), "JPEG")
                pairs.append([f'<img src="{source}" alt="user upload image" />{shown}', None])
            else:
                pairs.append([content, None])
        return pairs


def _text_pieces(text: str, by_assistant: bool) -> list[Piece]:
    """A message as pieces; only users place images."""
    parts = [text] if by_assistant else _PLACEHOLDER.split(text)
    return [Piece(part, index % 2 == 0) for index, part in enumerate(parts)]


def _text(content: Content) -> str | None:
    return content[0] if isinstance(content, tuple) else content


def _process(image: Image.Image, mode: str) -> Image.Image:
    from llava.images import PROCESS_MODES, process_upload

    if mode not in PROCESS_MODES:
        raise TemplateError(f"Unknown image process mode {mode!r}; choose Pad, Default, Crop or Resize.")
    return image if mode == "Crop" else process_upload(image, mode)


def _thumbnail(image: Image.Image) -> Image.Image:
    """Shrink an image to a short side of 400 and a long side of 800 pixels at most, keeping its aspect ratio."""
    short, long = sorted(image.size)
    aspect = long / short
    short = max(1, int(min(800 / aspect, 400, short)))
    long = min(800, int(short * aspect))
    return image.resize((long, short) if image.width > image.height else (short, long))


def _base64(image: Image.Image, kind: Literal["JPEG", "PNG"]) -> str:
    from llava.images import to_rgb

    buffer = io.BytesIO()
    (to_rgb(image) if kind == "JPEG" else image).save(buffer, format=kind)
    return base64.b64encode(buffer.getvalue()).decode()


def image_placeholder(template: Conversation, use_im_start_end: bool = False) -> str:
    """Placeholder of one image: `<image>` within the tags of the checkpoint and of the template."""
    token = DEFAULT_IMAGE_TOKEN
    if use_im_start_end:
        token = DEFAULT_IM_START_TOKEN + token + DEFAULT_IM_END_TOKEN
    return f"<Image>{token}</Image>" if "mmtag" in template.version else token


def with_image_token(question: str, template: Conversation, config: object, count: int = 1) -> str:
    """A user turn in the form of training: with its own image placeholders, or `count` in front if it has none.

    `config` is the model's configuration; `mm_use_im_start_end` adds the start and end tokens.
    """
    placeholder = image_placeholder(template, bool(getattr(config, "mm_use_im_start_end", False)))
    if DEFAULT_IMAGE_TOKEN in question:
        return _PLACEHOLDER.sub(placeholder, question)
    return f"{placeholder}\n" * count + question


def stop_strings(template: Conversation) -> tuple[str, ...]:
    """Strings that end an answer: the separator of assistant turns."""
    return (template.sep2 or template.sep,)


def get_template(name: str) -> Conversation:
    """Copy a registered template. Raises `TemplateError` with the nearest and all names for an unknown one."""
    if name not in conv_templates:
        nearest = difflib.get_close_matches(name, conv_templates, n=1, cutoff=0.0)
        hint = f"the nearest is {nearest[0]!r}, all are" if nearest else "choose one of"
        raise TemplateError(f"Unknown conversation template {name!r}; {hint} {', '.join(conv_templates)}.")
    return conv_templates[name].copy()


# Templates of published model families, by a whole word of the name; the first match wins.
_FAMILIES: Final = (
    (r"llama-2", "llava_llama_2"),
    (r"mini-internvl-chat-4b-v1-5|phi-?3", "phi3-chat"),
    (r"internvl-chat(-chinese)?-v1-1", "internvl_zh"),
    (r"internvl-chat(-chinese)?-v1-2(-plus)?|hermes-?2", "Hermes-2"),
    (r"(mini-)?internvl-chat(-2b)?-v1-5|internlm2?", "internlm2-chat"),
    (r"internvl-chat-vit-6b.*|internvit-?6b.*vicuna.*", "vicuna_v1"),
    (r"llava-v0.*mmtag", "v0_mmtag"),
    (r"llava-v1.*mmtag", "v1_mmtag"),
    (r"llava-v0|v0", "llava_v0"),
    (r"llava-v1(\.[0-9]+)?", "llava_v1"),
    (r"mpt", "mpt"),
)


def template_for(config: object, model_name: str, override: str | None = None) -> str:
    """Name of the template for a checkpoint: `override`, else `config.conv_template`, else a guess from its name.

    A guess is logged as a warning; names of unknown families get `vicuna_v1`, the template of InternVL-Chat 1.0.
    Raises `TemplateError` for an unknown template.
    """
    stored: str | None = getattr(config, "conv_template", None)
    chosen = stored if override is None else override
    if chosen is not None:
        template = get_template(chosen)
        if stored is not None and (stored not in conv_templates or template != get_template(stored)):
            logger.warning("The checkpoint was trained with template %r; using %r as requested.", stored, chosen)
        return chosen
    words = model_name.lower().replace("_", "-")
    matches = (name for pattern, name in _FAMILIES if re.search(rf"(^|[-/]){pattern}($|[-/])", words))
    guess = next(matches, "vicuna_v1")
    logger.warning(
        "The checkpoint does not name its template; using %r, guessed from its name %r. Set --conv-mode to choose.",
        guess,
        model_name,
    )
    return guess


_HUMAN_ASSISTANT: Final = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human's questions."
)
_USER_ASSISTANT: Final = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions."
)
_MMTAG: Final = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand "
    "the visual content that the user provides, and assist the user with a variety of tasks using natural "
    "language.The visual content will be provided with the following format: <Image>visual content</Image>."
)
_LLAMA_2: Final = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being "
    "safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal "
    "content. Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering "
    "something not correct. If you don't know the answer to a question, please don't share false information."
)
_LLAVA_LLAMA_2: Final = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)
_FEW_SHOT: Final = (
    ("Human", "What are the key differences between renewable and non-renewable energy sources?"),
    (
        "Assistant",
        "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, "
        "such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are "
        "finite and will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences "
        "between renewable and non-renewable energy sources:\n"
        "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources "
        "are finite and will eventually run out.\n"
        "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
        "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
        "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
        "operational costs than non-renewable sources.\n"
        "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations "
        "than non-renewable sources.\n"
        "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations "
        "and needs, while non-renewable sources are more rigid and inflexible.\n"
        "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable "
        "sources are not, and their depletion can lead to economic and social instability.\n",
    ),
)


_TWO, _MPT = SeparatorStyle.TWO, SeparatorStyle.MPT
_HUMAN, _USER = ("Human", "Assistant"), ("USER", "ASSISTANT")
_CHATML: Final = ("<|im_start|>user\n", "<|im_start|>assistant\n")

vicuna_v0 = Conversation(_HUMAN_ASSISTANT, _HUMAN, _FEW_SHOT, 2, name="v0")
vicuna_v1 = Conversation(_USER_ASSISTANT, _USER, (), 0, _TWO, " ", "</s>", "v1", name="v1")
llama_2 = Conversation(_LLAMA_2, _USER, (), 0, SeparatorStyle.LLAMA_2, "<s>", "</s>", "llama_v2", name="llama_2")
llava_plain = Conversation("", ("", ""), (), 0, SeparatorStyle.PLAIN, "\n", name="plain")
llava_v0 = Conversation(_HUMAN_ASSISTANT, _HUMAN, (), name="llava_v0")
llava_v0_mmtag = Conversation(_MMTAG, _HUMAN, (), version="v0_mmtag", name="v0_mmtag")
llava_v1 = Conversation(_HUMAN_ASSISTANT, _USER, (), 0, _TWO, " ", "</s>", "v1", name="llava_v1")
llava_v1_mmtag = Conversation(_MMTAG, _USER, (), 0, _TWO, " ", "</s>", "v1_mmtag", name="v1_mmtag")
llava_llama_2 = replace(llama_2, system=_LLAVA_LLAMA_2, name="llava_llama_2")
mpt = Conversation(
    "<|im_start|>system\n"
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers.",
    *(_CHATML, (), 0, _MPT, "<|im_end|>", None, "mpt"),
    name="mpt",
)
internlm = Conversation(
    "A chat between a curious <|User|> and an <|Bot|>. The <|Bot|> gives helpful, detailed, and polite answers "
    "to the <|User|>'s questions.\n\n",
    ("<|User|>", "<|Bot|>"),
    *((), 0, SeparatorStyle.CHATINTERN, "<eoh>", "<eoa>", "internlm", "<|User|>", [1, 103028]),
    name="internlm",
)
internvl_zh = Conversation("", ("<human>", "<bot>"), (), 0, SeparatorStyle.INTERNVL_ZH, " ", "</s>", name="internvl_zh")
hermes2 = replace(mpt, system="<|im_start|>system\nAnswer the questions.", name="Hermes-2")
internlm2_chat = replace(
    mpt,
    system="<|im_start|>system\nYou are an AI assistant whose name is InternLM (书生·浦语).",
    name="internlm2-chat",
)
phi3_chat = replace(
    mpt,
    system="<|system|>\nYou are an AI assistant whose name is Phi-3.",
    roles=("<|user|>\n", "<|assistant|>\n"),
    sep="<|end|>",
    name="phi3-chat",
)

conv_templates: Final[dict[str, Conversation]] = {
    "default": vicuna_v0,
    "v0": vicuna_v0,
    "v1": vicuna_v1,
    "vicuna_v1": vicuna_v1,
    "llama_2": llama_2,
    "plain": llava_plain,
    "v0_plain": llava_plain,
    "llava_v0": llava_v0,
    "v0_mmtag": llava_v0_mmtag,
    "llava_v1": llava_v1,
    "v1_mmtag": llava_v1_mmtag,
    "llava_llama_2": llava_llama_2,
    "mpt": mpt,
    "internlm": internlm,
    "internvl_zh": internvl_zh,
    "Hermes-2": hermes2,
    "internlm2-chat": internlm2_chat,
    "phi3-chat": phi3_chat,
}

default_conversation = vicuna_v0  # forks assign it to change the template of the process
