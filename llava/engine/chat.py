"""One conversation with a model: its history, its pictures and its settings. No terminal in here."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import get_template, stop_strings, with_image_token
from llava.engine import Completion, Engine, Request, RequestHandle, SamplingParams
from llava.errors import ConfigError, RequestError
from llava.files import write_errors
from llava.images import fetch_image, open_image

logger = logging.getLogger(__name__)


def load_picture(source: str) -> Image.Image:
    """The RGB picture at a path or an https address; raises `ImageError`."""
    if source.lower().startswith(("http://", "https://")):
        return fetch_image(source)
    return open_image(source)


def is_stage_one(config: Any) -> bool:
    """Whether a checkpoint's config says that only its projector was trained, on captions (CONV-3)."""
    plain = getattr(config, "conv_template", None) in ("plain", "v0_plain")
    return plain or bool(getattr(config, "tune_mm_mlp_adapter", False))


def parse_setting(params: SamplingParams, assignment: str) -> SamplingParams:
    """`params` with one `name=value` of the user's changed; raises `ConfigError` or `RequestError`."""
    name, equals, value = (part.strip() for part in assignment.partition("="))
    kinds = {"temperature": float, "top_p": float, "max_new_tokens": int, "num_beams": int, "seed": int}
    if not equals or name not in kinds:
        raise ConfigError(f"{assignment!r} is not a setting; write NAME=VALUE with NAME one of {', '.join(kinds)}.")
    try:
        number = kinds[name](value)
    except ValueError as error:
        raise ConfigError(f"{name} cannot be {value!r}; give a number.") from error
    return dataclasses.replace(params, **{name: number})


class ChatSession:
    """Multi-turn history over an engine. Pictures are attached first and go with the next message."""

    def __init__(self, engine: Engine, template: str, params: SamplingParams, system: str | None = None) -> None:
        self.engine = engine
        self.template = template
        self.params = dataclasses.replace(params, stop=(*params.stop, *stop_strings(get_template(template))))
        self._system = system
        self.clear()

    def clear(self) -> None:
        """Forget all turns and pictures; a system message given by the user stays."""
        self.conversation = get_template(self.template)
        if self._system is not None:
            self.conversation.set_system(self._system)
        self.images: list[Image.Image] = []
        self.sources: list[str] = []
        self._attached: list[tuple[str, Image.Image]] = []

    def set_system(self, text: str) -> None:
        self._system = text
        self.conversation.set_system(text)

    def attach(self, source: str, picture: Image.Image | None = None) -> None:
        """Add a picture to the next message; it is opened unless it is given."""
        self._attached.append((source, load_picture(source) if picture is None else picture))
        if len(self.images) + len(self._attached) == 2:
            logger.warning("This kind of checkpoint is trained on single pictures; answers about several may be poor.")

    @property
    def prompt(self) -> str:
        return self.conversation.get_prompt()

    def ask(self, text: str) -> RequestHandle:
        """Send a message with the attached pictures. On `RequestError` the conversation stays as it was."""
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

    def keep(self, completion: Completion) -> None:
        """Store the answer to the last message; a message cancelled before any answer is taken back."""
        if not completion.text and completion.finish_reason == "cancelled":
            del self.conversation.messages[-2:]
            return
        self.conversation.messages[-1][1] = completion.text
        self.sources += [source for source, _ in self._attached]
        self.images += [image for _, image in self._attached]
        self._attached = []

    def save(self, path: Path) -> None:
        """Write the conversation as JSON."""
        content = {
            "model": str(getattr(self.engine.model.config, "name_or_path", "")),
            "template": self.template,
            "system": self.conversation.system,
            "messages": [list(message) for message in self.conversation.messages[self.conversation.offset :]],
            "images": self.sources,
            "settings": dataclasses.asdict(self.params),
        }
        with write_errors(path):
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
