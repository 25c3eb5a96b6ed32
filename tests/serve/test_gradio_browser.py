"""The page in a real Chromium: attach, ask, stream, stop, regenerate, vote, save, history, compare, and two widths."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llava.serve.common.protocol import ErrorType, ServeError
from llava.serve.web.examples import draw_all
from tests.serve.fake_service import FakeService, web_server
from tests.serve.stubs import until

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; apt-get install chromium"),
]
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing; pip install 'llava[dev]'")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
PATIENCE = 30_000  # milliseconds
ATTACK = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


@pytest.fixture(scope="module")
def service() -> Iterator[FakeService]:
    with FakeService(models=["alpha", "beta"]).serving() as running:
        yield running


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def site(service: FakeService, logs: Path, child_environment: dict[str, str]) -> Iterator[str]:
    with web_server(service, {**child_environment, "LOGDIR": str(logs)}, "--log-conversations") as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


class Page:
    """A loaded page, with the actions of the tests."""

    def __init__(
        self,
        browser: Any,
        address: str,
        size: tuple[int, int] = (1280, 900),
        scheme: str = "light",
        context: Any = None,
    ) -> None:
        look = {"viewport": {"width": size[0], "height": size[1]}, "color_scheme": scheme}
        self.page = context.new_page() if context else browser.new_page(**look)
        self.page.set_default_timeout(PATIENCE)
        self.faults: list[str] = []
        self.elsewhere: list[str] = []
        self.page.on("pageerror", lambda error: self.faults.append(f"{error.message}\n{error.stack}"))
        self.page.on("request", self._note)
        self.address = address
        self.page.goto(address)
        self.expect("#model_selector_row input").to_have_value(re.compile(".+"), timeout=PATIENCE)

    def _note(self, request: Any) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.elsewhere.append(request.url)

    def expect(self, selector: str) -> Any:
        return playwright.expect(self.page.locator(selector))

    def ask(self, text: str, where: str = "message") -> None:
        self.page.fill(f"#{where} textarea", text)
        self.page.locator(f"#{where} textarea").press("Enter")

    def sees(self, text: str, view: str = "chatbot") -> None:
        try:
            self.expect(f"#{view}").to_contain_text(text, timeout=PATIENCE)
        except AssertionError as error:
            error.add_note(f"notice: {self.page.locator('#notice').inner_text()!r}; faults: {self.faults}")
            raise

    def attach(self, *paths: Path, where: str = "message") -> None:
        with self.page.expect_file_chooser() as chooser:
            self.page.locator(f"#{where}").get_by_role("button", name="Upload a file").click()
        chooser.value.set_files(paths)
        self.expect(f"#{where} .thumbnail-item").to_have_count(len(paths), timeout=PATIENCE)

    def drawer(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def idle(self, where: str = "message") -> None:
        """Wait until the answer has ended: Send is there again."""
        self.expect(f"#{where} .submit-button").to_be_visible(timeout=PATIENCE)

    def close(self) -> None:
        self.page.close()
        assert self.faults == [] and self.elsewhere == []


@pytest.fixture
def afresh(service: FakeService) -> None:
    until(lambda: service.running == 0)  # what the page before asked has ended, so that its end is not counted here
    service.models, service.answers, service.delay, service.silence = ["alpha", "beta"], {}, 0.0, 0.0
    service.requests.clear()
    service.broken_off = 0


@pytest.fixture
def page(browser: Any, site: str, afresh: None) -> Iterator[Page]:
    page = Page(browser, site)
    yield page
    page.close()


class Elsewhere:
    """Another host: a server that records the paths it is asked for."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.paths.append(self.path)
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    other = Elsewhere()
    thread = threading.Thread(target=other.server.serve_forever, daemon=True)
    thread.start()
    yield other
    other.server.shutdown()
    other.server.server_close()
    thread.join()


def test_upload_ask_and_stream(page: Page, service: FakeService, tmp_path: Path) -> None:
    (chart, _), *_ = draw_all(tmp_path)
    service.delay, service.answers["alpha"] = 0.3, ["It says ", "**six** ", f"models. {ATTACK}"]
    service.silence = 0.5
    page.attach(chart)
    page.ask(f"What is this? {ATTACK}")
    page.expect("#chatbot .skeleton").to_be_visible(timeout=PATIENCE)
    page.sees("▌")
    page.expect("#message .stop-button").to_be_visible()
    page.sees("models. <script>window.hacked = 1</script>")
    page.idle()
    page.expect("#chatbot .model-name").to_have_text("alpha")
    page.expect("#chatbot strong").to_have_text("six")
    page.expect("#chatbot").to_contain_text("What is this? <script>window.hacked = 1</script>")
    page.expect("#chatbot .message img").to_have_count(1)
    assert page.page.evaluate("window.hacked") is None
    assert base64.b64decode(service.requests[0]["images"][0]) == chart.read_bytes()
    page.expect("#message textarea").to_have_value("")
    page.expect("#message .thumbnail-item").to_have_count(0)
    page.ask("And why?")
    page.expect("#chatbot .bot").to_have_count(2, timeout=PATIENCE)
    until(lambda: len(service.requests) == 2)
    assert service.requests[1]["images"] == service.requests[0]["images"]


def test_no_text_makes_the_browser_ask_another_host(page: Page, service: FakeService, elsewhere: Elsewhere) -> None:
    loads = [
        "![a]({}/1) ![b][r]\n\n[r]: {}/2\n\n",
        "<img src={}/3> \\` ![c]({}/4) \\` and x ``` <img src={}/5> ![d]({}/6)\n\n",
        "<svg><image href={}/7></svg><link rel=stylesheet href={}/8><div style='background:url({}/9)'>t</div>\n\n",
        "<iframe src={}/11></iframe> [j](javascript:f()) {}/12\n\n",
        "`$$` <img src={}/13> `$$`\n\n$$\\frac{{a}}{{b}}$$ \\[x_1 < y\\] \\(z\\) `\\(code\\)`\n\n",
        "para\n     ```\n\n<img src={}/10>\n\n```\n\nthe end",
    ]
    service.answers["alpha"] = [
        text.replace("{}/", f"{elsewhere.url}/").replace("{{", "{").replace("}}", "}") for text in loads
    ]
    text = f"2*3*4 ![x]({elsewhere.url}/u)\n\n  two  spaces\n# a_b_c $$x$$ <b>"
    page.ask(text)
    page.sees("the end")
    page.idle()
    user = page.page.locator("#chatbot .user .message-content")
    assert user.inner_text() == text and user.locator("a, em, img, .katex").count() == 0
    page.expect("#chatbot .bot .katex").to_have_count(3, timeout=PATIENCE)
    assert page.page.locator("#chatbot .bot code", has_text="code").inner_text() == "\\(code\\)"
    assert page.page.locator("#chatbot a[href^='javascript']").count() == 0
    assert page.page.evaluate("document.querySelector('#chatbot').innerText.includes('<iframe src=')")
    # even markup that gets onto the page loads nothing
    page.page.evaluate(
        """(url) => { document.body.insertAdjacentHTML("beforeend", `<img src=${url}/a><video src=${url}/b></video>
            <link rel=stylesheet href=${url}/c><iframe src=${url}/d></iframe>
            <i style="background:url(${url}/e)">x</i>`);
        return fetch(url).catch(() => null); }""",
        elsewhere.url,
    )
    page.page.wait_for_function("document.querySelector('body > img').complete")
    assert elsewhere.paths == []
    page.elsewhere.clear()  # what the browser has blocked


def test_a_file_that_is_no_image_keeps_the_message(page: Page, service: FakeService, tmp_path: Path) -> None:
    for name, content in (("résumé.pdf", b"%PDF-1.7"), ("bad.png", b"\x89PNG\r\n\x1a\nxxxx"), ("a.svg", b"<svg/>")):
        (tmp_path / name).write_bytes(content)
        page.attach(tmp_path / name)
        page.ask("What does it say?")
        page.expect("#notice").to_contain_text(f"Cannot read image {name}: its content is not", timeout=PATIENCE)
        page.expect("#message textarea").to_have_value("What does it say?")
        assert "/" not in page.page.locator("#notice").inner_text() and service.requests == []
        page.page.locator("#message .thumbnail-item").hover()
        page.page.locator("#message").get_by_role("button", name="Remove file").click()
        page.expect("#message .thumbnail-item").to_have_count(0, timeout=PATIENCE)
    page.expect(".toast-body").to_have_count(0)
    page.page.click("#message .submit-button")
    page.sees("A red circle.")


def test_stop_reaches_the_worker(page: Page, service: FakeService) -> None:
    service.answers["alpha"], service.delay = ["word "] * 2000, 0.02
    page.ask("Go on")
    page.sees("word word")
    page.page.fill("#message textarea", "typed meanwhile")
    page.page.click("#message .stop-button")
    page.sees("Stopped.")
    until(lambda: service.broken_off == 1 and service.running == 0)
    page.idle()
    page.expect("#message textarea").to_have_value("typed meanwhile")


@pytest.mark.usefixtures("afresh")
def test_closing_the_page_reaches_the_worker(browser: Any, site: str, service: FakeService) -> None:
    service.answers["alpha"], service.delay = ["word "] * 2000, 0.02
    other = Page(browser, site)
    other.ask("Go on")
    other.sees("word word")
    other.close()
    until(lambda: service.broken_off == 1 and service.running == 0, seconds=60)


def test_regenerate_vote_save_new(page: Page, service: FakeService, logs: Path) -> None:
    page.ask("First?")
    page.sees("A red circle.")
    service.answers["alpha"] = ["A **blue** `a<b` square <x>."]
    page.idle()
    page.page.fill("#message textarea", "typed")
    page.page.locator("#chatbot").get_by_role("button", name="Retry").click()
    page.sees("A blue a<b square <x>.")
    page.idle()
    page.expect("#chatbot").not_to_contain_text("A red circle.")
    page.expect("#message textarea").to_have_value("typed")
    assert service.requests[0]["prompt"] == service.requests[1]["prompt"]
    page.page.locator("#chatbot").get_by_role("button", name="Like", exact=True).click()
    page.expect("#notice").to_contain_text("Thank you for your vote.", timeout=PATIENCE)
    log = next(logs.glob("*-conv.json")).read_text(encoding="utf-8")
    vote = json.loads(log.splitlines()[-1])
    assert vote["type"] == "upvote" and vote["ip"]
    assert vote["state"]["messages"][-1][1] == "A **blue** `a<b` square <x>."
    page.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.page.locator("#chatbot .message-buttons-left").get_by_role("button", name="Copy message").click()
    copied = "navigator.clipboard.readText().then((text) => text === 'A **blue** `a<b` square <x>.')"
    page.page.wait_for_function(copied)
    page.drawer("Conversations")
    with page.page.expect_download() as download:
        page.page.click("#save")
    saved = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert download.value.suggested_filename == "conversation.json"
    assert saved["turns"][0]["text"] == "First?" and saved["model"] == "alpha"
    page.page.click("#new")
    page.expect("#chatbot .message").to_have_count(0)


@pytest.mark.usefixtures("afresh")
def test_conversations_stay_in_the_browser(browser: Any, site: str, service: FakeService, tmp_path: Path) -> None:
    (chart, _), *_ = draw_all(tmp_path)
    context = browser.new_context()
    first = Page(browser, site, context=context)
    first.attach(chart)
    first.ask("What is the first?")
    first.sees("A red circle.")
    first.idle()
    first.drawer("Conversations")
    first.expect("#past .gallery-item").to_have_text("What is the first?")
    first.page.click("#new")
    first.ask("What is the second?")
    first.expect("#past .gallery-item").to_have_count(2, timeout=PATIENCE)
    first.close()
    second = Page(browser, site, context=context)
    second.drawer("Conversations")
    second.page.locator("#past .gallery-item", has_text="first").click()
    second.sees("What is the first?")
    second.expect("#chatbot .user img").to_be_visible()
    second.ask("And then?")
    until(lambda: len(service.requests) == 3)
    assert service.requests[2]["images"] == service.requests[0]["images"]
    assert service.requests[2]["prompt"].startswith(service.requests[0]["prompt"])
    second.idle()
    second.expect("#past .gallery-item").to_have_text(["What is the first?", "What is the second?"], timeout=PATIENCE)
    second.page.click("#delete")
    second.expect("#past .gallery-item").to_have_text(["What is the second?"])
    second.expect("#chatbot .message").to_have_count(0)
    second.close()
    context.close()


def test_a_conversation_that_does_not_fit_costs_no_other(page: Page) -> None:
    script = """() => [["a", 1], ["b", 2e7], ["c", 1], ["c", 2e7]].map(([id, size]) =>
        JSON.parse(window.llava.store(JSON.stringify({ id, title: id, text: "x".repeat(size) }))))"""
    small, large, later, grown = page.page.evaluate(script)
    assert small == {"titles": [["a", "a"]], "full": False} and large == {**small, "full": True}
    assert later == {"titles": [["c", "c"], ["a", "a"]], "full": False} and grown == {**later, "full": True}


def test_a_login_does_not_see_the_conversations_of_another(page: Page) -> None:
    script = """() => ["ann", "bob", "ann"].map((name) => {
        window.gradio_config.username = name;
        window.llava.store(JSON.stringify({ id: name, title: name }));
        return JSON.parse(window.llava.titles()).titles.flat().concat(JSON.parse(window.llava.find("ann"))?.id);
    })"""
    assert page.page.evaluate(script) == [["ann", "ann", "ann"], ["bob", "bob", None], ["ann", "ann", "ann"]]


def test_an_example_fills_both_boxes(page: Page, service: FakeService) -> None:
    page.page.get_by_role("button", name="Extract the text as JSON.").click()
    page.expect("#message textarea").to_have_value("Extract the text as JSON.")
    page.expect("#message .thumbnail-item img").to_be_visible(timeout=PATIENCE)
    page.page.click("#message .submit-button")
    page.sees("A red circle.")
    assert len(service.requests[0]["images"]) == 1


def test_an_error_is_shown(page: Page, service: FakeService) -> None:
    service.answers["alpha"] = ["Half an ", ServeError(ErrorType.OUT_OF_MEMORY, "").frame("r-7")]
    page.ask("Hello")
    page.expect("#chatbot .error-card strong").to_have_text("The worker ran out of memory.", timeout=PATIENCE)
    page.expect("#chatbot .error-card p").to_have_text("Send a shorter message or fewer images.")
    page.sees("Half an")
    page.idle()


def test_two_models_side_by_side(page: Page, service: FakeService, logs: Path) -> None:
    service.answers["beta"] = ["A blue square."]
    page.page.get_by_role("tab", name="Compare two models").click()
    page.expect("#model_right input").to_have_value("beta", timeout=PATIENCE)
    page.ask("What?", "compare_message")
    page.sees("A red circle.", "chatbot_left")
    page.sees("A blue square.", "chatbot_right")
    page.page.click("#rightvote")
    page.expect("#rightvote").to_be_disabled(timeout=PATIENCE)
    lines = next(logs.glob("*-conv.json")).read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[-1])["type"] == "rightvote" and json.loads(lines[-1])["models"] == ["alpha", "beta"]
    page.page.click("#compare_clear")
    page.page.get_by_label("Blind").check()
    page.expect("#model_left").to_be_hidden(timeout=PATIENCE)
    page.ask("What now?", "compare_message")
    page.sees("Model A", "chatbot_left")
    page.sees("Model B", "chatbot_right")
    page.idle("compare_message")
    page.page.click("#tievote")
    page.expect("#chatbot_left .model-name, #chatbot_right .model-name").to_have_text(
        [re.compile("^(alpha|beta)$")] * 2, timeout=PATIENCE
    )
    page.page.get_by_role("button", name="Votes").click()
    page.expect("#votes").to_contain_text("beta", timeout=PATIENCE)


def test_models_come_and_go_without_a_reload(page: Page, service: FakeService) -> None:
    service.models = []
    page.expect("#banner").to_contain_text("No worker has registered", timeout=PATIENCE)
    page.expect("#model_selector_row input").to_have_value("", timeout=PATIENCE)
    service.models = ["gamma"]
    page.expect("#model_selector_row input").to_have_value("gamma", timeout=PATIENCE)
    page.expect("#banner").to_be_hidden(timeout=PATIENCE)
    page.ask("Are you new?")
    page.sees("A red circle.")
    assert service.requests[0]["model"] == "gamma"


SHOTS = os.environ.get("LLAVA_SCREENSHOTS")
LOOKS = [(1280, 900, "light"), (390, 844, "light"), (1280, 900, "dark"), (390, 844, "dark")]
ANSWER = ["Five points **fall** from left to right:\n\n", "1. the first at 9\n2. the last at 2\n\n", "`y = 10 - 1.6 x`"]


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize(("width", "height", "scheme"), LOOKS if SHOTS else LOOKS[:2])
def test_the_page_fits(
    width: int, height: int, scheme: str, browser: Any, site: str, service: FakeService, tmp_path: Path
) -> None:
    """Nothing is cut off or scrolls sideways. LLAVA_SCREENSHOTS=FOLDER saves screenshots, light and dark."""
    (chart, _), *_ = draw_all(tmp_path)
    service.answers["alpha"] = ANSWER
    other = Page(browser, site, (width, height), scheme)
    for view, box, tab in (("chatbot", "message", "Chat"), ("chatbot_left", "compare_message", "Compare two models")):
        other.page.get_by_role("tab", name=tab).click()
        other.attach(chart, where=box)
        if SHOTS:
            other.page.screenshot(path=Path(SHOTS) / f"{tab.split()[0].lower()}-attached-{width}-{scheme}.png")
        if view == "chatbot":  # without scrolling
            other.expect(f"#{box} .thumbnail-item").to_be_in_viewport(ratio=1)
            other.expect(f"#{box} .submit-button").to_be_in_viewport(ratio=1)
        other.ask("A rather long question about the image, with more words than one line of a phone can hold?", box)
        other.sees("the last at 2", view)
        other.idle(box)
        assert other.page.evaluate("document.documentElement.scrollWidth") <= width
        specks = (
            """() => [...document.querySelectorAll('.message-buttons')].map(e => e.getBoundingClientRect().width)"""
        )
        assert all(width == 0 or width > 8 for width in other.page.evaluate(specks))
        cut = """() => [...document.querySelectorAll('button, label, input, textarea')]
            .filter(e => e.checkVisibility({visibilityProperty: true}) && e.getBoundingClientRect().right > innerWidth)
            .map(e => e.outerHTML.slice(0, 80))"""
        assert other.page.evaluate(cut) == []
        if SHOTS:
            other.page.screenshot(path=Path(SHOTS) / f"{tab.split()[0].lower()}-{width}-{scheme}.png")
    other.close()
