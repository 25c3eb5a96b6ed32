"""Show records as training sees them: `llava inspect-data data.json --model DIR --version v1 [--html FILE]`.

Ids and labels come from the functions that training calls. In the terminal, supervised tokens are green, context is
plain, images are yellow, and tokens truncated at `--model_max_length` are red; the page has the same colors and shows
the id of a token under the pointer. `--model` is any directory with the tokenizer; no weights are read.

With `--micro_batch_tokens T --global_batch_size G`, print how full and how balanced the micro-batches of training are.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Final, cast

from jinja2 import Template
from transformers import PreTrainedTokenizerBase

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import get_template
from llava.data.annotations import read_records
from llava.data.dataset import record_example
from llava.data.labels import truncate
from llava.data.records import Record, parse_record
from llava.errors import LlavaError
from llava.files import write_text
from llava.model.checkpoint import read_json
from llava.model.tokenizer import load_tokenizer
from llava.train.estimate_inputs import SIZE_KEYS, RecipeFlags, shape_from_flags
from llava.train.flops import Shape, Trainable
from llava.train.model_setup import template_name
from llava.train.packing_report import SampledRun, packing_report
from llava.utils import guarded

SUPERVISED, CONTEXT, IMAGE, TRUNCATED = "supervised", "context", "image", "truncated"
COLORS: Final = {SUPERVISED: "\033[32m", CONTEXT: "", IMAGE: "\033[33m", TRUNCATED: "\033[31m"}
MARKS: Final = {SUPERVISED: ("⟦", "⟧"), CONTEXT: ("", ""), IMAGE: ("‹", "›"), TRUNCATED: ("✂", "✂")}


@dataclass(frozen=True)
class RecordView:
    """A record as training sees it: (id, kind, piece) of every token, and a summary line."""

    title: str
    tokens: list[tuple[int, str, str]]
    summary: str


def view_record(
    record: Record, title: str, tokenizer: PreTrainedTokenizerBase, template: str, image_tokens: int
) -> RecordView:
    """Tokenize and classify a record; an image takes `image_tokens` positions of the language model."""
    example = record_example(record, tokenizer, get_template(template))
    limit = tokenizer.model_max_length
    kept = truncate(example, limit)
    images, cut = len(record.image), len(example.input_ids) - len(kept.input_ids)
    text_left = len(kept.input_ids) - images if cut else len(example.input_ids)
    tokens: list[tuple[int, str, str]] = []
    for token, label in zip(example.input_ids.tolist(), example.labels.tolist()):
        if token == IMAGE_TOKEN_INDEX:
            tokens.append((token, IMAGE, f"<image {sum(t[1] == IMAGE for t in tokens) + 1}>"))
            continue
        kind = TRUNCATED if text_left <= 0 else CONTEXT if label == IGNORE_INDEX else SUPERVISED
        text_left -= 1
        tokens.append((token, kind, str(tokenizer.convert_ids_to_tokens(token))))
    supervised = int((kept.labels != IGNORE_INDEX).sum())
    positions = len(kept.input_ids) + images * (image_tokens - 1)
    summary = f"{len(kept.input_ids)} ids, {supervised} supervised; {positions} positions with {images} images"
    summary += f" of {image_tokens} each" if images else ""
    summary += f"; {cut} ids truncated at --model_max_length {limit}" if cut else ""
    names = [f"{len(image)} bytes" if isinstance(image, bytes) else image for image in record.image]
    return RecordView(", ".join([title, *names]), tokens, summary)


def as_text(view: RecordView, tokenizer: PreTrainedTokenizerBase, *, color: bool) -> str:
    """The view for a terminal; without `color`, tokens are marked ⟦supervised⟧, ‹image› and ✂truncated✂."""
    out = []
    for kind, run in itertools.groupby(view.tokens, key=lambda token: token[1]):
        group = list(run)
        text = "".join(piece for *_, piece in group) if kind == IMAGE else tokenizer.decode([t for t, *_ in group])
        before, after = (COLORS[kind], "\033[0m" if COLORS[kind] else "") if color else MARKS[kind]
        out.append(f"{before}{_printable(text)}{after}")
    return f"{view.title}\n{''.join(out)}\n{view.summary}\n"


def _printable(text: str) -> str:
    """Replace control characters, which could send commands to the terminal."""
    return "".join(char if char in "\n\t" or char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def as_html(views: Sequence[RecordView | str], title: str) -> str:
    """One page of all views; a string is the error of a bad record."""
    source = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    template = Template(source, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return f"{template.render(title=title, views=views, kinds=list(COLORS), readable=_readable)}\n"


def _readable(piece: str) -> str:
    """A token of SentencePiece or byte-level BPE with its spaces and line breaks visible."""
    for mark, text in (("\u2581", " "), ("<0x0A>", "\u21b5\n"), ("\u0120", " "), ("\u010a", "\u21b5\n")):
        piece = piece.replace(mark, text)
    return piece


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llava inspect-data", description=__doc__)
    parser.add_argument("file", metavar="FILE", help="annotation file: .json, .jsonl or .parquet")
    parser.add_argument("--model", required=True, metavar="DIR", help="a model, or any directory with its tokenizer")
    parser.add_argument("--version", default="v1", help="conversation template, as in training (default: %(default)s)")
    parser.add_argument("--model_max_length", type=int, default=2048, help="as in training (default: %(default)s)")
    parser.add_argument("--records", type=int, nargs="+", metavar="INDEX", help="records to show (default: the first)")
    parser.add_argument("--samples", type=int, default=3, help="number of first records to show (default: %(default)s)")
    parser.add_argument("--image_tokens", type=int, default=576, help="positions per image (default: %(default)s)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write an HTML page instead of printing")
    packing = parser.add_argument_group("packing")
    for name, default, text in (
        ("micro_batch_tokens", None, "token budget of a micro-batch: print fill and balance instead of records"),
        ("global_batch_size", 128, "records of an optimizer step (default: %(default)s)"),
        ("ranks", 8, "number of GPUs (default: %(default)s)"),
        ("loss_group_size", None, "records of a loss group (default: the global batch divided by the ranks)"),
        ("steps", 50, "number of steps, spread over the epoch (default: %(default)s)"),
        ("seed", 42, "as in training (default: %(default)s)"),
    ):
        packing.add_argument(f"--{name}", type=int, default=default, help=text)
    packing.add_argument("--group_by_modality_length", action="store_true", help="as in training")
    packing.add_argument("--vision_tower", help="as in training, for its FLOPs (default: that of a chat model)")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="colors in the terminal")
    return parser


def shape_of_directory(directory: Path, vision_tower: str | None) -> Shape | None:
    """Shape of the language model and tower that `config.json` describes; None if it is not a LLaMA-like one."""
    file = directory / "config.json"
    config = read_json(file) if file.is_file() else {}
    if any(key not in config for key in SIZE_KEYS):
        return None
    flags = SimpleNamespace(
        model_name_or_path=str(directory),
        vision_tower=vision_tower or config.get("mm_vision_tower"),
        mm_vision_image_size=config.get("mm_vision_image_size"),
        mm_vision_select_layer=config.get("mm_vision_select_layer", -1),
        mm_vision_select_feature=config.get("mm_vision_select_feature", "patch"),
        mm_projector_type=config.get("mm_projector_type", "mlp2x_gelu"),
    )
    return shape_from_flags(cast("RecipeFlags", flags))


def sampled_run(args: argparse.Namespace) -> SampledRun:
    shape = shape_of_directory(Path(args.model), args.vision_tower)
    return SampledRun(
        *(Path(args.file), Path(args.model), args.version, args.model_max_length),
        shape=shape,
        trainable=Trainable(),
        image_tokens=(shape.image_tokens if shape else 0) or args.image_tokens,
        ranks=args.ranks,
        budget=args.micro_batch_tokens,
        global_batch=args.global_batch_size,
        group=args.loss_group_size,
        by_modality=args.group_by_modality_length,
        seed=args.seed,
        steps=args.steps,
    )


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.micro_batch_tokens is not None:
        print(packing_report(sampled_run(args)))  # noqa: T201 - a program
        return 0
    tokenizer = load_tokenizer(Path(args.model), model_max_length=args.model_max_length, padding_side="right")
    records, template = read_records(args.file), template_name(args.version)
    views: list[RecordView | str] = []
    for index in args.records if args.records is not None else range(min(args.samples, len(records))):
        try:
            record = parse_record(records[index])
            views.append(view_record(record, f"record {index}", tokenizer, template, args.image_tokens))
        except IndexError as error:
            views.append(f"{error}.")
        except LlavaError as error:
            views.append(f"record {index} is bad: {error.args[0]}")
    if args.html:
        write_text(args.html, as_html(views, f"{args.file}, template {args.version}"))
        print(f"{args.html}: {len(views)} records.")  # noqa: T201 - a program
    else:
        on_terminal = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        color = args.color == "always" or (args.color == "auto" and on_terminal)
        for view in views:
            print(view if isinstance(view, str) else as_text(view, tokenizer, color=color))  # noqa: T201
    return int(any(isinstance(view, str) for view in views))


if __name__ == "__main__":
    sys.exit(main())
