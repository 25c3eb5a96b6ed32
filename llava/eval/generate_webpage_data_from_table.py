"""A page to read a judge's reviews: two answers to each question side by side, the scores, and what the judge wrote.

    python llava/eval/generate_webpage_data_from_table.py --question Q.jsonl --baseline REFERENCE.jsonl \\
        --answers MODEL.jsonl [OTHER.jsonl ...] --reviews reviews/MODEL.jsonl [reviews/OTHER.jsonl ...] --output webpage

Writes OUTPUT/data.json and OUTPUT/index.html, which opens from the disk. The baseline is the first of the two answers
that were judged (`--answer-list`); reviews are given in the order of the answers.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.errors import ConfigError
from llava.eval.judging.page import PAGE, to_html
from llava.eval.judging.reviews import SCORES
from llava.eval.program import file_flag, flag, program
from llava.eval.run.files import by_key, read_results, read_rows, require_same, write_json
from llava.files import write_text

Rows = Mapping[Any, Mapping[str, Any]]

ASSISTANT = re.compile(r"(?<!\*)\bAssistant [12]\b(?!\*)")


def words_of(review: Mapping[str, Any]) -> str:
    """What the judge wrote, without the line of scores, the two assistants in bold."""
    text = str(review.get("content", review.get("text", "")))
    first, _, rest = text.lstrip().partition("\n")
    body = rest if SCORES.fullmatch(first) else text
    return ASSISTANT.sub(lambda match: f"**{match[0]}**", body).strip()


def read_answers(path: Path, questions: Rows, name: str | None) -> tuple[str, Rows]:
    """A model's name (given, else `model_id`, else the file's) and its answers by question."""
    rows = by_key(read_results(path), path, "question_id")
    require_same(rows, questions, path)
    return name or str(next(iter(rows.values())).get("model_id") or path.stem), rows


def collect(
    question: Path, baseline: Path, answers: Sequence[Path], reviews: Sequence[Path], names: Sequence[str]
) -> dict[str, Any]:
    """The content of `data.json`; questions are numbered 1 … n in the order of their file."""
    if len(answers) != len(reviews):
        raise ConfigError(f"--answers has {len(answers)} files and --reviews {len(reviews)}; give one for each.")
    if names and len(names) != 1 + len(answers):
        raise ConfigError(f"--names has {len(names)} names; give {1 + len(answers)}, the baseline's first.")
    questions = by_key(read_rows(question, "question_id", "text"), question, "question_id")
    given: list[str | None] = list(names) or [None] * (1 + len(answers))
    models = [read_answers(path, questions, name) for path, name in zip([baseline, *answers], given, strict=True)]
    if len(dict(models)) < len(models):
        raise ConfigError(f"Two files are by {models[0][0]!r}; tell them apart by --names.")
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
            "evaluations": {name: words_of(found[key]) for name, found in opponents},
            "scores": {name: found[key].get("tuple", found[key].get("score")) for name, found in opponents},
        }
        for number, (key, row) in enumerate(questions.items(), 1)
    ]
    return {"questions": rows, "models": [name for name, _ in models], "baseline": models[0][0]}


def rendered(data: Mapping[str, Any]) -> str:
    """The page with the data inside, every text as safe HTML."""
    rows = [
        {**row, "question": to_html(row["question"])}
        | {part: {name: to_html(text) for name, text in row[part].items()} for part in ("answers", "evaluations")}
        for row in data["questions"]
    ]
    inside = json.dumps({**data, "questions": rows}).replace("<", "\\u003c")
    return PAGE.replace("__DATA__", inside)


def write(
    question: Path, baseline: Path, answers: Sequence[Path], reviews: Sequence[Path], output: Path, names: Sequence[str]
) -> str:
    data = collect(question, baseline, answers, reviews, names)
    write_json(output / "data.json", data, indent=2)
    write_text(output / "index.html", rendered(data))
    return f"{output / 'index.html'}"


_MANY = [file_flag("--answers", nargs="+"), file_flag("--reviews", nargs="+")]
_WHERE = file_flag("--output", default=Path("webpage"))
_NAMES = flag("--names", nargs="*", default=[], help="of the baseline and then the models (default: from the answers)")
main = program(__doc__, write, file_flag("--question"), file_flag("--baseline"), *_MANY, _WHERE, _NAMES)

if __name__ == "__main__":
    sys.exit(main())
