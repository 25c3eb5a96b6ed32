"""Components of the web page: message box, chat view, settings drawer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypedDict

import gradio as gr

from llava.errors import LlavaError, RequestError
from llava.images import PROCESS_MODES
from llava.serve.web.chat import LATEX_DELIMITERS, Sampling, verbatim

DEFAULTS: Final = Sampling()
PRIVATE: Final[dict[str, object]] = {"show_progress": "hidden", "api_visibility": "private"}  # no public endpoint
EMPTY_MESSAGE: Final = "Enter a message or attach an image."
VOTES: Final = {"Like": "upvote", "Dislike": "downvote", "Flag": "flag"}  # of an answer, and their names in the log
IMMEDIATE: Final[dict[str, object]] = {**PRIVATE, "queue": False}
_MAX_PASTE: Final = 1_000_000  # characters; Gradio attaches longer texts as a file


class Message(TypedDict):
    """Value of the message box: text, and the paths of the attached files."""

    text: str
    files: list[str]


NO_MESSAGE: Final[Message] = {"text": "", "files": []}


@dataclass(frozen=True)
class Settings:
    """Components of the settings drawer, in the order of the handlers' arguments."""

    mode: gr.Radio
    temperature: gr.Slider
    top_p: gr.Slider
    max_new_tokens: gr.Slider
    max_input_tiles: gr.Slider

    def all(self) -> list[gr.Component]:
        return [self.mode, self.temperature, self.top_p, self.max_new_tokens, self.max_input_tiles]


def no_model() -> RequestError:
    return RequestError("No model is selected; select one.")


def warning(problem: LlavaError | str) -> str:
    """A problem as a line of Markdown."""
    return f"⚠️ {verbatim(str(problem.args[0]) if isinstance(problem, LlavaError) else problem)}"


def sampling_from(values: Sequence[float]) -> Sampling:
    """Sampling settings from the values of the sliders."""
    temperature, top_p, max_new_tokens, max_input_tiles = values
    return Sampling(float(temperature), float(top_p), int(max_new_tokens), int(max_input_tiles))


def settings_drawer() -> Settings:
    """The drawer on the right of the page, initially closed; both tabs use its settings."""
    with gr.Sidebar(label="Settings", position="right", open=False, width=320, elem_id="settings"):
        gr.Markdown("## Settings")
        return Settings(
            gr.Radio(
                list(PROCESS_MODES),
                value=PROCESS_MODES[0],
                label="Preprocessing of images that are not square",
                info="Default: as in training. Pad: add margins. Crop: keep the center. Resize: stretch.",
            ),
            gr.Slider(0.0, 1.0, DEFAULTS.temperature, step=0.1, label="Temperature", info="0 is greedy"),
            gr.Slider(0.1, 1.0, DEFAULTS.top_p, step=0.1, label="Top P"),
            gr.Slider(64, 4096, DEFAULTS.max_new_tokens, step=64, label="Max output tokens"),
            gr.Slider(
                1, 32, DEFAULTS.max_input_tiles, step=1, label="Max input tiles", info="For models with image tiles"
            ),
        )


def message_box(elem_id: str) -> gr.MultimodalTextbox:
    """The box for a message and its images; Enter submits, Shift+Enter starts a new line.

    It accepts every file, because Gradio rejects other types without a reason; `load_images` gives one.
    """
    return gr.MultimodalTextbox(
        label="Message",  # for screen readers
        show_label=False,
        placeholder="Ask about an image: drop, paste or attach it",
        file_count="multiple",
        sources=["upload"],
        lines=1,
        max_lines=8,
        max_plain_text_length=_MAX_PASTE,
        container=False,
        elem_id=elem_id,
    )


def parts(message: Message | None) -> tuple[str, list[str]]:
    """Text and paths of files of the message box."""
    message = message or NO_MESSAGE
    return (message["text"] or "").strip(), message["files"]


def sending(box: gr.MultimodalTextbox, *, keep: bool = False) -> dict[gr.Component, object]:
    """Update of the message box while an answer runs: Stop takes the place of Send; it is emptied unless `keep`."""
    emptied = {} if keep else {"value": NO_MESSAGE}
    return {box: gr.update(submit_btn=False, stop_btn=True, **emptied)}


def idle(box: gr.MultimodalTextbox) -> dict[gr.Component, object]:
    """Update of the message box when an answer has ended; what was typed meanwhile stays."""
    return {box: gr.update(submit_btn=True, stop_btn=False)}


def icon_button(name: str, elem_id: str, icon: str, *, interactive: bool = False) -> gr.Button:
    return gr.Button(name, interactive=interactive, size="sm", min_width=72, elem_id=elem_id, icon=icon)


def chat_view(
    elem_id: str, label: str, placeholder: str, *, votes: bool = False, examples: Sequence[tuple[str, str]] = ()
) -> gr.Chatbot:
    """The view of a conversation; `examples` (image path, question) are offered while it is empty."""
    return gr.Chatbot(
        label=label,
        show_label=False,
        elem_id=elem_id,
        elem_classes="chat",
        height="100%",
        placeholder=placeholder,
        examples=[{"text": text, "icon": path, "files": [path]} for path, text in examples] or None,
        sanitize_html=True,
        allow_tags=False,
        latex_delimiters=LATEX_DELIMITERS,
        feedback_options=tuple(VOTES) if votes else None,
        buttons=["copy"],
        allow_file_downloads=False,
        layout="bubble",
    )
