"""Training of the quickstart, timed and scored over seeds: `python -m benchmarks.speedrun [--before REVISION]`.

A run pretrains the vision tower, trains both stages, and answers all 9,673 test questions of easy-VQA. With `--before`,
each seed is also trained by the recipe of another revision of this repository, in turns, and the ratio of the times is
printed. With `--hold-out "teal triangle"`, images of that pair of color and shape are not trained on, and questions
about them are scored apart. Runs are recorded in `runs.jsonl` of the output folder and are not repeated, unless files
have changed since the last commit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Final, NamedTuple

from llava.errors import ConfigError
from llava.eval.benchmarks.easy_vqa import normalize, read_items
from llava.utils import guarded
from playground.assets import package_directory
from playground.fast_dtype import fast_dtype
from playground.prepare_easy_vqa import INSTALL, label_images

ROOT: Final = Path(__file__).parents[1]
TRAINING: Final = ("tower", "stage 1", "stage 2")  # the timed steps
QUICK: Final = {"tower": ["--epochs", "1"], "stage 1": ["--max_steps", "2"], "stage 2": ["--max_steps", "2"]}


class Step(NamedTuple):
    name: str
    command: list[str]


class Recipe(NamedTuple):
    """The quickstart of a checkout; `revision` names it in the records."""

    revision: str
    root: Path

    def steps(self, folder: Path, model: Path, seed: int, dtype: str, hold_out: str | None) -> list[Step]:
        """The commands of a run, which write to `folder`."""
        data, tower = folder / "data", folder / "tower"
        prepare = [sys.executable, "-m", "playground.prepare_easy_vqa", "--output", str(data)]
        shared = ["--model_name_or_path", str(model), "--vision_tower", str(tower), "--image_folder", str(data)]
        shared += ["--seed", str(seed), "--bf16", str(dtype == "bfloat16"), "--save_strategy", "no"]

        def stage(number: int, *flags: str) -> list[str]:
            script = ("pretrain", "finetune")[number - 1]
            found = ["sh", f"scripts_internvl/{script}_quickstart.sh", *shared, *flags]
            return [*found, "--data_path", str(data / f"{script}.json"), "--output_dir", str(folder / f"stage{number}")]

        pretrain = [sys.executable, "-m", "playground.pretrain_nano_vit", "--data", str(data), "--output", str(tower)]
        return [
            Step("data", [*prepare, *(["--hold-out", hold_out] if hold_out else [])]),
            Step("tower", [*pretrain, "--seed", str(seed)]),
            Step("stage 1", stage(1)),
            Step("stage 2", stage(2, "--pretrain_mm_mlp_adapter", str(folder / "stage1" / "mm_projector.bin"))),
        ]


def execute(name: str, command: Sequence[str], root: Path, log: Path) -> float:
    """Run a command in a checkout and return its seconds; its output goes to `log`."""
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    started = time.perf_counter()
    with log.open("ab") as output:
        done = subprocess.run(command, cwd=root, env=environment, stdout=output, stderr=subprocess.STDOUT)
    if done.returncode:
        raise ConfigError(f"{name} ended with status {done.returncode}; its output is in {log}.")
    return time.perf_counter() - started


def train(steps: Sequence[Step], recipe: Recipe, folder: Path, quick: bool) -> dict[str, float]:
    """Run the steps of a recipe and return the seconds of each."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    seconds = {}
    for name, command in steps:
        flags = QUICK.get(name, []) if quick else []
        seconds[name] = execute(name, [*command, *flags], recipe.root, folder / "run.log")
        print(f"  {name:8} {seconds[name]:6.0f} s", flush=True)
    return seconds


def score(folder: Path, dtype: str, hold_out: str | None, quick: bool) -> dict[str, float]:
    """Accuracy in percent on the test split, and on the questions about images of the pair that was held out."""
    command = ["llava", "eval", "--tasks", "easy_vqa", "--model-path", str(folder / "stage2")]
    command += ["--dtype", dtype, "--output-dir", str(folder / "eval"), *(["--limit", "40"] if quick else [])]
    execute("evaluation", command, ROOT, folder / "run.log")
    result = folder / "eval" / "easy_vqa"
    found = {"accuracy": float(json.loads((result / "score.json").read_text())["overall"]["accuracy"])}
    if hold_out:
        found["held out"] = held_out_accuracy(result / "answers.jsonl", hold_out)
    return found


def held_out_accuracy(answers: Path, pair: str) -> float:
    """Accuracy in percent on the test questions about images of a pair such as "teal triangle"."""
    items = read_items(package_directory("easy_vqa", INSTALL) / "data" / "test" / "questions.json")
    color, shape = pair.split()
    labels = label_images(items)
    right = []
    for line in answers.read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)
        _, reference, image = items[answer["question_id"]]
        if labels.get(image) == {"color": color, "shape": shape}:
            right.append(normalize(answer["text"]) == reference)
    return 100 * mean(right) if right else float("nan")


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def checkout(revision: str, output: Path) -> Recipe:
    """The recipe of a revision, in a worktree of its own below `output`."""
    try:
        commit = git("rev-parse", "--short", f"{revision}^{{commit}}")
        folder = output / f"checkout-{commit}"
        if not (folder / "scripts_internvl").is_dir():
            git("worktree", "prune")
            git("worktree", "add", "--detach", str(folder), commit)
    except subprocess.CalledProcessError as error:
        raise ConfigError(f"{revision} cannot be checked out below {output}: {error.stderr.strip()}") from error
    return Recipe(commit, folder)


def recorded(path: Path) -> Iterator[dict[str, Any]]:
    """Runs that need not be repeated."""
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            run = json.loads(line)
            if not run["revision"].endswith("-dirty"):
                yield run


def total(run: dict[str, Any], steps: Sequence[str] = TRAINING) -> float:
    return float(sum(run["seconds"][name] for name in steps))


def report(runs: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> str:
    """Markdown lines: times by step, accuracy with its spread over seeds, and the ratio of pairs of runs."""
    lines = [
        "| recipe | seed | tower | stage 1 | stage 2 | sum | accuracy | held-out pair |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in (*before, *runs):
        seconds = [*(run["seconds"][name] for name in TRAINING), total(run)]
        apart = f"{run['held out']:.1f} % ({run['hold_out']})" if run["hold_out"] else ""
        times = " | ".join(f"{value:.0f} s" for value in seconds)
        lines.append(f"| {run['revision']} | {run['seed']} | {times} | {run['accuracy']:.2f} % | {apart} |")
    lines.append("")
    for name, group in (("before", before), ("now", runs)):
        scores = [run["accuracy"] for run in group if not run["hold_out"]]
        if scores:
            spread = f", standard deviation {stdev(scores):.2f}" if len(scores) > 1 else ""
            seeds = "1 seed" if len(scores) == 1 else f"{len(scores)} seeds"
            lines.append(f"{name}: {mean(scores):.2f} % over {seeds}{spread}, lowest {min(scores):.2f} %")
    for was, now in zip(before, runs, strict=False):
        both = total(now, TRAINING[1:]) / total(was, TRAINING[1:])
        lines.append(f"time now / before: both stages {both:.2f}, with the tower {total(now) / total(was):.2f}")
    return "\n".join(lines)


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--before", metavar="REVISION", help="also run the recipe of this revision, in turns")
    parser.add_argument("--pairs", type=int, default=1, help="how many seeds --before runs")
    parser.add_argument("--hold-out", metavar="'COLOR SHAPE'", help="a pair to keep out of the training data")
    parser.add_argument("--output", type=Path, default=ROOT / "work_dirs" / "speedrun")
    parser.add_argument("--quick", action="store_true", help="two steps a stage: checks that everything runs")
    args = parser.parse_args(argv)
    output = args.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    model, records = output / "smollm2-135m-instruct", output / "runs.jsonl"
    if not model.exists():
        convert = [sys.executable, "-m", "playground.convert_smollm2", "--output", str(model)]
        execute("conversion", convert, ROOT, output / "convert.log")
    dtype = fast_dtype()
    own = Recipe(git("describe", "--always", "--dirty"), ROOT)
    other = checkout(args.before, output) if args.before else None
    runs: list[dict[str, Any]] = []
    before: list[dict[str, Any]] = []
    for index, seed in enumerate(args.seeds):
        turns = [(other, None, before)] if other and index < args.pairs else []
        for recipe, hold_out, group in (*turns, (own, args.hold_out, runs)):
            setting = {"revision": recipe.revision, "seed": seed, "hold_out": hold_out, "quick": args.quick}
            run = next((run for run in recorded(records) if setting.items() <= run.items()), None)
            if run is None:
                print(f"{recipe.revision}, seed {seed}{f', without {hold_out}s' if hold_out else ''}", flush=True)
                folder = output / f"{recipe.revision}-{seed}"
                steps = recipe.steps(folder, model, seed, dtype, hold_out)
                run = {**setting, "seconds": train(steps, recipe, folder, args.quick)}
                run |= score(folder, dtype, hold_out, args.quick)
                with records.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(run) + "\n")
            group.append(run)
    print(report(runs, before))
    return 0


if __name__ == "__main__":
    sys.exit(main())
