"""Look at what training sees of a record: `llava inspect-data data.json --model DIR --version v1 [--html FILE]`.

Ids and labels come from the very functions that training calls. In the terminal, what is learned is green, what is
only read is plain, images are yellow, and what `--model_max_length` cuts off is red; the page has the same colours and
shows a token's id under the pointer. `--model` is any directory with the tokenizer; no weights are read.
"""

from __future__ import annotations

import argparse
import html
import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import get_template
from llava.data.annotations import read_records
from llava.data.dataset import record_example
from llava.data.labels import truncate
from llava.data.records import Record, parse_record
from llava.errors import LlavaError
from llava.files import write_text
from llava.model.tokenizer import load_tokenizer
from llava.train.model_setup import template_name
from llava.utils import guarded

LEARNED, READ, IMAGE, CUT = "learned", "read", "image", "cut"
COLORS: Final = {LEARNED: "\033[32m", READ: "", IMAGE: "\033[33m", CUT: "\033[31m"}
STYLE: Final = """body{font:15px/1.5 system-ui;max-width:60em;margin:2em auto;padding:0 1em;background:#fff;color:#222}
pre{white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid #ccc;padding:1em;border-radius:6px}
.learned{background:#c8efc8}.image{background:#ffe08a}.cut{background:#ffd0d0;text-decoration:line-through}
.bad{color:#b00}i{font-style:normal}"""


@dataclass(frozen=True)
class View:
    """One record as training sees it: (id, kind, piece) of every token, and a line that sums it up."""

    title: str
    tokens: list[tuple[int, str, str]]
    summary: str


def view(record: Record, title: str, tokenizer: Any, template: str, image_tokens: int) -> View:
    """The record as it would be trained on; an image stands for `image_tokens` positions of the language model."""
    whole = record_example(record, tokenizer, get_template(template))
    limit = tokenizer.model_max_length
    kept = truncate(whole, limit)
    cut = len(whole.input_ids) - len(kept.input_ids)
    texts_left = len(kept.input_ids) - len(record.image) if cut else len(whole.input_ids)
    tokens: list[tuple[int, str, str]] = []
    for token, label in zip(whole.input_ids.tolist(), whole.labels.tolist()):
        if token == IMAGE_TOKEN_INDEX:
            tokens.append((token, IMAGE, f"<image {sum(t[1] == IMAGE for t in tokens) + 1}>"))
            continue
        kind = CUT if texts_left <= 0 else READ if label == IGNORE_INDEX else LEARNED
        texts_left -= 1
        tokens.append((token, kind, str(tokenizer.convert_ids_to_tokens(token))))
    learned = int((kept.labels != IGNORE_INDEX).sum())
    images = len(record.image)
    positions = len(kept.input_ids) + images * (image_tokens - 1)
    summary = f"{len(kept.input_ids)} ids, {learned} learned; {positions} positions with {images} images"
    summary += f" of {image_tokens} each" if images else ""
    summary += f"; {cut} ids cut at --model_max_length {limit}" if cut else ""
    named = ", ".join(record.image)
    return View(title + (f", {named}" if named else ""), tokens, summary)


def as_text(page: View, tokenizer: Any, *, color: bool) -> str:
    """The view for a terminal; without `color`, kinds are written as ⟦learned⟧, ‹image› and ✂cut✂."""
    marks = {LEARNED: ("⟦", "⟧"), READ: ("", ""), IMAGE: ("‹", "›"), CUT: ("✂", "✂")}
    out = []
    for kind, run in itertools.groupby(page.tokens, key=lambda token: token[1]):
        group = list(run)
        text = "".join(piece for *_, piece in group) if kind == IMAGE else tokenizer.decode([t for t, *_ in group])
        before, after = (COLORS[kind], "\033[0m" if COLORS[kind] else "") if color else marks[kind]
        out.append(f"{before}{_printable(text)}{after}")
    return f"{page.title}\n{''.join(out)}\n{page.summary}\n"


def _printable(text: str) -> str:
    """Without the control characters that would speak to the terminal."""
    return "".join(char if char in "\n\t" or char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def as_html(pages: Sequence[View | str], title: str) -> str:
    """One page for all views; a string stands for a record that cannot be shown."""
    body = []
    for page in pages:
        if isinstance(page, str):
            body.append(f'<p class="bad">{html.escape(page)}</p>')
            continue
        marks = "".join(
            f'<i class="{kind}" title="{token}">{html.escape(_readable(piece))}</i>'
            for token, kind, piece in page.tokens
        )
        body.append(f"<h2>{html.escape(page.title)}</h2><pre>{marks}</pre><p>{html.escape(page.summary)}</p>")
    key = " ".join(f'<i class="{kind}">{kind}</i>' for kind in COLORS)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html>{head}<h1>{html.escape(title)}</h1><p>{key}</p>{''.join(body)}\n"


def _readable(piece: str) -> str:
    return (
        piece.replace("\u2581", " ").replace("<0x0A>", "\u21b5\n").replace("\u0120", " ").replace("\u010a", "\u21b5\n")
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llava inspect-data", description=__doc__)
    parser.add_argument("file", metavar="FILE", help="annotations: .json, .jsonl or .parquet")
    parser.add_argument("--model", required=True, metavar="DIR", help="a model, or any directory with its tokenizer")
    parser.add_argument("--version", default="v1", help="conversation template, as in training (default: %(default)s)")
    parser.add_argument("--model_max_length", type=int, default=2048, help="as in training (default: %(default)s)")
    parser.add_argument("--records", type=int, nargs="+", metavar="INDEX", help="which records (default: the first)")
    parser.add_argument("--samples", type=int, default=3, help="how many from the first on (default: %(default)s)")
    parser.add_argument("--image_tokens", type=int, default=576, help="positions an image takes (default: %(default)s)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page instead of printing")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="colours in the terminal")
    return parser


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    tokenizer = load_tokenizer(Path(args.model), model_max_length=args.model_max_length, padding_side="right")
    records, template = read_records(args.file), template_name(args.version)
    pages: list[View | str] = []
    for index in args.records if args.records is not None else range(min(args.samples, len(records))):
        try:
            record = parse_record(records[index])
            pages.append(view(record, f"record {index}", tokenizer, template, args.image_tokens))
        except IndexError as error:
            pages.append(f"{error}.")
        except LlavaError as error:
            pages.append(f"record {index} is bad: {error.args[0]}")
    if args.html:
        write_text(args.html, as_html(pages, f"{args.file}, template {args.version}"))
        print(f"{args.html}: {len(pages)} records.")  # noqa: T201 - a program
    else:
        color = args.color == "always" or (
            args.color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ
        )
        for page in pages:
            print(page if isinstance(page, str) else as_text(page, tokenizer, color=color))  # noqa: T201
    return int(any(isinstance(page, str) for page in pages))


if __name__ == "__main__":
    sys.exit(main())
