"""A little Markdown as safe HTML: everything is escaped first, then paragraphs, lists, headings, bold and code appear.

Links and pictures stay text, so that nothing a model wrote can fetch or run anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape

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
