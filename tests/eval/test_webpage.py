"""Web page of reviews: published data keys, escaped HTML, and its controls in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from llava.eval import generate_webpage_data_from_table as pages
from tests.eval.conftest import write_jsonl


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    questions = [{"question_id": 7 + n, "text": f"Q{n}?", "category": f"c{n % 2}"} for n in range(3)]
    write_jsonl(tmp_path / "q.jsonl", questions)
    for name in ("ref", "one", "two"):
        rows = [{"question_id": 7 + n, "text": f"{name} **{n}** <img src=x>", "model_id": name} for n in range(3)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    reviews = [{"question_id": 7 + n, "content": f"8 {6 + 2 * n}\nAssistant 1 is **good**.", "tuple": [8, 6 + 2 * n]}
               for n in range(3)]  # fmt: skip
    for name in ("one", "two"):
        write_jsonl(tmp_path / f"r_{name}.jsonl", reviews)
    words = ["--question", "q.jsonl", "--baseline", "ref.jsonl", "--answers", "one.jsonl", "two.jsonl"]
    words += ["--reviews", "r_one.jsonl", "r_two.jsonl", "--output", "page"]
    return [str(tmp_path / word) if "." in word or word == "page" else word for word in words]


def test_data_has_the_published_keys(flags: list[str], tmp_path: Path) -> None:
    assert pages.main(flags) == 0
    data = json.loads((tmp_path / "page" / "data.json").read_text())
    assert data["models"] == ["ref", "one", "two"]
    first = data["questions"][0]
    assert list(first) == ["id", "category", "question", "answers", "evaluations", "scores"]
    assert [row["id"] for row in data["questions"]] == [1, 2, 3] and first["category"] == "c0"
    assert first["answers"]["one"] == "one **0** <img src=x>" and first["scores"] == {"one": [8, 6], "two": [8, 6]}
    assert first["evaluations"]["one"] == "**Assistant 1** is **good**."


def test_the_page_is_complete_and_escaped(flags: list[str], tmp_path: Path) -> None:
    assert pages.main([*flags, "--names", "R", "A", "B"]) == 0
    page = (tmp_path / "page" / "index.html").read_text()
    assert "__DATA__" not in page and not re.search(r"https?://|<img", page)
    inside = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])  # type: ignore[index]
    assert inside["questions"][0]["answers"]["A"] == "<p>one <strong>0</strong> &lt;img src=x&gt;</p>\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda flags: [*flags, "--names", "x"], "--names expects 3 names"),
        (lambda flags: [*flags, "--reviews", flags[-3]], "give one review per answer"),
        (lambda flags: [*flags, "--answers", flags[3], flags[5]], "distinguish them with --names"),
    ],
)
def test_errors_are_reported_in_one_line(
    flags: list[str], change: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pages.main(change(flags)) == 2  # type: ignore[operator]
    assert message in capsys.readouterr().err


MARKDOWN = {
    r"\(a\) \\ &lt;": "<p>\\(a\\) \\\\ &amp;lt;</p>\n",
    "a\nb\n\nc": "<p>a<br />\nb</p>\n<p>c</p>\n",
    "# T\n- x\n- *y*": "<h4>T</h4>\n<ul>\n<li>x</li>\n<li><em>y</em></li>\n</ul>\n",
    "3. x\n4. y": '<ol start="3">\n<li>x</li>\n<li>y</li>\n</ol>\n',
    "```py\n<b>\n```\nz": '<pre><code class="language-py">&lt;b&gt;\n</code></pre>\n<p>z</p>\n',
    "`a*b*` 2 * 3 * 4": "<p><code>a*b*</code> 2 * 3 * 4</p>\n",
    "[x](javascript:alert(1))": "<p>[x](javascript:alert(1))</p>\n",
    "[x]: https://a.b": "<p>[x]: https://a.b</p>\n",
    "```\nopen": "<pre><code>open</code></pre>\n",
    "": "",
}


@pytest.mark.parametrize(("text", "html"), MARKDOWN.items())
def test_markdown(text: str, html: str) -> None:
    assert pages.to_html(text) == html


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_the_page_in_a_browser(flags: list[str], tmp_path: Path) -> None:
    assert pages.main(flags) == 0
    page = tmp_path / "page" / "index.html"
    steps = '<script>at("category").value = "c0"; list(); step(1);</script>'
    page.write_text(page.read_text().replace("</body>", f"{steps}</body>"), encoding="utf-8")
    quiet = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = ["chromium", "--headless", *quiet, profile, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    shown = done.stdout.split('id="data"')[0]
    assert "<p>Q2?</p>" in shown and 'class="card win" id="left"' in shown and "10 / 10" in shown
    assert shown.index("Assistant 2: ") < shown.index("Assistant 1: ")  # as the judge calls them
    assert re.search(r'id="next"[^>]*disabled', shown)
