"""Answer text questions with GPT-3.5 as a baseline: `-q QUESTIONS -o ANSWERS`.

A question without a reply gets the text `#ERROR#`, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llava.errors import RequestError
from llava.eval.judging.judge import Judge, base_url
from llava.eval.run.answers import answer_id
from llava.eval.run.files import Record, Row, read_rows
from llava.files import write_text
from llava.utils import guarded

logger = logging.getLogger(__name__)

MODEL = "gpt-3.5-turbo"
MODEL_ID = "gpt-3.5-turbo:20230327"
FAILED = "#ERROR#"


def answer(client: Judge, question: Record) -> Row:
    """The published record of one question."""
    try:
        text = client.ask(question["text"])
    except RequestError as error:
        logger.warning("Question %s: %s", question["question_id"], error)
        text = FAILED
    identifier = answer_id(MODEL_ID, question["question_id"], question["text"], text)
    return {"answer_id": identifier, "question_id": question["question_id"], "model_id": MODEL_ID, "text": text}


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-q", "--question", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--max-tokens", type=int, default=1024)
    args = parser.parse_args(argv)
    client = Judge(MODEL, base_url(None), args.max_tokens, tries=3)
    questions = read_rows(args.question, "question_id", "text")
    with ThreadPoolExecutor(32) as pool:
        rows = sorted(pool.map(lambda row: answer(client, row), questions), key=lambda row: row["question_id"])
    write_text(args.output, "\n".join(map(json.dumps, rows)))
    return 1 if any(row["text"] == FAILED for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
