"""The page of `generate_webpage_data_from_table`: one file, nothing fetched; `__DATA__` stands for the reviews."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from typing import Final

_BOLD = re.compile(r"\*\*(?=\S)(.+?)(?<=\S)\*\*")
_ITALIC = re.compile(r"(?<![\w*])\*(?=[^\s*])([^*]+?)(?<=[^\s*])\*(?![\w*])")
_CODE = re.compile(r"`([^`]+)`")
_ITEM = re.compile(r"\s*(?:[-*+]|(\d+)[.)])\s+(.*)")
_HEADING = re.compile(r"#{1,6}\s+(.*)")


def to_html(text: str) -> str:
    """HTML of a text in Markdown."""
    return "".join(_blocks(text.replace("\r\n", "\n").split("\n")))


def inline(text: str) -> str:
    """Bold, italics and code inside a line."""
    parts = re.split(_CODE, text)
    return "".join(
        f"<code>{escape(part)}</code>" if at % 2 else _emphasis(escape(part)) for at, part in enumerate(parts)
    )


def _emphasis(text: str) -> str:
    return _ITALIC.sub(r"<em>\1</em>", _BOLD.sub(r"<strong>\1</strong>", text))


def _blocks(lines: list[str]) -> Iterator[str]:
    at = 0
    while at < len(lines):
        line = lines[at]
        if line.strip().startswith("```"):
            end = next((n for n in range(at + 1, len(lines)) if lines[n].strip().startswith("```")), len(lines))
            code = "\n".join(lines[at + 1 : end])
            yield f"<pre><code>{escape(code)}</code></pre>"
            at = end + 1
        elif not line.strip():
            at += 1
        elif match := _HEADING.match(line):
            yield f"<h4>{inline(match[1])}</h4>"
            at += 1
        else:
            same = _ITEM.match if _ITEM.match(line) else _plain
            end = next((n for n in range(at, len(lines)) if not same(lines[n])), len(lines))
            yield _list(lines[at:end]) if same is not _plain else _paragraph(lines[at:end])
            at = end


def _plain(line: str) -> bool:
    """Whether a line goes on with a paragraph."""
    return bool(line.strip()) and not (_ITEM.match(line) or _HEADING.match(line) or line.strip().startswith("```"))


def _paragraph(lines: list[str]) -> str:
    return f"<p>{'<br>'.join(map(inline, lines))}</p>"


def _list(lines: list[str]) -> str:
    found = [match for line in lines if (match := _ITEM.match(line))]
    tag = "ol" if found[0][1] else "ul"
    start = f' start="{int(found[0][1])}"' if tag == "ol" and int(found[0][1]) != 1 else ""
    return f"<{tag}{start}>{''.join(f'<li>{inline(match[2])}</li>' for match in found)}</{tag}>"


# --- The page of `generate_webpage_data_from_table` -------------------------------------------------------------------


_STYLE: Final = """
:root { color-scheme: light dark; --page: #fbfbfa; --box: #fff; --code: #f1f1ef; --ink: #37352f; --soft: #6f6e6b;
        --line: #e3e2e0; --link: #0b6e99; --win: #3d7a59; --lose: #b9b8b4; --tie: #8658a8; }
@media (prefers-color-scheme: dark) {
  :root { --page: #191919; --box: #212121; --code: #2c2c2c; --ink: #e6e6e4; --soft: #9b9a97;
          --line: #3a3a3a; --link: #6cb7dc; --win: #6fbf94; --lose: #6a6966; --tie: #b794d6; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 28px 20px 60px; color: var(--ink); background: var(--page);
       font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
nav { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; margin-bottom: 18px; }
nav select { flex: 1 1 160px; min-width: 0; }
select, button { font: inherit; padding: 6px 10px; border: 1px solid var(--line); border-radius: 6px;
                 color: inherit; background: var(--box); }
button { cursor: pointer; } button:disabled { color: var(--lose); cursor: default; }
.card { background: var(--box); border: 1px solid var(--line); border-radius: 8px; padding: 14px 18px;
        margin-bottom: 14px; }
.card > h3 { display: flex; justify-content: space-between; gap: 12px; margin: 0 0 8px; font-size: 16px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; }
@media (max-width: 720px) { .pair { grid-template-columns: 1fr; gap: 0; } }
.score { font-weight: 600; white-space: nowrap; color: var(--soft); }
.win { border-top: 4px solid var(--win); } .win .score { color: var(--win); }
.lose { border-top: 4px solid var(--lose); }
.tie { border-top: 4px solid var(--tie); } .tie .score { color: var(--tie); }
.text { overflow-wrap: anywhere; } .text p { margin: 0 0 8px; }
.text pre { white-space: pre-wrap; background: var(--code); padding: 10px; border-radius: 6px; }
.text h4 { margin: 10px 0 6px; }
.text.short { max-height: 200px; overflow: hidden; mask-image: linear-gradient(#000 70%, transparent); }
.more { border: none; background: none; color: var(--link); padding: 4px 0 0; }
"""

_BODY: Final = """
<nav>
  <select id="category" aria-label="Category"></select>
  <select id="question" aria-label="Question"></select>
  <select id="opponent" aria-label="Model"></select>
  <button id="previous">Previous</button><button id="next">Next</button>
</nav>
<div class="card"><h3>Question</h3><div class="text" id="asked"></div></div>
<div class="pair"><div class="card" id="left"></div><div class="card" id="right"></div></div>
<div class="card"><h3>What the judge wrote</h3><div class="text" id="review"></div></div>
"""

_SCRIPT: Final = """
const data = JSON.parse(document.getElementById("data").textContent), at = (id) => document.getElementById(id);
const opponents = data.models.filter((name) => name !== data.baseline);
const fill = (list, pairs) => list.replaceChildren(...pairs.map(([value, text]) => new Option(text, value)));
const plain = (html) => { const box = document.createElement("template"); box.innerHTML = html;
  return box.content.textContent; };
const inCategory = () => data.questions.filter((row) => !at("category").value || row.category === at("category").value);
function collapse(text) {
  text.parentElement.querySelector(".more")?.remove();
  text.classList.remove("short");
  if (text.scrollHeight <= 220) return;
  text.classList.add("short");
  const more = Object.assign(document.createElement("button"), { className: "more", textContent: "Show all" });
  more.onclick = () => { text.classList.remove("short"); more.remove(); };
  text.after(more);
}
function card(box, name, number, html, mine, theirs) {
  const known = mine >= 0 && theirs >= 0, mark = mine > theirs ? " \\u{1F3C6}" : "";
  box.className = "card " + (!known ? "" : mine > theirs ? "win" : mine < theirs ? "lose" : "tie");
  const title = document.createElement("h3"), label = document.createElement("span"), score = label.cloneNode();
  label.textContent = `Assistant ${number}: ${name}`; score.className = "score";
  score.textContent = known ? `${mine} / 10${mark}` : "no score";
  const text = Object.assign(document.createElement("div"), { className: "text", innerHTML: html });
  title.append(label, score); box.replaceChildren(title, text); collapse(text);
}
function show() {
  const row = data.questions.find((each) => each.id === Number(at("question").value)), name = at("opponent").value;
  const [first, second] = row.scores[name] ?? [-1, -1], order = inCategory().map((each) => each.id);
  at("asked").innerHTML = row.question; at("review").innerHTML = row.evaluations[name]; collapse(at("review"));
  card(at("left"), name, 2, row.answers[name], second, first);
  card(at("right"), data.baseline, 1, row.answers[data.baseline], first, second);
  at("previous").disabled = row.id === order[0]; at("next").disabled = row.id === order.at(-1);
}
function list() {
  fill(at("question"), inCategory().map((row) => [row.id, `${row.id}. ${plain(row.question).slice(0, 80)}`])); show();
}
function step(by) {
  const order = inCategory().map((row) => row.id);
  at("question").value = order[order.indexOf(Number(at("question").value)) + by]; show();
}
const categories = [...new Set(data.questions.map((row) => row.category))];
fill(at("category"), [["", "All categories"], ...categories.map((name) => [name, name])]);
fill(at("opponent"), opponents.map((name) => [name, `${name} and ${data.baseline}`]));
at("category").onchange = list; at("question").onchange = show; at("opponent").onchange = show;
at("previous").onclick = () => step(-1); at("next").onclick = () => step(1);
list();
"""

PAGE: Final = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width"><title>Reviews</title>'
    f"<style>{_STYLE}</style></head><body>{_BODY}"
    '<script type="application/json" id="data">__DATA__</script>'
    f"<script>{_SCRIPT}</script></body></html>\n"
)
