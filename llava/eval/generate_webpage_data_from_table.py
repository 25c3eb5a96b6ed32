"""Build a web page of a judge's reviews: two answers to each question side by side, the scores, and the explanation.

    python llava/eval/generate_webpage_data_from_table.py --question Q.jsonl --baseline REFERENCE.jsonl \\
        --answers MODEL.jsonl [OTHER.jsonl ...] --reviews reviews/MODEL.jsonl [reviews/OTHER.jsonl ...] --output webpage

Writes OUTPUT/data.json and OUTPUT/index.html, a single file without external resources. The baseline is the first of
the two judged answers (`--answer-list`); reviews are in the order of the answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, TypedDict

from markdown_it import MarkdownIt

from llava.errors import ConfigError
from llava.eval.judging.reviews import SCORES
from llava.eval.program import file_flag, flag, program
from llava.eval.run.answers import read_results
from llava.eval.run.files import Record, Row, by_key, read_rows, require_same, write_json
from llava.files import write_text

# Links and images stay text, since the page has no external resources; so do backslashes, as in formulas, and entities.
_MARKDOWN: Final = MarkdownIt("commonmark", {"html": False, "breaks": True}).disable(
    ["autolink", "code", "entity", "escape", "image", "lheading", "link", "reference"]
)


def to_html(text: str) -> str:
    """Convert Markdown to HTML, with headings of one level; all other markup is escaped."""
    tokens = _MARKDOWN.parse(text)
    for token in tokens:
        token.tag = "h4" if token.type.startswith("heading") else token.tag
    return str(_MARKDOWN.renderer.render(tokens, _MARKDOWN.options, {}))


class PageData(TypedDict):
    """Content of `data.json`; questions are numbered 1 … n in the order of their file."""

    questions: list[Row]
    models: list[str]
    baseline: str


_ASSISTANT: Final = re.compile(r"(?<!\*)\bAssistant [12]\b(?!\*)")


def review_text(review: Record) -> str:
    """The text of a review without the line of scores, with the names of the assistants in bold."""
    text = str(review.get("content", review.get("text", "")))
    first, _, rest = text.lstrip().partition("\n")
    body = rest if SCORES.fullmatch(first) else text
    return _ASSISTANT.sub(lambda match: f"**{match[0]}**", body).strip()


def read_answers(path: Path, questions: Mapping[object, Record], name: str | None) -> tuple[str, dict[object, Row]]:
    """The name of a model (default: `model_id`, or the file's stem) and its answers by question."""
    rows = by_key(read_results(path), path, "question_id")
    require_same(rows, questions, path)
    return name or str(next(iter(rows.values())).get("model_id") or path.stem), rows


def build_data(
    question: Path, baseline: Path, answers: Sequence[Path], reviews: Sequence[Path], names: Sequence[str]
) -> PageData:
    """Join questions, answers and reviews."""
    if len(answers) != len(reviews):
        raise ConfigError(
            f"--answers has {len(answers)} files and --reviews {len(reviews)}; give one review per answer."
        )
    if names and len(names) != 1 + len(answers):
        raise ConfigError(f"--names expects {1 + len(answers)} names, the baseline's first; got {len(names)}.")
    questions = by_key(read_rows(question, "question_id", "text"), question, "question_id")
    given: list[str | None] = list(names) or [None] * (1 + len(answers))
    models = [read_answers(path, questions, name) for path, name in zip([baseline, *answers], given, strict=True)]
    if len(dict(models)) < len(models):
        raise ConfigError(f"Two files are by {models[0][0]!r}; distinguish them with --names.")
    judged = []
    for path in reviews:
        judged.append(by_key(read_rows(path, "question_id"), path, "question_id"))
        require_same(judged[-1], questions, path)
    opponents = list(zip([name for name, _ in models[1:]], judged, strict=True))
    rows = [
        {
            "id": number,
            "category": row.get("category", "default"),
            "question": row["text"],
            "answers": {name: found[key]["text"] for name, found in models},
            "evaluations": {name: review_text(found[key]) for name, found in opponents},
            "scores": {name: found[key].get("tuple", found[key].get("score")) for name, found in opponents},
        }
        for number, (key, row) in enumerate(questions.items(), 1)
    ]
    return {"questions": rows, "models": [name for name, _ in models], "baseline": models[0][0]}


def render_page(data: PageData) -> str:
    """The HTML page with all texts converted to safe HTML."""
    rows = [
        {**row, "question": to_html(row["question"])}
        | {part: {name: to_html(text) for name, text in row[part].items()} for part in ("answers", "evaluations")}
        for row in data["questions"]
    ]
    template = (Path(__file__).parent / "judging" / "page.html").read_text(encoding="utf-8")
    return template.replace("__DATA__", json.dumps({**data, "questions": rows}).replace("<", "\\u003c"))


def write_page(
    question: Path, baseline: Path, answers: Sequence[Path], reviews: Sequence[Path], output: Path, names: Sequence[str]
) -> str:
    data = build_data(question, baseline, answers, reviews, names)
    write_json(output / "data.json", data, indent=2)
    write_text(output / "index.html", render_page(data))
    return f"{output / 'index.html'}"


_LISTS = [file_flag("--answers", nargs="+"), file_flag("--reviews", nargs="+")]
_OUTPUT = file_flag("--output", default=Path("webpage"))
_NAMES = flag("--names", nargs="*", default=[], help="names of the baseline and the models (default: from the answers)")
main = program(__doc__, write_page, file_flag("--question"), file_flag("--baseline"), *_LISTS, _OUTPUT, _NAMES)

if __name__ == "__main__":
    raise SystemExit(main())
