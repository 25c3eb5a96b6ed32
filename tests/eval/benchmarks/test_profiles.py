"""Prompt profiles are byte-equal to the prompts that other harnesses make of the same questions, recorded from them.

`harness_prompts.json` has, for each profile and task, the token limit, and pairs of a document of the harness's dataset
and the prompt that the harness made of it. `python -m benchmarks.harness` compares the current harness.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava.errors import ConfigError
from llava.eval import main as evaluate
from llava.eval import report
from llava.eval.benchmarks.base import Task
from llava.eval.benchmarks.mme import TASKS as MME_TASKS
from llava.eval.benchmarks.profiles import LLAVA, PROFILES, ask_as, token_limit
from llava.eval.benchmarks.registry import TASKS, make_task
from llava.eval.benchmarks.vqa import UNANSWERABLE
from llava.eval.reporting.data import compare, read_run
from llava.eval.run.questions import LETTER_SUFFIX, Question
from llava.eval.scienceqa_prompts import question_text
from tests.eval.benchdata import ASK, BENCHMARKS, make_everything
from tests.eval.conftest import read_jsonl, write_jsonl

GOLDEN = json.loads((Path(__file__).parent / "harness_prompts.json").read_text(encoding="utf-8"))
CASES = [
    (profile, task, *pair)
    for profile, tasks in GOLDEN.items()
    for task, found in tasks.items()
    for pair in found["prompts"]
]
Make = Callable[[dict[str, Any], Path], str]


def short(doc: dict[str, Any], root: Path) -> str:
    return f"{doc['question']}{ASK}"


def seed(doc: dict[str, Any], root: Path) -> str:
    options = "".join(f"\n{letter}. {doc[f'choice_{letter.lower()}']}" for letter in "ABCD")
    return f"{doc['question']}{options}\n{LETTER_SUFFIX}"


def science_qa(doc: dict[str, Any], root: Path) -> str:
    return f"{question_text(doc)}\n{LETTER_SUFFIX}"


def mme(doc: dict[str, Any], root: Path) -> str:
    """The official file, and the prompt of LLaVA's question file."""
    folder = root / "MME_Benchmark_release_version" / MME_TASKS[0]
    folder.mkdir(parents=True)
    (folder / "0.txt").write_text(f"{doc['question']}\tYes\n")
    return doc["question"].replace("Please answer yes or no.", "").strip() + ASK


def mmbench(doc: dict[str, Any], root: Path) -> str:
    columns = ("index", "hint", "question", "A", "B", "C", "D")
    cells = ["" if doc.get(name) in (None, "nan") else str(doc[name]) for name in columns]
    for task in (TASKS["mmbench"], TASKS["mmbench_cn"]):
        with (root / task.layouts["dev"].questions).open("w", newline="") as file:
            csv.writer(file, delimiter="\t").writerows([columns, cells])
    return "of the table"


# the text of LLaVA's question file for a document of a harness
FILES: dict[str, Make] = {
    **dict.fromkeys(("vqav2", "gqa", "pope"), short),
    "vizwiz": lambda doc, root: f"{doc['question']}\n{UNANSWERABLE}{ASK}",
    "textvqa": lambda doc, root: f"{doc['question']}\nReference OCR token: {', '.join(doc['ocr_tokens'])}{ASK}",
    "science_qa": science_qa,
    "mme": mme,
    **dict.fromkeys(("mmbench", "mmbench_cn"), mmbench),
    "seed": seed,
    **dict.fromkeys(("llava_bench", "llava_bench_coco", "mm_vet"), lambda doc, root: str(doc["question"])),
}


def asked(profile: str, name: str, doc: dict[str, Any], root: Path) -> str:
    """The text sent to the model."""
    task: Task = make_task(name, root)
    text = FILES[name](doc, root)
    number = f"{MME_TASKS[0]}/0.png" if name == "mme" else doc.get("index", 0)
    (question,) = ask_as(profile, task, [Question(number, text)])
    return question.text or question.prompt


@pytest.mark.parametrize(("profile", "name", "doc", "prompt"), CASES)
def test_prompts_are_byte_equal(profile: str, name: str, doc: dict[str, Any], prompt: str, tmp_path: Path) -> None:
    assert asked(profile, name, doc, tmp_path).encode() == prompt.encode()


def test_the_recorded_prompts_cover_every_task_of_every_profile() -> None:
    limits = {(p, t): found["max_new_tokens"] for p, tasks in GOLDEN.items() for t, found in tasks.items()}
    assert limits == {(p, t): each.max_new_tokens for p, tasks in PROFILES.items() for t, each in tasks.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_everything(tmp_path_factory.mktemp("data") / "eval")


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_changes_texts_and_limits_only(profile: str, data: Path) -> None:
    """Answers are joined to questions and labels by the recorded prompt, which stays."""
    for name in PROFILES[profile]:
        task = make_task(name, data / BENCHMARKS[name][0])
        before = task.questions()
        assert ask_as(LLAVA, task, before) is before and token_limit(LLAVA, task) == task.max_new_tokens
        after = ask_as(profile, task, before)
        assert [(each.key, each.images) for each in after] == [(each.key, each.images) for each in before]
        assert token_limit(profile, task) == PROFILES[profile][name].max_new_tokens


def test_a_task_or_profile_without_prompts_is_refused(data: Path) -> None:
    with pytest.raises(ConfigError, match="lmms-eval has no prompts for easy_vqa; it has vqav2"):
        ask_as("lmms-eval", make_task("easy_vqa", data / "easy_vqa"), [])
    with pytest.raises(ConfigError, match="Unknown prompt profile 'other'; choose from llava, lmms-eval"):
        token_limit("other", make_task("gqa", data / "gqa"))


def test_the_profile_is_recorded_and_named_as_the_cause_of_a_gap(
    tiny_dirs: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "textvqa"
    shutil.copytree(data / "textvqa", root)
    path = root / "llava_textvqa_val_v051_ocr.jsonl"
    rows = read_jsonl(path)
    write_jsonl(path, [{**row, "text": row["text"].replace(ASK, f"\nReference OCR token: ST{ASK}")} for row in rows])
    model = ["--model-path", str(tiny_dirs["chat"]), "--device", "cpu", "--max-new-tokens", "2"]
    flags = ["--tasks", "textvqa", "--data-root", str(root), *model]
    names = (LLAVA, "lmms-eval")
    runs = [tmp_path / "runs" / name for name in names]
    for name, run in zip(names, runs):
        assert evaluate.main([*flags, "--output-dir", str(run), "--prompt-profile", name]) == 0
    answers = [run / "textvqa" / "answers.jsonl" for run in runs]
    first = [read_jsonl(path)[0] for path in answers]
    assert first[0]["prompt"] == first[1]["prompt"] == f"Q0?\nReference OCR token: ST{ASK}"
    sent = [row["metadata"]["first_prompt"] for row in first]
    assert f"Q0?\nReference OCR token: ST{ASK}" in sent[0] and f"Q0?{ASK}" in sent[1]
    identities = [json.loads(path.with_name(f"{path.name}.manifest.json").read_text())["identity"] for path in answers]
    assert "prompt_profile" not in identities[0] and identities[1]["prompt_profile"] == "lmms-eval"
    verdicts = [[line.verdict for line in compare(read_run(run))] for run in runs]
    assert verdicts == [["3 questions of 5000"], ["prompts of lmms-eval"]]
    capsys.readouterr()
    assert evaluate.main([*flags, "--output-dir", str(runs[1])]) == 2  # the answers have other prompts
    assert "was made with" in capsys.readouterr().err
    assert report.main(["--diff", *map(str, runs), "--output-dir", str(tmp_path / "report")]) == 0
    shown = capsys.readouterr().out
    assert "measured; prompt profiles llava and lmms-eval" in shown and "identity.prompt_profile" in shown
    assert "Reference OCR token: ST" in shown  # the changed bytes of the prompt
