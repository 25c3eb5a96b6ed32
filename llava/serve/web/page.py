"""The page: title, tabs, and the timer that keeps the list of models true; see `llava.serve.gradio_web_server`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, Final

import gradio as gr

from llava.serve.web import chat_tab, compare_tab, controls
from llava.serve.web.chat import Chat
from llava.serve.web.examples import draw_all
from llava.serve.web.models import Listing
from llava.serve.web.site import Site, gone

_HEAD: Final = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24" fill="none" stroke="#7c8594" stroke-width="2.2" '
    'stroke-linecap="round" stroke-linejoin="round">'
)
_THUMB: Final = '<path d="M3 11h4v9H3zM7 12l4-8c2 0 3 1 3 3l-1 3h6c1 0 2 1 2 2l-2 6c0 1-1 2-2 2H7"/>'
SHAPES: Final = {
    "upvote": _THUMB,
    "downvote": f'<g transform="rotate(180 12 12)">{_THUMB}</g>',
    "flag": '<path d="M5 21V4M5 4h13l-3 4 3 4H5"/>',
    "regenerate": '<path d="M20 12a8 8 0 1 1-3-6.2M20 3v4h-4"/>',
    "stop": '<rect x="6" y="6" width="12" height="12" rx="1" fill="#7c8594"/>',
    "clear": '<path d="M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13M10 11v5M14 11v5"/>',
    "save": '<path d="M12 4v11M7 10l5 5 5-5M4 20h16"/>',
    "leftvote": '<path d="M20 12H4M10 6l-6 6 6 6"/>',
    "rightvote": '<path d="M4 12h16M14 6l6 6-6 6"/>',
    "tievote": '<path d="M5 9h14M5 15h14"/>',
    "bothbad_vote": '<path d="M6 6l12 12M18 6L6 18"/>',
}


def write_icons(folder: Path) -> dict[str, str]:
    """Write all icons to `folder`; their paths by name."""
    paths = {}
    for name, shape in SHAPES.items():
        path = folder / f"{name}.svg"
        path.write_text(f"{_HEAD}{shape}</svg>\n", encoding="utf-8")
        paths[name] = str(path)
    return paths


# --- The page ---------------------------------------------------------------------------------------------------------


TICK: Final = 2.5  # seconds between two looks at the list of models
_DAY: Final = 86_400
TITLE: Final = """# InternVL-Chat
Ask a vision-language model about pictures. [Code](https://github.com/OpenGVLab/InternVL) ·
[Paper](https://arxiv.org/abs/2312.14238) · [Weights](https://huggingface.co/OpenGVLab)"""
TERMS: Final = """---
**Terms of use.** Answers come from a machine and can be wrong or offensive; do not rely on them. Upload nothing that
is private, unlawful or not yours. {keeping} A vote stores the conversation it is about.

**Licence.** The program is under Apache-2.0; each model has its own licence."""
KEEPING: Final = {
    True: "This server keeps conversations, with pictures and addresses, for {days} days.",
    False: "This server keeps no conversations.",
}
CSS: Final = """
.gradio-container {max-width: 1400px !important; margin: auto;}
.page {display: grid !important; grid-template-columns: minmax(0, 3fr) minmax(0, 8fr);
  grid-template-areas: "side talk" "more talk"; grid-template-rows: auto 1fr; gap: 16px; align-items: start;}
.page > .side {grid-area: side;} .page > .talk {grid-area: talk;} .page > .more {grid-area: more;}
.page > * {min-width: 0 !important;}
.buttons {gap: 8px !important;}
.buttons button {padding-left: 6px; padding-right: 6px; white-space: nowrap; height: 100%;}
.dark .buttons button img {filter: brightness(1.7);}
.heading p {color: var(--block-label-text-color); font-size: var(--block-label-text-size);}
.examples {gap: 6px !important;}
.examples button {justify-content: flex-start; text-align: left; font-weight: normal; padding: 6px;}
.examples button img {width: 52px; height: 40px; object-fit: cover; border-radius: 4px; margin-right: 8px;}
.message img {max-height: 220px !important; width: auto !important;}
#picture_box .grid-wrap, #compare_pictures .grid-wrap {padding-top: 32px;}
button[title="Share"], .message-buttons:not(:has(button:not([title="Share"]))) {display: none;}
hr {border-color: var(--border-color-primary) !important;}
#notice:empty, #compare_notice:empty, #banner:empty {display: none;}
footer {display: none !important;}
@media (max-width: 768px) {
  .gradio-container {padding: 8px !important;}
  .page {grid-template-columns: minmax(0, 1fr); grid-template-areas: "side" "talk" "more"; grid-template-rows: none;}
  #picture_box, #compare_pictures {height: 150px !important;}
  #picture_box .grid-wrap, #compare_pictures .grid-wrap {height: 150px !important;}
  #chatbot {height: 420px !important;}
  #chatbot_left, #chatbot_right {height: 300px !important;}
  .buttons {display: grid !important; grid-template-columns: repeat(4, minmax(0, 1fr));}
  .buttons button {flex-direction: column; min-width: 0 !important; padding: 4px 0; white-space: normal;
    font-size: var(--text-xs);}
}
"""


def theme() -> Any:
    """Gradio's default look with fonts that every machine has, so that a page asks no other server for anything."""
    return gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "Consolas", "monospace"], primary_hue="blue"
    ).set(block_info_text_color="*neutral_500", input_placeholder_color="*neutral_500")  # Gradio's own are faint


def build_page(site: Site, *, embed: bool = False) -> Any:
    """The Gradio application, not yet served. `embed` leaves title and terms out."""
    folder = Path(tempfile.mkdtemp(prefix="llava-page-", dir=os.environ.get("GRADIO_TEMP_DIR")))
    examples = [(str(path), question) for path, question in draw_all(folder)]
    icons = write_icons(folder)
    with gr.Blocks(title="InternVL-Chat", analytics_enabled=False, delete_cache=(3600, _DAY)) as page:
        if not embed:
            gr.Markdown(TITLE, elem_id="title")
        banner = gr.Markdown("", elem_id="banner")
        with gr.Tab("Chat"):
            chat = chat_tab.build(site, examples, icons)
        with gr.Tab("Compare two models"):
            compare = compare_tab.build(site, icons)
        if not embed:
            keeping = KEEPING[site.log.chats].format(days=site.log.keep_days)
            gr.Markdown(TERMS.format(keeping=keeping), elem_id="terms")
        _follow_models(page, site, banner, chat, compare)
    return page


def _follow_models(page: Any, site: Site, banner: Any, chat: Any, compare: Any) -> None:
    """Keep the three drop-downs and the banner true while the page is open, and when it is loaded."""
    inputs = [chat.state, *compare.states, chat.model, *compare.models]

    def show(listing: Listing, chats: tuple[Chat, Chat, Chat], current: tuple[Any, Any, Any]) -> list[Any]:
        one, left, right = chats
        text = listing.reason or gone(listing, one) or gone(listing, left) or gone(listing, right)
        return [
            controls.warning(text) if text else "",
            site.follow(listing, one, current[0]),
            site.follow(listing, left, current[1]),
            site.follow(listing, right, current[2], other_than=current[1] or site.catalog.preferred(listing)),
        ]

    async def tick(
        one: Chat, left: Chat, right: Chat, model: str | None, left_model: str | None, right_model: str | None
    ) -> list[Any]:
        return show(await site.catalog.listing(), (one, left, right), (model, left_model, right_model))

    async def load(one: Chat, request: gr.Request, left: Chat, right: Chat, *models: str | None) -> list[Any]:
        listing = await site.catalog.listing(refresh=site.catalog.mode == "reload")
        wanted = request.query_params.get("model")
        for each in (one, left, right):
            each.seen = None
        return show(listing, (one, left, right), (wanted, models[1], models[2]))

    outputs = [banner, chat.model, *compare.models]
    page.load(load, inputs, outputs, **controls.PRIVATE)
    gr.Timer(TICK).tick(tick, inputs, outputs, **controls.AT_ONCE)
