"""Pairwise reviews: a judge compares two answers to each question.

    OPENAI_BASE_URL=http://127.0.0.1:8000/v1 python llava/eval/eval_gpt_review_bench.py --question Q.jsonl \\
        --context C.jsonl --answer-list REFERENCE.jsonl MODEL.jsonl --output reviews/MODEL.jsonl

Reviews are appended as they arrive and resumed after an interruption. `OUTPUT.judge.json` records the judge and the
rules, `OUTPUT.cache` the replies. Published scores need the original rule file and judge.
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
from typing import Final, TypedDict

from llava.errors import ConfigError, DataError
from llava.eval.judging.judge import Judge, base_url
from llava.eval.program import file_flag, flag, program
from llava.eval.run.answers import final_answer, read_results
from llava.eval.run.files import Record, Row, by_key, read_json, read_rows, require_same, write_json
from llava.files import drop_partial_line, lock_file, write_errors

logger = logging.getLogger(__name__)

SYSTEM: Final = "You are a helpful and precise assistant for checking the quality of the answer."
DEFAULT_RULES: Final = Path(__file__).parents[1] / "table" / "rule.json"
Pair = tuple[float, float]
FAILED: Final[Pair] = (-1, -1)
_NUMBER: Final = r"(\d+(?:\.\d+)?)(?:\s*/\s*10|\s+out of 10)?"
SCORES: Final = re.compile(
    rf"(?:(?:the )?scores?\s*(?:are\s*)?:?\s*)?[(\[]?\s*{_NUMBER}\s*(?:[,;|&]|\band\b|\s)\s*{_NUMBER}\s*[)\]]?\.?",
    re.IGNORECASE,
)
_SIDE: Final = r"(?:[a-z]+\s+)?{}(?:\s+score|'s score)?\s*[:=]\s*"
NAMED_SCORES: Final = re.compile(
    rf"{_SIDE.format('(?:1|a)')}{_NUMBER}\s*(?:[,;.|&]|\band\b|\s)*\s*{_SIDE.format('(?:2|b)')}{_NUMBER}\.?",
    re.IGNORECASE,
)
PREFIXES: Final = ("gpt4_text", "reviews_", "review_")


@dataclass(frozen=True)
class ReviewType:
    """How the judge is asked.

    `context` formats the row of the context file that describes the image, None if there is no context. `prefix` is the
    prefix of rule names. With `fallback`, questions of other categories use the rule `default`.
    """

    context: Callable[[Record], str] | None = None
    prefix: str = ""
    fallback: bool = False


def caption_context(row: Record) -> str:
    """`caption`, a string or a list of strings."""
    caption = row["caption"]
    return "\n".join(caption) if isinstance(caption, list) else str(caption)


def box_context(row: Record) -> str:
    """`captions`, a blank line, and a line `category: bbox` for each of `instances`."""
    boxes = "\n".join(f"{each['category']}: {each['bbox']}" for each in row["instances"])
    return "\n".join(row["captions"]) + "\n\n" + boxes


TEXT: Final = ReviewType(fallback=True)
VISUAL: Final = ReviewType(box_context)
BENCH: Final = ReviewType(caption_context, "llava_bench_")


@dataclass(frozen=True)
class ReviewFiles:
    """Paths of a review: questions, the two answers files (reference first), output, image contexts, and rules."""

    question: Path
    answer_list: Sequence[Path]
    output: Path
    context: Path | None = None
    rule: Path = DEFAULT_RULES


class ReviewScores(TypedDict):
    """Mean scores of both answers per category and for `all`, and the number of judgements without scores."""

    n_failed: int
    means: dict[str, Pair]


def plain_lines(reply: str) -> list[str]:
    """The lines of a judge's reply that are not empty, without thinking and Markdown."""
    lines = (re.sub(r"[*_`#]", "", line).strip() for line in final_answer(reply).splitlines())
    return list(filter(None, lines)) or [""]


def parse_scores(reply: str) -> Pair:
    """The two scores of a reply; `FAILED` if it is not clear which numbers they are.

    They stand alone on the first or on the last line (`8 9`, `8, 9.`, `(8, 9)`, `8/10 and 9/10`), or are named on the
    first ones (`Assistant 1: 8, Assistant 2: 9`).
    """
    lines = plain_lines(reply)
    found = (
        SCORES.fullmatch(lines[0]) or NAMED_SCORES.fullmatch(lines[0]) or NAMED_SCORES.fullmatch(" ".join(lines[:2]))
    )
    found = found or SCORES.fullmatch(lines[-1])
    return FAILED if found is None else (float(found[1]), float(found[2]))


def score_reviews(reviews: Sequence[Record], ignore: Collection[int] = ()) -> ReviewScores:
    """Mean scores of reviews, without the questions in `ignore` and judgements without scores."""
    groups: dict[str, list[Sequence[float]]] = {}
    failed = 0
    for review in reviews:
        if review.get("question_id") in ignore:
            continue
        pair = review.get("tuple", review.get("score"))
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(n, (int, float)) for n in pair):
            raise DataError(f"Review {review.get('id')!r} has neither 'tuple' nor 'score' with two numbers.")
        if tuple(pair) == FAILED:
            failed += 1
            continue
        for name in filter(None, ("all", review.get("category"))):
            groups.setdefault(name, []).append(pair)
    means = {}
    for name, pairs in sorted(groups.items()):
        first, second = (sum(pair[side] for pair in pairs) / len(pairs) for side in (0, 1))
        means[name] = (first, second)
    return {"n_failed": failed, "means": means}


def format_means(means: Mapping[str, Pair]) -> str:
    """One line per category: name, 100 · second / first, 10 · first, 10 · second."""
    return "\n".join(
        f"{name} {100 * second / first if first else float('nan'):.1f} {10 * first:.1f} {10 * second:.1f}"
        for name, (first, second) in means.items()
    )


def find_reviews(folder: Path) -> list[Path]:
    """The review files of a folder, by the published naming rule."""
    if not folder.is_dir():
        raise ConfigError(f"--dir {folder} is not a folder.")
    any_name = "review" in str(folder)
    return sorted(path for path in folder.glob("*.jsonl") if any_name or path.name.startswith(PREFIXES))


def summarize(
    dir: Path | None, version: str | None, select: Sequence[str] | None, files: Sequence[Path], ignore: Sequence[int]
) -> str:
    """`summarize_gpt_review`: the name of each file and one line per category."""
    if dir is None and not files:
        raise ConfigError("Nothing to summarize; give --dir or --files.")
    blocks = []
    for path in list(files) or find_reviews(Path() if dir is None else dir):
        release = "0613" if "0613" in path.name else "0314"
        if (version and version != release) or not all(part in path.name for part in select or ()):
            continue
        scores = score_reviews(read_rows(path), ignore)
        if scores["n_failed"]:
            logger.warning("%s: %d failed judgement(s) are excluded.", path.stem, scores["n_failed"])
        blocks.append(f"{path.stem}\n{format_means(scores['means'])}\n" + "=" * 33)
    if not blocks:
        raise ConfigError("No review file matches --dir, --version and --select.")
    return "\n".join(blocks)


def judge_prompt(question: str, answers: Sequence[str], rule: Record, context: str | None) -> str:
    """The user message sent to the judge."""
    role = rule["role"]
    parts = [] if context is None else [f"[Context]\n{context}"]
    parts.append(f"[Question]\n{question}")
    for number, answer in enumerate(answers, 1):
        parts += [f"[{role} {number}]\n{answer}", f"[End of {role} {number}]"]
    return "".join(f"{part}\n\n" for part in (*parts, f"[System]\n{rule['prompt']}"))


def rule_name(question: Record, rules: Mapping[str, Record], review_type: ReviewType) -> str:
    """The name of the rule for a question. Raises `DataError` if there is none."""
    name = f"{review_type.prefix}{question.get('category', 'default')}"
    if name not in rules and review_type.fallback:
        return "default"
    if name not in rules:
        raise DataError(f"The rule file has no category {name!r} (question {question['question_id']!r}).")
    return name


def build_items(review_type: ReviewType, files: ReviewFiles) -> list[Row]:
    """For each question, the first fields of its record and the prompt for the judge under `message`."""
    if len(files.answer_list) != 2:
        raise DataError(
            f"--answer-list expects two files, the reference's and the model's; got {len(files.answer_list)}."
        )
    rules = read_json(files.rule)
    contexts = {} if files.context is None else by_key(read_rows(files.context, "image"), files.context, "image")
    questions = by_key(read_rows(files.question, "question_id", "text"), files.question, "question_id")
    answers = [by_key(read_results(path), path, "question_id") for path in files.answer_list]
    for path, rows in zip(files.answer_list, answers, strict=True):
        require_same(rows, questions, path)
    items = []
    for number, (key, row) in enumerate(questions.items(), 1):
        category = rule_name(row, rules, review_type)
        context = None
        if review_type.context is not None:
            if row.get("image") not in contexts:
                raise DataError(f"The context file has no row for image {row.get('image')!r} (question {key!r}).")
            context = review_type.context(contexts[row["image"]])
        first, second = (rows[key] for rows in answers)
        items.append(
            {
                "id": number, "question_id": key, "answer1_id": first.get("answer_id"),
                "answer2_id": second.get("answer_id"), "category": category,
                "message": judge_prompt(row["text"], [first["text"], second["text"]], rules[category], context),
            }
        )  # fmt: skip
    return items


def keep_finished(path: Path, items: Sequence[Record]) -> int:
    """Truncate a review file to its finished reviews and return their number.

    Removes a partial last line, and everything from the first review without scores; the cache has the replies. Raises
    `DataError` if the file reviews other questions or answers.
    """
    drop_partial_line(path)
    rows = read_rows(path, "question_id")
    for number, row in enumerate(rows):
        expected = items[number] if number < len(items) else {}
        keys = ("question_id", "answer1_id", "answer2_id")
        if any(key in row and row[key] != expected.get(key) for key in keys):
            raise DataError(
                f"{path} line {number + 1} reviews another question or answer; remove it, or use another --output."
            )
    failed = [number for number, row in enumerate(rows) if tuple(row.get("tuple", ())) == FAILED]
    if failed:
        os.truncate(path, sum(map(len, path.read_bytes().splitlines(keepends=True)[: failed[0]])))
    return failed[0] if failed else len(rows)


def check_judge(path: Path, record: Record) -> None:
    """Raise `DataError` if the judge or the rules in `path` differ from `record`; the URL may differ."""
    before = read_json(path) if path.is_file() else record
    differing = [key for key in record if key != "url" and before.get(key) != record[key]]
    if differing:
        key = differing[0]
        raise DataError(
            f"The reviews of {path} were made with {key} {before.get(key)!r}, this run has {record[key]!r}; remove "
            "them, or use another --output."
        )


def judge_pair(judge: Judge, prompt: str) -> tuple[str, Pair]:
    """The judge's reply and its two scores. A reply without scores is requested once more."""
    reply = judge.ask(prompt, SYSTEM)
    if parse_scores(reply) == FAILED:
        second = judge.ask(prompt, SYSTEM, use_cache=False)
        reply = reply if parse_scores(second) == FAILED else second
    return reply, parse_scores(reply)


def append_reviews(judge: Judge, items: Sequence[Record], output: Path) -> None:
    """Judge each item and append its record. Warns about judgements without scores."""
    failed = 0
    with write_errors(output), output.open("a", encoding="utf-8") as file:
        for item in items:
            reply, scores = judge_pair(judge, item["message"])
            failed += scores == FAILED
            record = {key: value for key, value in item.items() if key != "message"}
            file.write(json.dumps({**record, "content": reply, "tuple": scores}) + "\n")
            file.flush()
    if failed:
        logger.warning(
            "%d of %d judgements have no scores and are excluded from the means; run again to retry them.",
            failed, len(items),
        )  # fmt: skip


def review_files(judge: Judge, review_type: ReviewType, files: ReviewFiles) -> None:
    """Append the missing reviews to the output, and record the judge and the rules beside it."""
    output = files.output
    items = build_items(review_type, files)
    record = {**judge.settings(), "rule_sha256": hashlib.sha256(files.rule.read_bytes()).hexdigest()}
    judge_file = output.with_name(output.name + ".judge.json")
    with lock_file(output):
        finished = keep_finished(output, items)
        if finished:
            check_judge(judge_file, record)
        write_json(judge_file, record, indent=2)
        append_reviews(judge, items[finished:], output)


def review_program(doc: str | None, review_type: ReviewType, model: str) -> Callable[..., int]:
    """`main(argv)` of a review program whose default judge is `model`."""

    def review(
        question: Path, answer_list: Sequence[Path], rule: Path, output: Path, max_tokens: int, judge: str,
        base: str | None, context: Path | None = None,
    ) -> str:  # fmt: skip
        client = Judge(judge, base_url(base), max_tokens, cache=output.with_name(output.name + ".cache"))
        review_files(client, review_type, ReviewFiles(question, answer_list, output, context, rule))
        return f"{output}"

    files = [file_flag("-q", "--question"), file_flag("-a", "--answer-list", nargs="+"), file_flag("-o", "--output")]
    if review_type.context is not None:
        files.append(file_flag("-c", "--context"))
    return program(
        doc,
        review,
        *files,
        file_flag("-r", "--rule", default=DEFAULT_RULES),
        flag("--max-tokens", type=int, default=1024),
        flag("--judge", default=model, help="model name of the judge (default %(default)s)"),
        flag("--base-url", dest="base", help="base URL of the judge's API (default: OPENAI_BASE_URL)"),
    )
