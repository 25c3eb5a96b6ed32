"""Components shared by both tabs: image box, preprocessing mode, parameters, examples, download."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import gradio as gr

from llava.errors import LlavaError, RequestError
from llava.images import PROCESS_MODES
from llava.serve.web.chat import LATEX_DELIMITERS, Sampling, verbatim

DEFAULTS: Final = Sampling()
PRIVATE: Final[dict[str, object]] = {"show_progress": "hidden", "api_visibility": "private"}  # no public endpoint
EMPTY_MESSAGE: Final = "Enter a message or add an image."
# Gradio refuses other files without a reason, and the message would go without them; `load_images` gives one.
_FILE_TYPES: Final = ["image", "file", "application/*", "audio/*", "text/*", "video/*"]
IMMEDIATE: Final[dict[str, object]] = {**PRIVATE, "queue": False}
# Downloads the text of a hidden box as a file.
SAVE_AS_FILE: Final = """(text) => {
    if (!text) return;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
    link.download = "conversation.json";
    link.click();
    URL.revokeObjectURL(link.href);
}"""


@dataclass(frozen=True)
class Parameters:
    """Sliders of the sampling settings, in the order of the handlers' arguments."""

    temperature: gr.Slider
    top_p: gr.Slider
    max_new_tokens: gr.Slider
    max_input_tiles: gr.Slider

    def all(self) -> list[gr.Slider]:
        return [self.temperature, self.top_p, self.max_new_tokens, self.max_input_tiles]


def no_model() -> RequestError:
    return RequestError("No model is selected; select one.")


def warning(problem: LlavaError | str) -> str:
    """A problem as a line of Markdown."""
    return f"⚠️ {verbatim(str(problem.args[0]) if isinstance(problem, LlavaError) else problem)}"


def sampling_from(values: Sequence[float]) -> Sampling:
    """Sampling settings from the values of the sliders."""
    temperature, top_p, max_new_tokens, max_input_tiles = values
    return Sampling(float(temperature), float(top_p), int(max_new_tokens), int(max_input_tiles))


def image_box(elem_id: str) -> gr.Gallery:
    return gr.Gallery(
        label="Images",
        elem_id=elem_id,
        type="filepath",
        file_types=_FILE_TYPES,
        sources=["upload", "clipboard"],
        columns=3,
        fit_columns=False,
        height=200,
        object_fit="contain",
        interactive=True,
        buttons=[],
    )


def mode_choice() -> gr.Radio:
    return gr.Radio(
        list(PROCESS_MODES),
        value=PROCESS_MODES[0],
        label="Preprocessing of images that are not square",
        info="Default: as in training. Pad: add margins. Crop: keep the center. Resize: stretch.",
    )


def parameter_sliders() -> Parameters:
    """Create the sliders, closed by default."""
    with gr.Accordion("Parameters", open=False):
        return Parameters(
            gr.Slider(0.0, 1.0, DEFAULTS.temperature, step=0.1, label="Temperature", info="0 is greedy"),
            gr.Slider(0.1, 1.0, DEFAULTS.top_p, step=0.1, label="Top P"),
            gr.Slider(64, 4096, DEFAULTS.max_new_tokens, step=64, label="Max output tokens"),
            gr.Slider(
                1, 32, DEFAULTS.max_input_tiles, step=1, label="Max input tiles", info="For models with image tiles"
            ),
        )


def message_box(elem_id: str, send_id: str) -> tuple[gr.Textbox, gr.Button]:
    """The text box (Enter submits) and its button, with widths 8 : 1."""
    with gr.Row(elem_classes="ask", equal_height=True):
        text = gr.Textbox(
            label="Message",  # for screen readers
            show_label=False,
            placeholder="Ask about the image",
            lines=1,
            max_lines=8,
            max_length=20_000,
            scale=8,
            container=False,
            elem_id=elem_id,
        )
        return text, gr.Button("Send", variant="primary", scale=1, min_width=72, elem_id=send_id)


def action_button(name: str, elem_id: str, icon: str, *, min_width: int = 96) -> gr.Button:
    """A button, disabled at first."""
    return gr.Button(name, interactive=False, size="sm", min_width=min_width, elem_id=elem_id, icon=icon)


def example_buttons(examples: Sequence[tuple[str, str]], images: gr.Gallery, text: gr.Textbox) -> None:
    """A button for each (image path, question), which fills both boxes."""
    gr.Markdown("Examples", elem_classes="heading")
    with gr.Column(elem_classes="examples"):
        for path, question in examples:
            button = gr.Button(question, icon=path, size="sm")
            button.click(partial(_example, path, question), None, [images, text], **IMMEDIATE)


def _example(path: str, question: str) -> tuple[list[str], str]:
    return [path], question


def chat_view(elem_id: str, label: str, placeholder: str, *, height: int) -> gr.Chatbot:
    return gr.Chatbot(
        label=label,
        elem_id=elem_id,
        height=height,
        placeholder=placeholder,
        sanitize_html=True,
        allow_tags=False,
        latex_delimiters=LATEX_DELIMITERS,
        feedback_options=None,
        buttons=["copy"],
        allow_file_downloads=False,
        layout="bubble",
    )
