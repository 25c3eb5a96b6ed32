"""Controls that both tabs of the page have: pictures, preprocessing, parameters, examples, download."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import gradio as gr

from llava.errors import LlavaError, RequestError
from llava.images import PROCESS_MODES
from llava.serve.web.chat import Sampling, escape

DEFAULTS: Final = Sampling()
PRIVATE: Final[dict[str, Any]] = {"show_progress": "hidden", "api_visibility": "private"}  # no public endpoint
NOTHING: Final = "Write a message or add a picture first."
AT_ONCE: Final[dict[str, Any]] = {**PRIVATE, "queue": False}
# Gives the text in a hidden box to the browser as a file.
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
    """The sliders, in the order in which handlers take their values."""

    temperature: Any
    top_p: Any
    max_new_tokens: Any
    max_input_tiles: Any

    def all(self) -> list[Any]:
        return [self.temperature, self.top_p, self.max_new_tokens, self.max_input_tiles]


def no_model() -> RequestError:
    return RequestError("No model is chosen; choose one.")


def warning(what: LlavaError | str) -> str:
    """A line of Markdown that says what is wrong; a model's name or a `<image>` in it is shown as it is."""
    return f"⚠️ {escape(str(what.args[0]) if isinstance(what, LlavaError) else what)}"


def sampling_from(values: Sequence[float]) -> Sampling:
    """The sliders' values, in the order of `Parameters.all`."""
    temperature, top_p, max_new_tokens, max_input_tiles = values
    return Sampling(float(temperature), float(top_p), int(max_new_tokens), int(max_input_tiles))


def picture_box(elem_id: str) -> Any:
    return gr.Gallery(
        label="Pictures",
        elem_id=elem_id,
        type="filepath",
        file_types=["image"],
        sources=["upload", "clipboard"],
        columns=3,
        fit_columns=False,
        height=200,
        object_fit="contain",
        interactive=True,
        buttons=[],
    )


def mode_choice() -> Any:
    return gr.Radio(
        list(PROCESS_MODES),
        value=PROCESS_MODES[0],
        label="Preprocess for a picture that is not square",
        info="Default: as the model was trained. Pad: add margins. Crop: keep the middle. Resize: stretch.",
    )


def parameter_sliders() -> Parameters:
    """The sliders of spec/serve.md §8.3; values no engine can honour are left out."""
    with gr.Accordion("Parameters", open=False):
        return Parameters(
            gr.Slider(0.0, 1.0, DEFAULTS.temperature, step=0.1, label="Temperature", info="0 is always the likeliest"),
            gr.Slider(0.1, 1.0, DEFAULTS.top_p, step=0.1, label="Top P"),
            gr.Slider(64, 4096, DEFAULTS.max_new_tokens, step=64, label="Max output tokens"),
            gr.Slider(
                1, 32, DEFAULTS.max_input_tiles, step=1, label="Max input tiles", info="Used by models that read tiles"
            ),
        )


def message_box(elem_id: str, send_id: str) -> tuple[Any, Any]:
    """The text box (Enter submits) and its button, 8 : 1."""
    with gr.Row(elem_classes="ask", equal_height=True):
        text = gr.Textbox(
            label="Message",  # for screen readers
            show_label=False,
            placeholder="Ask about the picture",
            lines=1,
            max_lines=8,
            max_length=20_000,
            scale=8,
            container=False,
            elem_id=elem_id,
        )
        return text, gr.Button("Send", variant="primary", scale=1, min_width=72, elem_id=send_id)


def action_button(name: str, elem_id: str, icon: str, *, min_width: int = 96) -> Any:
    """A button that has nothing to do at first."""
    return gr.Button(name, interactive=False, size="sm", min_width=min_width, elem_id=elem_id, icon=icon)


def example_buttons(examples: Sequence[tuple[str, str]], pictures: Any, text: Any) -> None:
    """A button for each (picture file, question); clicking it fills both boxes."""
    gr.Markdown("Examples", elem_classes="heading")
    with gr.Column(elem_classes="examples"):
        for path, question in examples:
            button = gr.Button(question, icon=path, size="sm")
            button.click(partial(_example, path, question), None, [pictures, text], **AT_ONCE)


def _example(path: str, question: str) -> tuple[list[str], str]:
    return [path], question


def chat_view(elem_id: str, label: str, placeholder: str, *, height: int) -> Any:
    return gr.Chatbot(
        label=label,
        elem_id=elem_id,
        height=height,
        placeholder=placeholder,
        sanitize_html=True,
        allow_tags=False,
        latex_delimiters=[],
        feedback_options=None,
        buttons=["copy"],
        allow_file_downloads=False,
        layout="bubble",
    )
