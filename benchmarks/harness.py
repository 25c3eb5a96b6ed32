"""Scores of lmms-eval and of `llava eval` for one model on the same questions.

    python -m benchmarks.harness CHECKPOINT --lmms-eval PYTHON [--questions 300] [--folder DIR]

`PYTHON` is the interpreter of an environment with lmms-eval. Questions of easy-VQA become small versions of POPE, GQA,
VQAv2, TextVQA and ScienceQA in their official layouts. `llava eval` answers them with the model in this process and the
prompts of lmms-eval; lmms-eval, unmodified, asks the same model on a server through its OpenAI-compatible model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava.errors import RequestError
from llava.eval import main as evaluate
from llava.eval import report
from llava.eval.benchmarks import prepare
from llava.eval.benchmarks.easy_vqa import package_data, read_items
from llava.eval.run.files import write_json, write_jsonl
from llava.eval.run.questions import SHORT_SUFFIX, subsample
from llava.eval.run.remote_model import served_model
from tests.serve.programs import program
from tests.serve.stubs import until

TASKS = ("pope", "gqa", "vqav2", "textvqa", "science_qa")
CATEGORIES = ("adversarial", "popular", "random")
COLORS = ("red", "green", "blue", "yellow")
SKIPPED = ("pope_yes_ratio,none",)  # of the labels in lmms-eval, of the answers here
Item = tuple[str, str, int]  # question, answer, image


def items(count: int, answers: Sequence[str] = ()) -> list[Item]:
    """Evenly spaced questions of the test split, each once per image; with `answers`, those that have one of them."""
    found = list(dict.fromkeys(read_items(package_data() / "test" / "questions.json")))
    return list(subsample([item for item in found if not answers or item[1] in answers], count))


def link_images(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.symlink_to(package_data() / "test" / "images")


def make_pope(root: Path, asked: Sequence[Item]) -> None:
    rows: list[dict[str, Any]] = []
    labels: dict[str, list[dict[str, Any]]] = {name: [] for name in CATEGORIES}
    for number, (text, answer, image) in enumerate(asked):
        category, name = CATEGORIES[number % 3], f"{image}.png"
        labels[category].append({"image": name, "text": text, "label": answer})
        row = {"question_id": number, "image": name, "text": f"{text}\n{SHORT_SUFFIX}", "category": category}
        rows.append(row)
    write_jsonl(root / "llava_pope_test.jsonl", rows)
    for category, found in labels.items():
        write_jsonl(root / "coco" / f"coco_pope_{category}.json", found)
    link_images(root / "val2014")


def make_gqa(root: Path, asked: Sequence[Item]) -> None:
    rows = [
        {"question_id": str(number), "image": f"{image}.png", "text": f"{text}\n{SHORT_SUFFIX}"}
        for number, (text, _, image) in enumerate(asked)
    ]
    write_jsonl(root / "llava_gqa_testdev_balanced.jsonl", rows)
    kinds = {True: "verify", False: "query"}
    labels = {
        str(number): {"answer": answer, "types": {"structural": kinds[answer in ("yes", "no")]}}
        for number, (_, answer, _) in enumerate(asked)
    }
    write_json(root / "data" / "testdev_balanced_questions.json", labels)
    link_images(root / "data" / "images")


def make_vqav2(root: Path, asked: Sequence[Item]) -> None:
    """Seven of ten people give the reference, three say `yes`."""
    rows = [{"question_id": n, "image_id": image, "question": text} for n, (text, _, image) in enumerate(asked)]
    write_json(root / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": rows})
    people = [
        {"question_id": n, "answers": [{"answer": text} for text in [answer] * 7 + ["yes"] * 3]}
        for n, (_, answer, _) in enumerate(asked)
    ]
    write_json(root / "v2_mscoco_val2014_annotations.json", {"annotations": people})
    (root / "val2014").mkdir(parents=True)
    for image in {image for _, _, image in asked}:
        source = package_data() / "test" / "images" / f"{image}.png"
        (root / "val2014" / f"COCO_val2014_{image:012d}.jpg").symlink_to(source)


def make_textvqa(root: Path, asked: Sequence[Item]) -> None:
    rows = [
        {
            "question_id": str(image), "image": f"{image}.png",
            "text": f"{text}\nReference OCR token: RED, BLUE\n{SHORT_SUFFIX}",
        }
        for text, _, image in asked
    ]  # fmt: skip
    write_jsonl(root / "llava_textvqa_val_v051_ocr.jsonl", rows)
    people = [{"image_id": str(image), "question": text, "answers": [answer] * 10} for text, answer, image in asked]
    write_json(root / "TextVQA_0.5.1_val.json", {"data": people})
    link_images(root / "train_images")


def make_science_qa(root: Path, asked: Sequence[Item]) -> None:
    """Questions for a color, with four options."""
    problems: dict[str, Any] = {}
    questions = []
    for number, (text, answer, image) in enumerate(asked):
        pid = str(number)
        hint = "The shape has one color." if number % 2 else ""
        problem = {"question": text, "choices": list(COLORS), "answer": COLORS.index(answer), "hint": hint}
        problems[pid] = {**problem, "image": f"{image}.png", "subject": "natural science", "grade": "grade2"}
        options = "\n".join(f"{letter}. {color}" for letter, color in zip("ABCD", COLORS))
        value = "\n".join(filter(None, ("<image>", f"Context: {hint}" if hint else "", text, options)))
        turn = {"from": "human", "value": value}
        questions.append({"id": pid, "image": f"{image}.png", "conversations": [turn]})
    write_json(root / "problems.json", problems)
    write_json(root / "pid_splits.json", {"test": list(problems)})
    write_json(root / "llava_test_CQM-A.json", questions)
    link_images(root / "images" / "test")


def make_data(folder: Path, count: int) -> None:
    """Write the data of all benchmarks below `folder`."""
    make_pope(folder / "pope", items(count, ("yes", "no")))
    make_science_qa(folder / "scienceqa", items(count, COLORS))
    for name, make in (("gqa", make_gqa), ("vqav2", make_vqav2), ("textvqa", make_textvqa)):
        make(folder / name, items(count))


def flags(task: str, data: Path) -> list[str]:
    split = ["--split", "val"] if task == "vqav2" else []
    return [*split, "--eval-data", str(data)]


def answer(checkpoint: str, tasks: Sequence[str], profile: str, data: Path, output: Path) -> dict[str, Any]:
    """Results of `llava eval` in the format of lmms-eval, by task of lmms-eval."""
    words = ["--model-path", checkpoint, "--device", "cpu", "--prompt-profile", profile, "--output-dir", str(output)]
    for task in tasks:
        assert evaluate.main(["--tasks", task, *words, *flags(task, data)]) == 0
    return read_results(report.main([str(output), "--format", "lmms-eval", "--output-dir", str(output)]), output)


def read_results(status: int, folder: Path) -> dict[str, Any]:
    """`results` of the newest results file below a folder."""
    assert status == 0
    path = max(folder.rglob("*_results.json"), key=lambda path: path.stat().st_mtime)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["results"]
    return found


def run_lmms_eval(checkpoint: str, tasks: Sequence[str], python: str, data: Path, folder: Path) -> dict[str, Any]:
    """Results of lmms-eval, which asks a server of the checkpoint."""
    for task in tasks:
        words = [task, "--lmms-eval", python, "--output-dir", str(folder / "tasks"), *flags(task, data)]
        assert prepare.main(words) == 0
    environment = {**os.environ, "NO_PROXY": "*", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    with program(environment, "controller", "--port", "0") as controller:
        words = ["--model-path", checkpoint, "--model-name", "model", "--device", "cpu", "--port", "0"]
        words += ["--limit-model-concurrency", "16", "--queue-limit", "1000", "--queue-seconds", "3600"]
        with program(environment, "model_worker", *words, "--controller", controller.url) as worker:
            assert until(lambda: is_served(f"{controller.url}/v1") or worker.process.poll() is not None, 300.0)
            assert worker.process.poll() is None, worker.text
            client = {key: value for key, value in environment.items() if key != "PYTHONPATH"}
            client |= {"OPENAI_API_KEY": "none", "OPENAI_API_BASE": f"{controller.url}/v1"}
            names = ",".join(f"local_{task}" for task in tasks)
            command = [python, "-m", "lmms_eval", "--model", "openai", "--model_args", "model_version=model"]
            command += ["--include_path", str(folder / "tasks"), "--tasks", names, "--batch_size", "8"]
            command += ["--output_path", str(folder / "lmms"), "--log_samples"]
            done = subprocess.run(command, env=client, cwd=folder, check=False)
    return read_results(done.returncode, folder / "lmms")


def is_served(url: str) -> bool:
    time.sleep(0.5)
    try:
        return bool(served_model(url))
    except RequestError:
        return False


def rows(ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Metric, our value and theirs, of every metric that both have."""
    names = {"pope": "pope", "gqa": "gqa", "vqav2": "vqav2_val", "textvqa": "textvqa_val", "science_qa": "scienceqa"}
    for task, name in names.items():
        if f"local_{task}" not in theirs:
            continue
        for metric, value in ours[name].items():
            if isinstance(value, float) and "_stderr" not in metric and metric not in SKIPPED:
                yield f"{task} {metric.partition(',')[0]}", value, theirs[f"local_{task}"][metric]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--lmms-eval", required=True, metavar="PYTHON", help="interpreter with lmms-eval")
    parser.add_argument("--tasks", default=",".join(TASKS), help="default: %(default)s")
    parser.add_argument("--questions", type=int, default=300, help="per benchmark (default %(default)s)")
    parser.add_argument("--folder", type=Path, help="for data and results, which a repeated run continues")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).absolute()
        if not (folder / "data").exists():
            make_data(folder / "data", args.questions)
        started = time.monotonic()
        tasks = args.tasks.split(",")
        ours = answer(args.checkpoint, tasks, "lmms-eval", folder / "data", folder / "ours")
        theirs = run_lmms_eval(args.checkpoint, tasks, args.lmms_eval, folder / "data", folder)
        plain = answer(args.checkpoint, tasks, "llava", folder / "data", folder / "plain")
    print(f"{time.monotonic() - started:.0f} s\n")
    print("| metric | LLaVA's prompts | lmms-eval's prompts | lmms-eval | equal |\n|---|---|---|---|---|")
    before = {name: value for name, value, _ in rows(plain, theirs)}
    found = list(rows(ours, theirs))
    for name, value, other in found:
        equal = abs(value - other) < 1e-12
        print(f"| {name} | {before[name]:.12g} | {value:.12g} | {other:.12g} | {'yes' if equal else 'NO'} |")
    return 0 if all(abs(value - other) < 1e-12 for _, value, other in found) else 1


if __name__ == "__main__":
    sys.exit(main())
