"""Chat sessions and single-turn prompts: from messages and images to rendered prompts."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, RenderedPrompt, get_template, stop_strings, with_image_token
from llava.engine.sequence import Completion, Request, RequestHandle, SamplingParams
from llava.errors import ConfigError, RequestError
from llava.files import write_errors
from llava.images import fetch_image, open_image

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from llava.engine.engine import Engine

logger = logging.getLogger(__name__)


def load_image(source: str) -> Image.Image:
    """Load the RGB image at a path or an https address. Raises `ImageError`."""
    if source.lower().startswith(("http://", "https://")):
        return fetch_image(source)
    return open_image(source)


def is_stage_one(config: PretrainedConfig) -> bool:
    """Whether a checkpoint is a stage-1 model: only its projector was trained, on captions."""
    plain = getattr(config, "conv_template", None) in ("plain", "v0_plain")
    return plain or bool(getattr(config, "tune_mm_mlp_adapter", False))


def parse_setting(params: SamplingParams, assignment: str) -> SamplingParams:
    """Return `params` with one `NAME=VALUE` changed. Raises `ConfigError` or `RequestError`."""
    name, equals, value = (part.strip() for part in assignment.partition("="))
    types = {"temperature": float, "top_p": float, "max_new_tokens": int, "num_beams": int, "seed": int}
    if not equals or name not in types:
        raise ConfigError(f"{assignment!r} is not a setting; write NAME=VALUE with NAME one of {', '.join(types)}.")
    try:
        number = types[name](value)
    except ValueError as error:
        raise ConfigError(f"{name} must be a number, got {value!r}.") from error
    return dataclasses.replace(params, **{name: number})


def render_question(template: Conversation, text: str, images: int, config: PretrainedConfig) -> RenderedPrompt:
    """Render the prompt of a single-turn question about `images` images, up to the start of the answer."""
    conversation = template.copy()
    question = with_image_token(text, template, config, images) if images else text
    conversation.append_message(conversation.roles[0], question)
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


class ChatSession:
    """A multi-turn conversation with an engine. Attached images are sent with the next message."""

    def __init__(self, engine: Engine, template: str, params: SamplingParams, system: str | None = None) -> None:
        self.engine = engine
        self.template = template
        self.params = dataclasses.replace(params, stop=(*params.stop, *stop_strings(get_template(template))))
        self._system = system
        self.clear()

    def clear(self) -> None:
        """Remove all turns and images; the user's system message stays."""
        self.conversation = get_template(self.template)
        if self._system is not None:
            self.conversation.set_system(self._system)
        self.images: list[Image.Image] = []
        self.sources: list[str] = []
        self._attached: list[tuple[str, Image.Image]] = []

    def set_system(self, text: str) -> None:
        self._system = text
        self.conversation.set_system(text)

    def attach(self, source: str, image: Image.Image | None = None) -> None:
        """Attach an image to the next message; it is loaded from `source` unless it is given."""
        self._attached.append((source, load_image(source) if image is None else image))
        if len(self.images) + len(self._attached) == 2:
            logger.warning("This model was trained on single images; answers about several images may be poor.")

    @property
    def prompt(self) -> RenderedPrompt:
        return self.conversation.get_prompt()

    def ask(self, text: str) -> RequestHandle:
        """Send a message with the attached images. A `RequestError` leaves the conversation unchanged."""
        user, assistant = self.conversation.roles
        images = [*self.images, *(image for _, image in self._attached)]
        if self._attached or DEFAULT_IMAGE_TOKEN in text:
            text = with_image_token(text, self.conversation, self.engine.model.config, len(self._attached))
        self.conversation.append_message(user, text)
        self.conversation.append_message(assistant, None)
        try:
            return self.engine.submit(Request(self.prompt, images, self.params))
        except RequestError:
            del self.conversation.messages[-2:]
            raise

    def add_answer(self, completion: Completion) -> None:
        """Add the answer to the last message; a message cancelled before its answer started is removed."""
        if not completion.text and completion.finish_reason == "cancelled":
            del self.conversation.messages[-2:]
            return
        self.conversation.messages[-1][1] = completion.text
        self.sources += [source for source, _ in self._attached]
        self.images += [image for _, image in self._attached]
        self._attached = []

    def save(self, path: Path) -> None:
        """Write the conversation as JSON. Raises `ConfigError` if the file cannot be written."""
        content = {
            "model": str(getattr(self.engine.model.config, "name_or_path", "")),
            "template": self.template,
            "system": self.conversation.system,
            "messages": [list(message) for message in self.conversation.messages[self.conversation.offset :]],
            "images": self.sources,
            "settings": self.params.as_dict(),
        }
        with write_errors(path):
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
