"""The state of a conversation in the browser: what is sent, shown, exported and logged, and images on the way."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava.conversation import get_template
from llava.errors import ImageError, RequestError
from llava.images import PROCESS_MODES
from llava.serve.common.protocol import ErrorType, ModelInfo, ServeError, WorkerStatus
from llava.serve.web.answer import choose_template, request_body
from llava.serve.web.chat import CURSOR, SKELETON, Chat, Sampling, Turn, escape, verbatim
from llava.serve.web.examples import EXAMPLES, draw_all
from llava.serve.web.images import MAX_IMAGES, UploadedImage, as_jpeg, load_image, load_images
from llava.serve.web.log import ConversationLog
from llava.serve.web.page import SHAPES, write_icons

SYSTEM = get_template("vicuna_v1").system


def status(**info: object) -> WorkerStatus:
    facts = {"image_tokens": 16, **info}
    return WorkerStatus(model_names=["m"], speed=1, queue_length=0, info=ModelInfo.model_validate(facts))


@pytest.fixture
def upload(tmp_path: Path) -> Callable[..., UploadedImage]:
    def make(width: int = 40, height: int = 20, kind: str = "png") -> UploadedImage:
        path = tmp_path / f"p{width}x{height}.{kind}"
        Image.new("RGB", (width, height), (200, 30, 30)).save(path)
        return load_image(str(path))

    return make


def turn_of(text: str, answer: str = "", images: tuple[UploadedImage, ...] = (), **more: object) -> Turn:
    return Turn(text, images, answer=answer, running=False, **more)  # type: ignore[arg-type]


# --- prompts --------------------------------------------------------------------------------------------------------


def test_a_conversation_is_rendered_as_training_and_terminal_do(upload: Callable[..., UploadedImage]) -> None:
    chat = Chat([turn_of("What is this?", "A box.", (upload(),)), turn_of("Why?")])
    conversation, images, modes = chat.conversation()
    assert conversation.get_prompt() == (
        f"{SYSTEM} USER: <image>\nWhat is this? ASSISTANT: A box.</s>USER: Why? ASSISTANT:"
    )
    assert len(images) == 1 and modes == ["Default"]


def test_images_go_with_their_turns(upload: Callable[..., UploadedImage]) -> None:
    one, two, three = upload(1, 2), upload(3, 4), upload(5, 6)
    chat = Chat(
        [turn_of("A", "a"), turn_of("B", "b", (one, two)), turn_of("compare <image> here", "", (three,), mode="Pad")]
    )
    conversation, images, modes = chat.conversation()
    assert conversation.get_prompt().endswith(
        "USER: <image>\n<image>\nB ASSISTANT: b</s>USER: compare <image> here ASSISTANT:"
    )
    assert images == [one, two, three] and modes == ["Default", "Default", "Pad"]


def test_a_tagged_template_opens_with_its_own_exchange(upload: Callable[..., UploadedImage]) -> None:
    chat = Chat([turn_of("What?", "", (upload(),))], template="v1_mmtag")
    prompt = chat.conversation()[0].get_prompt()
    assert "USER: <Image><image></Image> ASSISTANT: Received.</s>USER: What? ASSISTANT:" in prompt


def test_a_template_with_examples_of_its_own_keeps_the_image(upload: Callable[..., UploadedImage]) -> None:
    chat = Chat([turn_of("What?", "", (upload(),))], template="v0")
    assert (
        chat.conversation()[0].get_prompt().endswith("### Human: <image>\nWhat?### Assistant:".replace("### ", "###"))
    )


def test_turns_without_an_answer_are_not_sent_again() -> None:
    chat = Chat([turn_of("lost", note="failed"), turn_of("again")])
    assert chat.conversation()[0].get_prompt() == f"{SYSTEM} USER: again ASSISTANT:"


def test_another_model_gets_the_same_turns_in_its_own_format() -> None:
    chat = Chat([turn_of("Hi", "Hello"), turn_of("Bye")])
    chat.template = "Hermes-2"
    body = request_body(chat, chat.turns[-1], None)
    assert body["prompt"].endswith("<|im_start|>assistant\n") and body["stop"] == "<|im_end|>"
    assert "ASSISTANT" not in body["prompt"]


@pytest.mark.parametrize(("text", "images", "fine"), [("<image> a", 0, False), ("<image>", 1, True), ("x", 2, True)])
def test_typed_placeholders_must_fit(text: str, images: int, fine: bool, upload: Callable[..., UploadedImage]) -> None:
    turn = Turn(text, (upload(),) * images)
    if fine:
        turn.check()
    else:
        with pytest.raises(RequestError, match=r"1 <image> placeholder\(s\) but 0 image"):
            turn.check()


def test_the_body_is_the_contracts(upload: Callable[..., UploadedImage]) -> None:
    turn = Turn("What?", (upload(),), sampling=Sampling(0.2, 0.9, 4096, 6), model="m")
    body = request_body(Chat([turn]), turn, status(max_new_tokens=512))
    assert set(body) == {
        "model", "prompt", "temperature", "top_p", "max_new_tokens", "max_input_tiles", "stop", "images",
    }  # fmt: skip
    assert body["max_new_tokens"] == 512 and body["stop"] == "</s>" and body["top_p"] == 0.9
    assert base64.b64decode(body["images"][0]) == turn.images[0].data
    assert json.loads(json.dumps(body)) == body


def test_a_worker_of_ours_gets_turns_and_sends_what_is_new(upload: Callable[..., UploadedImage]) -> None:
    chat = Chat([turn_of("A", "a", (upload(),)), Turn("B", model="m")])
    worker = status()
    worker.features = ["delta", "messages"]
    body = request_body(chat, chat.turns[-1], worker)
    assert body["stream_mode"] == "delta"
    assert [(m["role"], m["content"]) for m in body["messages"]] == [
        ("user", "<image>\nA"), ("assistant", "a"), ("user", "B"),
    ]  # fmt: skip


def test_what_the_worker_cannot_take_is_refused_here(upload: Callable[..., UploadedImage]) -> None:
    turn = Turn("What?", (upload(), upload()), model="m")
    for worker, kind in (
        (status(image_tokens=0), ErrorType.BAD_IMAGE),
        (status(image_tokens=None, max_images=0), ErrorType.BAD_IMAGE),
        (status(max_images=1), ErrorType.IMAGE_COUNT_MISMATCH),
    ):
        with pytest.raises(ServeError) as caught:
            request_body(Chat([turn]), turn, worker)
        assert caught.value.kind is kind


def test_an_unknown_number_of_image_tokens_is_no_refusal(upload: Callable[..., UploadedImage]) -> None:
    turn = Turn("What?", (upload(),), model="m")
    assert len(request_body(Chat([turn]), turn, status(image_tokens=None))["images"]) == 1


def test_the_template_comes_from_the_worker_not_from_the_name() -> None:
    assert choose_template(status(conv_template="Hermes-2"), "llava-v1.5-7b") == "Hermes-2"
    assert choose_template(None, "llava-v1.5-7b") == "llava_v1"
    assert choose_template(status(), "some-model") == "vicuna_v1"
    assert choose_template(status(conv_template="of-the-future"), "some-model") == "vicuna_v1"


# --- what is shown --------------------------------------------------------------------------------------------------


def test_the_view_shows_images_cursor_and_notes(upload: Callable[..., UploadedImage]) -> None:
    one = upload()
    turn = Turn("a <image> <script>", (one,), model="m<1>")
    name = '<span class="model-name">m&lt;1&gt;</span>'
    assert Chat([turn]).shown() == [
        {"role": "user", "content": [{"path": one.path, "alt_text": "Attached image"}, "a 🖼 &lt;script&gt;"]},
        {"role": "assistant", "content": [name, SKELETON]},
    ]
    turn.answer = "It is"
    assert turn.shown() == [name, f"It is{CURSOR}"] and turn.shown("Model A")[0].endswith(">Model A</span>")
    turn.running, turn.note = False, "Stopped."
    assert turn.shown() == [name, "It is", '<div class="note">Stopped.</div>']


def test_an_error_is_shown_as_a_card() -> None:
    turn = turn_of("a", note="It failed; try <b>. (why) (error&code: 1)", finish_reason="error", model="m")
    assert turn.shown()[1] == (
        '<div class="error-card" role="alert"><strong>It failed.</strong><p>Try &lt;b&gt;.</p>'
        "<small>(why) (error&amp;code&#58; 1)</small></div>"
    )
    turn.note = "The model returned an empty answer."
    assert turn.shown()[1].endswith("><strong>The model returned an empty answer.</strong></div>")


@settings(deadline=None)
@given(st.text(alphabet="<>&ab`/\n \"'", max_size=60))
def test_no_tag_survives_outside_code(text: str) -> None:
    shown = escape(text)
    if "`" not in text:
        assert "<" not in shown and ">" not in shown


def test_code_is_kept_as_it_is() -> None:
    assert escape("a<b `c<d` e<f\n```\n<g>\n```\n<h>") == "a&lt;b `c<d` e&lt;f\n```\n<g>\n```\n&lt;h&gt;"
    assert escape("```\n<open") == "```\n<open"


MARK = "\u2060"


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("![a](http://e/x)", "&#33;[a](http://e/x)"),
        ("![a][r]\n\n[r]: http://e/x", "&#33;[a][r]\n\n[r]: http://e/x"),
        ("\\` ![a](u) \\`", "&#96; &#33;[a](u) &#96;"),  # escaped backticks are no code
        ("x ``` <img src=u> ![a](u)", "x &#96;&#96;&#96; &lt;img src=u&gt; &#33;[a](u)"),  # nor is an open span
        ("\\<b> \\\\<b>", "&lt;b&gt; &#92;&lt;b&gt;"),
        ("``a`b<c`` <d", "``a`b<c`` &lt;d"),
        ("~~~\n<a>\n~~~\n<b>", "~~~\n<a>\n~~~\n&lt;b&gt;"),
        ("1. x\n   ```py\n   a<b\n   ```\n<y>", "1. x\n   ```py\n   a<b\n   ```\n&lt;y&gt;"),
        ("````\n```\n<a>\n```\n````\n<b>", "````\n```\n<a>\n```\n````\n&lt;b&gt;"),
        ("$$a<b$$ and \\[x_1\\]", f"{MARK}$$a&lt;b$${MARK} and {MARK}\\[x_1\\]{MARK}"),
        ("`$$ <i> $$` \\\\(a\\)", "`$$ <i> $$` \\\\(a\\)"),  # no formula in code, none after \\
        (f"`{MARK}$$<img src=u>$${MARK}`", "`$$<img src=u>$$`"),
    ],
)
def test_an_answer_loads_nothing(answer: str, shown: str) -> None:
    assert escape(answer) == shown


@pytest.mark.parametrize("text", ["\\[" * 20_000, "`a" * 20_000, "$$" * 20_001, "> " * 20_000, "```" * 9_000])
def test_markup_without_an_end_takes_no_time(text: str) -> None:
    assert len(escape(text)) >= len(text)  # quadratic time would exceed the limit of the test


def test_a_text_of_many_kinds_of_delimiters_has_no_code() -> None:
    """Looking for the end of each kind would stop the server for minutes."""
    kinds = " ".join("`" * count for count in range(1, 1_400))
    assert escape(f"{kinds} `<b>`").endswith(" &#96;&lt;b&gt;&#96;")


def test_a_users_text_is_shown_verbatim() -> None:
    shown = verbatim("2*3*4 ![x](http://e/u)\n\n  a__b www.e.org $$x$$")
    assert "\n" not in shown and not set("*_![]$") & set(shown) and "://" not in shown and "www." not in shown
    assert html.unescape(shown) == "2*3*4 ![x](http://e/u)\n\n  a__b www.e.org $$x$$"
    assert verbatim("1. a (b)") == "&#49;&#46; a (b)" and verbatim("# a") == "&#35; a"


@settings(deadline=None)
@given(st.text(max_size=60))
def test_verbatim_changes_no_character(text: str) -> None:
    assert html.unescape(verbatim(text).replace("&#0;", "\0")) == text or "\r" in text or not text.isprintable()


def test_the_export_is_whole(upload: Callable[..., UploadedImage]) -> None:
    chat = Chat([turn_of("What?", "A box.", (upload(),), model="m", note="Stopped.")], model="m")
    content = json.loads(json.dumps(chat.export()))
    assert content["messages"] == [["USER", "<image>\nWhat?"], ["ASSISTANT", "A box."]]
    assert content["images"][0].startswith("data:image/png;base64,") and content["model"] == "m"
    assert content["turns"][0]["note"] == "Stopped." and content["turns"][0]["temperature"] == 0.8


# --- images -------------------------------------------------------------------------------------------------------


def stored(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes()))


def size_of(encoded: str) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(encoded))).size


def test_modes(upload: Callable[..., UploadedImage]) -> None:
    wide = upload(40, 20)
    sizes = {mode: size_of(wide.encode(mode)) for mode in PROCESS_MODES}
    assert sizes == {"Default": (40, 20), "Pad": (40, 40), "Crop": (20, 20), "Resize": (336, 336)}
    padded = Image.open(io.BytesIO(base64.b64decode(wide.encode("Pad"))))
    assert padded.getpixel((0, 0)) == (122, 116, 104) and padded.getpixel((20, 20)) == (200, 30, 30)
    with pytest.raises(ImageError, match="Unknown preprocess mode"):
        wide.encode("Stretch")


def test_an_ordinary_upload_is_sent_byte_for_byte(tmp_path: Path) -> None:
    for kind in ("png", "jpeg", "webp"):
        path = tmp_path / f"a.{kind}"
        Image.new("RGB", (64, 48), "blue").save(path)
        assert load_image(str(path)).data == path.read_bytes()


def test_other_uploads_are_converted_and_shown(tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    Image.new("CMYK", (64, 48)).save(path)
    loaded = load_image(str(path))
    assert Image.open(io.BytesIO(loaded.data)).format == "PNG" == stored(Path(loaded.path)).format


def test_a_transparent_upload_is_sent_over_white(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGBA", (64, 48)).save(path)
    loaded = load_image(str(path))
    assert Image.open(io.BytesIO(loaded.data)).getpixel((0, 0)) == (255, 255, 255) and loaded.path == str(path)


def test_a_large_upload_is_made_smaller(tmp_path: Path) -> None:
    path = tmp_path / "big.png"
    Image.new("L", (5000, 100)).save(path)
    assert size_of(base64.b64encode(load_image(str(path)).data).decode()) == (2048, 41)


@pytest.mark.parametrize("content", [b"", b"<svg onload=alert(1)>", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_what_is_no_image_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(ImageError):
        load_image(str(path))


@pytest.mark.parametrize("name", ["résumé.pdf", "a b.png", "[x](http://e).png"])
def test_a_refused_file_is_named_without_the_servers_folder(name: str, tmp_path: Path) -> None:
    path = tmp_path / name.replace("/", "_")
    path.write_bytes(b"%PDF-1.7")
    with pytest.raises(ImageError) as caught:
        load_image(str(path))
    assert path.name in str(caught.value) and str(tmp_path) not in str(caught.value)


def test_too_many_images_are_refused() -> None:
    with pytest.raises(ImageError, match="at most 8"):
        load_images(["x.png"] * (MAX_IMAGES + 1))


def test_examples_are_drawn_the_same_every_time(tmp_path: Path) -> None:
    first, second = draw_all(tmp_path / "a"), draw_all(tmp_path / "b")
    assert len(first) == len(EXAMPLES) == 4
    for (one, question), (two, _) in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes() and question.endswith(("?", "."))
        assert len(set(stored(one).convert("L").tobytes())) > 8  # something is on it
    assert set(write_icons(tmp_path)) == set(SHAPES)


# --- the log --------------------------------------------------------------------------------------------------------


def lines(folder: Path) -> list[dict[str, object]]:
    path = folder / f"{date.today().isoformat()}-conv.json"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def test_the_log_has_the_contracts_keys(tmp_path: Path, upload: Callable[..., UploadedImage]) -> None:
    log = ConversationLog(tmp_path / "logs", chats=True)
    chat = Chat([turn_of("Wás?\n", "Ein Ding.", (upload(),), model="m", started=5.00004)])
    log.chat(chat, chat.turns[-1], 7.123456, "10.0.0.1")
    log.vote("upvote", chat, "10.0.0.1")
    first, vote = lines(tmp_path / "logs")
    assert {"tstamp", "type", "model", "start", "finish", "state", "images", "ip"} <= set(first)
    assert (first["tstamp"], first["start"], first["finish"]) == (7.1235, 5.0, 7.1235)
    assert first["type"] == "chat" and first["ip"] == "10.0.0.1" and vote["type"] == "upvote"
    state = first["state"]
    assert isinstance(state, dict)
    assert set(state) == {"system", "roles", "messages", "offset", "sep", "sep2"}
    assert state["messages"] == [["USER", "<image>\nWás?\n"], ["ASSISTANT", "Ein Ding."]]
    (saved,) = (tmp_path / "logs" / "serve_images").rglob("*.jpg")
    assert first["images"] == [saved.stem] and stored(saved).format == "JPEG"
    assert saved.parent.name == date.today().isoformat()


def test_without_consent_only_votes_are_written(tmp_path: Path, upload: Callable[..., UploadedImage]) -> None:
    log = ConversationLog(tmp_path)
    chat = Chat([turn_of("secret", "x", (upload(),), model="m")])
    log.chat(chat, chat.turns[-1], 1.0, "10.0.0.1")
    assert lines(tmp_path) == [] and not (tmp_path / "serve_images").exists()
    log.vote("flag", chat, "10.0.0.1")
    (vote,) = lines(tmp_path)
    assert vote["type"] == "flag" and "ip" not in vote


def test_old_records_are_deleted(tmp_path: Path) -> None:
    old, recent = ((date.today() - timedelta(days=days)).isoformat() for days in (31, 29))
    for day in (old, recent):
        (tmp_path / f"{day}-conv.json").write_text("{}\n")
        (tmp_path / "serve_images" / day).mkdir(parents=True)
    (tmp_path / "notes-conv.json").write_text("mine")
    ConversationLog(tmp_path).vote("flag", Chat([turn_of("a", "b")]), "")
    left = {path.name for path in [*tmp_path.iterdir(), *(tmp_path / "serve_images").iterdir()]}
    assert old not in left and f"{old}-conv.json" not in left
    assert {recent, f"{recent}-conv.json", "notes-conv.json"} <= left


def test_a_full_disk_does_not_end_a_conversation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    told = ConversationLog(tmp_path / "file").vote("flag", Chat([turn_of("a", "b")]), "")
    assert "Cannot write the conversation log" in caplog.text and "could not be recorded" in told


def test_a_saved_image_has_no_metadata(tmp_path: Path) -> None:
    path = tmp_path / "gps.jpg"
    exif = Image.Exif()
    exif[0x8825] = {1: "N"}
    Image.new("RGB", (8, 8)).save(path, exif=exif)
    loaded = load_image(str(path))
    assert b"Exif" in loaded.data and b"Exif" not in as_jpeg(loaded)


def test_the_old_state_of_a_session_can_be_copied() -> None:
    """Gradio copies the initial value of a session's state."""
    import copy

    assert copy.deepcopy(Chat()).turns == [] and SimpleNamespace(**vars(Chat())).model is None
