"""Judged reviews against a loopback judge: messages, scores, cache, retries, resumption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava.errors import ConfigError, RequestError
from llava.eval import (
    eval_gpt_review,
    eval_gpt_review_bench,
    eval_gpt_review_visual,
    qa_baseline_gpt35,
    summarize_gpt_review,
)
from llava.eval.judging import reviews
from llava.eval.judging.judge import OPENAI_URL, Judge, base_url
from llava.eval.judging.reviews import DEFAULT_RULES
from llava.eval.run.remote_model import auth_headers
from llava.files import lock_file
from tests.eval.conftest import read_jsonl, write_jsonl
from tests.eval.fake_server import FakeServer


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    rows = [{"question_id": n, "image": "0.jpg", "text": f"Q{n}?", "category": "conv"} for n in range(3)]
    files = [write_jsonl(tmp_path / "q.jsonl", rows)]
    for side in ("ref", "new"):
        made = [{"question_id": n, "text": f"{side} {n}", "answer_id": f"{side}{n}"} for n in range(3)]
        files.append(write_jsonl(tmp_path / f"{side}.jsonl", made))
    question, *answers = map(str, files)
    return ["-q", question, "-a", *answers, "-o", str(tmp_path / "out" / "r.jsonl")]


def context(tmp_path: Path, **row: Any) -> list[str]:
    return ["-c", str(write_jsonl(tmp_path / "c.jsonl", [{"image": "0.jpg", **row}]))]


def test_bench_reviews_are_recorded_with_their_judge(judge: FakeServer, flags: list[str], tmp_path: Path) -> None:
    given = [*flags, *context(tmp_path, caption=["One.", "Two."])]
    assert eval_gpt_review_bench.main([*given, "--judge", "m", "--max-tokens", "7"]) == 0
    rows = read_jsonl(tmp_path / "out" / "r.jsonl")
    assert [row["question_id"] for row in rows] == [0, 1, 2]
    assert rows[0] == {
        "id": 1, "question_id": 0, "answer1_id": "ref0", "answer2_id": "new0", "category": "llava_bench_conv",
        "content": "8 9\nfine", "tuple": [8.0, 9.0],
    }  # fmt: skip
    body = judge.bodies[0]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 7, 0.2)
    assert set(judge.paths) == {"/v1/chat/completions"}
    record = json.loads((tmp_path / "out" / "r.jsonl.judge.json").read_text())
    assert (record["model"], record["url"]) == ("m", judge.url) and len(record["rule_sha256"]) == 64


def test_bundled_rules_and_the_other_review_types(judge: FakeServer, flags: list[str], tmp_path: Path) -> None:
    rules = json.loads(DEFAULT_RULES.read_text(encoding="utf-8"))
    kinds = {"conv", "detail", "complex"}
    assert rules.keys() == {"default", "coding", "math"} | kinds | {f"llava_bench_{kind}" for kind in kinds}
    boxes = [{"category": "dog", "bbox": [0.1, 0.2, 0.3, 0.4]}]
    visual = [*flags, *context(tmp_path, captions=["One.", "Two."], instances=boxes)]
    assert eval_gpt_review_visual.main(visual) == 0
    asked = judge.bodies[0]["messages"][1]["content"]
    assert asked.startswith(
        "[Context]\nOne.\nTwo.\n\ndog: [0.1, 0.2, 0.3, 0.4]\n\n[Question]\nQ0?\n\n[Assistant 1]\nref 0"
    )
    assert asked.endswith(f"[System]\n{rules['conv']['prompt']}\n\n")
    write_jsonl(tmp_path / "q.jsonl", [{"question_id": n, "text": "Q?", "category": "other"} for n in range(3)])
    assert eval_gpt_review.main([*flags[:-1], str(tmp_path / "text.jsonl")]) == 0
    asked = judge.bodies[-1]["messages"][1]["content"]
    assert asked.startswith("[Question]\n") and rules["default"]["prompt"] in asked


def test_reviews_are_resumed(judge: FakeServer, flags: list[str], tmp_path: Path) -> None:
    given = [*flags, *context(tmp_path, caption="One.")]
    assert eval_gpt_review_bench.main(given) == 0
    output = tmp_path / "out" / "r.jsonl"
    whole = output.read_bytes()
    output.write_bytes(whole[: whole.index(b"\n") + 20])  # a partial second row
    asked = len(judge.bodies)
    assert eval_gpt_review_bench.main(given) == 0
    assert output.read_bytes() == whole
    assert len(judge.bodies) == asked  # from the cache
    write_jsonl(tmp_path / "new.jsonl", [{"question_id": n, "text": "x", "answer_id": "other"} for n in range(3)])
    assert eval_gpt_review_bench.main(given) == 2
    assert output.read_bytes() == whole


@pytest.mark.parametrize("spoil", ["q", "new", "c", "rule"])
def test_mismatched_inputs_are_refused(
    spoil: str, judge: FakeServer, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*flags, *context(tmp_path, caption="One.")]
    if spoil == "rule":
        given += ["--rule", str(tmp_path / "rule.json")]
        (tmp_path / "rule.json").write_text('{"default": {"role": "R", "prompt": "p"}}')
    else:
        rows = {"q": {"question_id": 9, "text": "?"}, "new": {"question_id": 1, "text": "?"}, "c": {"image": "1.jpg"}}
        write_jsonl(tmp_path / f"{spoil}.jsonl", [rows[spoil]])
    assert eval_gpt_review_bench.main(given) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert judge.bodies == []


def test_transient_failures_are_retried_and_refusals_are_final(judge: FakeServer) -> None:
    waits: list[float] = []
    client = Judge("m", judge.url, sleep=waits.append)
    judge.replies = [(500, ""), (429, ""), (200, "5 5")]
    assert client.ask("x") == "5 5"
    assert waits == [1.0, 2.0]
    assert client.ask("x") == "5 5" and len(judge.bodies) == 3  # cached
    judge.replies = [(401, "who?")]
    with pytest.raises(RequestError, match=r"HTTP 401.*who\?"):
        client.ask("y")
    assert len(judge.bodies) == 4
    judge.replies = [(503, "")]
    with pytest.raises(RequestError, match="gave no reply"):
        client.ask("y")
    assert len(judge.bodies) == 4 + client.tries


def test_a_reply_without_scores_is_requested_once_more(judge: FakeServer, flags: list[str], tmp_path: Path) -> None:
    judge.replies = [(200, "I refuse."), (200, "3 4"), (200, "No."), (200, "Never."), (200, "5 6")]
    assert eval_gpt_review_bench.main([*flags, *context(tmp_path, caption="One.")]) == 0
    rows = read_jsonl(tmp_path / "out" / "r.jsonl")
    assert [row["tuple"] for row in rows] == [[3, 4], [-1, -1], [5, 6]]
    assert rows[1]["content"] == "No."
    judge.replies = [(200, "7 7")]
    asked = len(judge.bodies)
    assert eval_gpt_review_bench.main([*flags, *context(tmp_path, caption="One.")]) == 0
    rows = read_jsonl(tmp_path / "out" / "r.jsonl")
    assert [row["tuple"] for row in rows] == [[3, 4], [7, 7], [5, 6]] and len(judge.bodies) == asked + 1


def test_reviews_by_another_judge_are_not_continued(
    judge: FakeServer, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*flags, *context(tmp_path, caption="One.")]
    assert eval_gpt_review_bench.main(given) == 0
    record = (tmp_path / "out" / "r.jsonl.judge.json").read_bytes()
    assert eval_gpt_review_bench.main([*given, "--judge", "other"]) == 2
    assert "made with model 'gpt-4-0314', this run has 'other'" in capsys.readouterr().err
    assert (tmp_path / "out" / "r.jsonl.judge.json").read_bytes() == record
    held = lock_file(tmp_path / "out" / "r.jsonl")
    assert eval_gpt_review_bench.main(given) == 2
    assert "Another process is writing" in capsys.readouterr().err
    held.close()


def test_a_cache_with_a_partial_last_line_is_used(judge: FakeServer, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for question in ("a", "b"):
        Judge("m", judge.url, cache=cache).ask(question)
    cache.write_bytes(cache.read_bytes()[:-9])
    again = Judge("m", judge.url, cache=cache)
    assert [again.ask(question) for question in ("a", "b", "c")] == ["8 9\nfine"] * 3 and len(judge.bodies) == 4
    assert len(read_jsonl(cache)) == 3


def test_base_url_and_api_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_BASE", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert base_url(None) == OPENAI_URL and base_url("http://x/v1/") == "http://x/v1"
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
        Judge("m", OPENAI_URL)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    Judge("m", OPENAI_URL)
    assert auth_headers() == {"Authorization": "Bearer k"}


SCORES = {"8 9": (8, 9), "8,9": (8, 9), "8, 9": (8, 9), "8 9 ": (8, 9), "(8, 9)": (8, 9), "9/10 8/10": (9, 8)}
SCORES |= {"**8 9**": (8, 9), "8 and 9": (8, 9), "8 9.": (8, 9), "`8` `9`": (8, 9), "8/10, 9 out of 10": (8, 9)}
SCORES |= {"Assistant 1: 8, Assistant 2: 9": (8, 9), "**Assistant 1:** 8/10\n**Assistant 2:** 9/10\nx": (8, 9)}
SCORES |= {"Scores: 8, 9\nx": (8, 9), "Both are good.\nThe second is longer.\n\n8 9": (8, 9), "8;9": (8, 9)}
SCORES |= {"<think>3 4</think>\n8 9": (8, 9), "<think>3 4": (-1, -1), "8 9 10": (-1, -1), "8-9": (-1, -1)}
SCORES |= {"8/9": (-1, -1), "8 or 9": (-1, -1), "89": (-1, -1), "Assistant 2: 8, Assistant 1: 9": (-1, -1)}
SCORES |= {"1. Good\n2. Bad": (-1, -1), "-1 -1": (-1, -1), "8\n9": (-1, -1)}
SCORES |= {"\n\n7.5 6\nx": (7.5, 6), "So:\nsteps\n(1, 2)": (1, 2), "I give 8 9": (-1, -1), "": (-1, -1), "8": (-1, -1)}


@pytest.mark.parametrize(("reply", "wanted"), SCORES.items())
def test_parse_scores(reply: str, wanted: tuple[float, float]) -> None:
    assert reviews.parse_scores(reply) == wanted


def test_summary_selects_files_and_excludes_failures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    rows = [{"id": 1, "question_id": 1, "category": "c", "tuple": [10, 5]}, {"id": 2, "tuple": [-1, -1]}]
    for name in ("review_a", "review_b_0613", "other"):
        write_jsonl(folder / f"{name}.jsonl", rows)
    assert summarize_gpt_review.main(["-d", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "review_a\nall 50.0 100.0 50.0\nc 50.0 100.0 50.0\n" in printed
    assert "other" not in printed and "1 failed judgement(s) are excluded" in caplog.text
    for extra, wanted in ((["-v", "0613"], "review_b_0613"), (["-s", "rev", "_a"], "review_a")):
        assert summarize_gpt_review.main(["-d", str(folder), *extra]) == 0
        assert [line for line in capsys.readouterr().out.splitlines() if "review" in line] == [wanted]
    assert summarize_gpt_review.main(["-f", str(folder / "other.jsonl"), "-i", "1"]) == 0
    assert "all" not in capsys.readouterr().out
    assert summarize_gpt_review.main([]) == summarize_gpt_review.main(["-d", str(folder), "-v", "9"]) == 2


def test_the_text_baseline_is_sorted_and_marks_failures(judge: FakeServer, tmp_path: Path) -> None:
    rows = [{"question_id": n, "text": "Q?" if n else "Other?"} for n in (2, 0, 1)]
    flags = ["-q", str(write_jsonl(tmp_path / "q.jsonl", rows)), "-o", str(tmp_path / "new" / "a.jsonl")]
    assert qa_baseline_gpt35.main(flags) == 0
    text = (tmp_path / "new" / "a.jsonl").read_text(encoding="utf-8")
    assert not text.endswith("\n")
    found = [json.loads(line) for line in text.splitlines()]
    assert [list(row) for row in found] == [["answer_id", "question_id", "model_id", "text"]] * 3
    assert [row["question_id"] for row in found] == [0, 1, 2]
    assert found[0]["model_id"] == "gpt-3.5-turbo:20230327" and judge.bodies[0]["model"] == "gpt-3.5-turbo"
    judge.replies = [(400, "no")]
    assert qa_baseline_gpt35.main(flags) == 1
    assert (tmp_path / "new" / "a.jsonl").read_text(encoding="utf-8").count("#ERROR#") == 3
