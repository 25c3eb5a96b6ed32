"""Having a judge compare two answers to each question (spec/eval.md §5): appended as they come, resumable, recorded.

    OPENAI_BASE_URL=http://127.0.0.1:8000/v1 python llava/eval/eval_gpt_review_bench.py --question Q.jsonl \\
        --context C.jsonl --answer-list REFERENCE.jsonl MODEL.jsonl --output reviews/MODEL.jsonl

Published numbers need the original rule file and judge; beside the reviews, `OUTPUT.judge.json` says which ones were
used. Replies are kept in `OUTPUT.cache`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from llava.errors import ConfigError, DataError
from llava.eval.judging.judge import Judge, base_url
from llava.eval.program import file_flag, flag, program
from llava.eval.run.answers import cut_torn_line, lock
from llava.eval.run.files import by_key, read_json, read_results, read_rows, require_same, write_json
from llava.files import write_errors

logger = logging.getLogger(__name__)

FAILED: Final = (-1, -1)
_NUMBER: Final = r"(\d+(?:\.\d+)?)(?:/10)?"
SCORES: Final = re.compile(rf"\s*[(\[]?\s*{_NUMBER}(?:\s*,\s*|\s+){_NUMBER}\s*[)\]]?\s*")
PREFIXES: Final = ("gpt4_text", "reviews_", "review_")


def parse_scores(reply: str) -> tuple[float, float] | tuple[int, int]:
    """Two numbers on the first line that has text, or (mathematics) a tuple on the last; else `FAILED` (M12)."""
    lines = [line.strip() for line in reply.splitlines() if line.strip()]
    candidates = lines[:1] + [line for line in lines[-1:] if line.startswith(("(", "["))]
    for line in candidates:
        match = SCORES.fullmatch(line)
        if match:
            return float(match[1]), float(match[2])
    return FAILED


def score(reviews: Sequence[Mapping[str, Any]], ignore: Collection[int] = ()) -> dict[str, Any]:
    """Means of both scores per category and for `all`; `n_failed` counts judgements without scores."""
    groups: dict[str, list[Sequence[float]]] = {}
    failed = 0
    for review in reviews:
        if review.get("question_id") in ignore:
            continue
        pair = review.get("tuple", review.get("score"))
        if pair is None or len(pair) != 2:
            raise DataError(f"Review {review.get('id')!r} has neither 'tuple' nor 'score' with two numbers.")
        if tuple(pair) == FAILED:
            failed += 1
            continue
        for name in filter(None, ("all", review.get("category"))):
            groups.setdefault(name, []).append(pair)
    means = {
        name: [sum(pair[side] for pair in pairs) / len(pairs) for side in (0, 1)]
        for name, pairs in sorted(groups.items())
    }
    return {"n_failed": failed, "means": means}


def table(result: Mapping[str, Any]) -> str:
    """A line a category: name, 100 · second / first, 10 · first, 10 · second."""
    return "\n".join(
        f"{name} {100 * second / first if first else float('nan'):.1f} {10 * first:.1f} {10 * second:.1f}"
        for name, (first, second) in result["means"].items()
    )


def find_reviews(folder: Path) -> list[Path]:
    """A folder's files of reviews, by the published naming rule."""
    if not folder.is_dir():
        raise ConfigError(f"--dir {folder} is no folder.")
    everything = "review" in str(folder)
    return sorted(path for path in folder.glob("*.jsonl") if everything or path.name.startswith(PREFIXES))


def summarize(
    dir: Path | None, version: str | None, select: Sequence[str] | None, files: Sequence[Path], ignore: Sequence[int]
) -> str:
    """One block per file: its name and a line a category."""
    if dir is None and not files:
        raise ConfigError("Nothing to summarise: give --dir or --files.")
    paths = list(files) or find_reviews(Path() if dir is None else dir)
    blocks = []
    for path in paths:
        release = "0613" if "0613" in path.name else "0314"
        if (version and version != release) or not all(part in path.name for part in select or ()):
            continue
        result = score(read_rows(path), ignore)
        if result["n_failed"]:
            logger.warning("%s: %d failed judgement(s) are left out.", path.stem, result["n_failed"])
        blocks.append(f"{path.stem}\n{table(result)}\n" + "=" * 33)
    if not blocks:
        raise ConfigError("No file of reviews matches; correct --dir, --version or --select.")
    return "\n".join(blocks)


# --- Having a judge compare two answers to each question --------------------------------------------------------------


SYSTEM: Final = "You are a helpful and precise assistant for checking the quality of the answer."
RULES: Final = Path(__file__).parents[1] / "table" / "rule.json"

Row = Mapping[str, Any]


def no_context(row: Row | None) -> str:
    return ""


def caption_context(row: Row | None) -> str:
    """`caption`, a text or a list of them."""
    assert row is not None
    caption = row["caption"]
    return "\n".join(caption) if isinstance(caption, list) else str(caption)


def box_context(row: Row | None) -> str:
    """`captions`, a blank line, and a `category: bbox` line for each of `instances`."""
    assert row is not None
    boxes = "\n".join(f"{each['category']}: {each['bbox']}" for each in row["instances"])
    return "\n".join(row["captions"]) + "\n\n" + boxes


def message(question: str, answers: Sequence[str], rule: Row, context: str | None) -> str:
    """What the judge reads."""
    role = rule["role"]
    parts = [] if context is None else [f"[Context]\n{context}"]
    parts.append(f"[Question]\n{question}")
    for number, answer in enumerate(answers, 1):
        parts += [f"[{role} {number}]\n{answer}", f"[End of {role} {number}]"]
    return "".join(f"{part}\n\n" for part in (*parts, f"[System]\n{rule['prompt']}"))


def category_of(question: Row, rules: Mapping[str, Row], prefix: str, *, fallback: bool) -> str:
    """The rule of a question; `DataError` when there is none."""
    name = f"{prefix}{question.get('category', 'default')}"
    if name not in rules and fallback:
        return "default"
    if name not in rules:
        raise DataError(f"The rule file has no category {name!r} (question {question['question_id']!r}).")
    return name


def keep_finished(path: Path, items: Sequence[Row]) -> int:
    """How many reviews `path` holds, checked against what is to be reviewed.

    A torn last line is cut off, and so is all from the first review without scores: the cache knows what follows it.
    """
    cut_torn_line(path)
    rows = read_rows(path, "question_id")
    for number, row in enumerate(rows):
        wanted = items[number] if number < len(items) else {}
        keys = ("question_id", "answer1_id", "answer2_id")
        if any(key in row and row[key] != wanted.get(key) for key in keys):
            raise DataError(
                f"{path} line {number + 1} reviews another question or answer; remove it, or use another --output."
            )
    failed = [number for number, row in enumerate(rows) if tuple(row.get("tuple", ())) == FAILED]
    if failed:
        os.truncate(path, sum(map(len, path.read_bytes().splitlines(keepends=True)[: failed[0]])))
    return failed[0] if failed else len(rows)


def check_judge(path: Path, record: Row) -> None:
    """Refuse to continue reviews by another judge (wherever it is) or other rules, which `path` describes."""
    before = read_json(path) if path.is_file() else record
    differing = [key for key in record if key != "url" and before.get(key) != record[key]]
    if differing:
        key = differing[0]
        raise DataError(
            f"{path} says that the reviews were made with {key} {before.get(key)!r}, this run has {record[key]!r}; "
            "remove them, or use another --output."
        )


def judge_one(judge: Judge, text: str) -> tuple[str, tuple[float, float]]:
    """The judge's reply and its two scores; it is asked once more when there are none."""
    reply = judge.ask(text, SYSTEM)
    if parse_scores(reply) == FAILED:
        second = judge.ask(text, SYSTEM, afresh=True)
        reply = reply if parse_scores(second) == FAILED else second
    return reply, parse_scores(reply)


def collect(
    question: Path, answer_list: Sequence[Path], rules: Mapping[str, Row], contexts: Mapping[str, Row],
    describe: Callable[[Row | None], str], prefix: str, *, fallback: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """For each question the head of its record and, under `message`, what to ask."""
    if len(answer_list) != 2:
        raise DataError(f"--answer-list has {len(answer_list)} files; expected the reference's and the model's.")
    questions = by_key(read_rows(question, "question_id", "text"), question, "question_id")
    answers = [by_key(read_results(path), path, "question_id") for path in answer_list]
    for path, rows in zip(answer_list, answers, strict=True):
        require_same(rows, questions, path)
    items = []
    for number, (key, row) in enumerate(questions.items(), 1):
        category = category_of(row, rules, prefix, fallback=fallback)
        context = None
        if describe is not no_context:
            if row.get("image") not in contexts:
                raise DataError(f"The context file has no row for image {row.get('image')!r} (question {key!r}).")
            context = describe(contexts[row["image"]])
        texts = [rows[key]["text"] for rows in answers]
        head = {
            "id": number, "question_id": key, "answer1_id": answers[0][key].get("answer_id"),
            "answer2_id": answers[1][key].get("answer_id"), "category": category,
            "message": message(row["text"], texts, rules[category], context),
        }  # fmt: skip
        items.append(head)
    return items


@dataclass(frozen=True)
class Kind:
    """A kind of review: how the picture is described, and which rule a category has (`fallback`: else `default`)."""

    describe: Callable[[Row | None], str]
    prefix: str = ""
    fallback: bool = False


def review_files(
    judge: Judge, kind: Kind, question: Path, answer_list: Sequence[Path], rule: Path, output: Path,
    context: Path | None,
) -> None:  # fmt: skip
    """Append to `output` the reviews it lacks, and record the judge and the rules beside it."""
    rules = read_json(rule)
    contexts = {} if context is None else by_key(read_rows(context, "image"), context, "image")
    items = collect(question, answer_list, rules, contexts, kind.describe, kind.prefix, fallback=kind.fallback)
    record = {**judge.record(), "rule_sha256": hashlib.sha256(rule.read_bytes()).hexdigest()}
    beside = output.with_name(output.name + ".judge.json")
    with write_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        held = lock(output)
    with held:
        finished = keep_finished(output, items)
        if finished:
            check_judge(beside, record)
        write_json(beside, record, indent=2)
        append_reviews(judge, items[finished:], output)


def review_program(
    doc: str | None, describe: Callable[[Row | None], str], model: str, prefix: str = "", *, fallback: bool = False
) -> Callable[..., int]:
    """`main(argv)` of one kind of review: how the picture is described, the published judge, how rules are chosen."""
    kind = Kind(describe, prefix, fallback)

    def review(
        question: Path, answer_list: Sequence[Path], rule: Path, output: Path, max_tokens: int, judge: str,
        base: str | None, context: Path | None = None,
    ) -> str:  # fmt: skip
        asked = Judge(judge, base_url(base), max_tokens, cache=output.with_name(output.name + ".cache"))
        review_files(asked, kind, question, answer_list, rule, output, context)
        return f"{output}"

    files = [file_flag("-q", "--question"), file_flag("-a", "--answer-list", nargs="+"), file_flag("-o", "--output")]
    if describe is not no_context:
        files.append(file_flag("-c", "--context"))
    return program(
        doc,
        review,
        *files,
        file_flag("-r", "--rule", default=RULES),
        flag("--max-tokens", type=int, default=1024),
        flag("--judge", default=model, help="the judge's model (default %(default)s)"),
        flag("--base-url", dest="base", help="its address (default: OPENAI_BASE_URL)"),
    )


def append_reviews(judge: Judge, items: Sequence[dict[str, Any]], output: Path) -> None:
    """Judge each item and append its record; warns of judgements without scores."""
    failed = 0
    with write_errors(output), output.open("a", encoding="utf-8") as file:
        for item in items:
            reply, scores = judge_one(judge, item["message"])
            failed += scores == FAILED
            record = {key: value for key, value in item.items() if key != "message"}
            file.write(json.dumps({**record, "content": reply, "tuple": scores}) + "\n")
            file.flush()
    if failed:
        logger.warning(
            "%d of %d judgements have no scores and will be left out of the means; run again to ask for them anew.",
            failed, len(items),
        )  # fmt: skip
