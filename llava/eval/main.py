"""Answer the questions of benchmarks and score the answers.

    llava eval --tasks easy_vqa --model-path CHECKPOINT [--limit 1000] [--output-dir DIR]

Per task, DIR/TASK gets `answers.jsonl` (one line a question), its manifest, and `score.json`. An interrupted run
continues where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.conversation import template_for
from llava.eval import options
from llava.eval.runner import report, run
from llava.eval.tasks import TASKS, make_task
from llava.mm_utils import get_model_name_from_path
from llava.utils import guarded


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", required=True, help=f"comma-separated list of: {', '.join(TASKS)}")
    options.add_model_flags(parser)
    parser.add_argument("--split", help="of the data (default: the official test split)")
    parser.add_argument("--data-root", type=Path, help="folder of the benchmark's data (default: as the task says)")
    parser.add_argument("--output-dir", type=Path, help="default: eval/MODEL_NAME")
    options.add_decoding_flags(parser, temperature=0.0, max_new_tokens=None)
    options.add_run_flags(parser)
    return parser


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    tasks = [make_task(name.strip(), args.data_root, args.split) for name in args.tasks.split(",")]
    asked = {task.name: task.questions(args.limit) for task in tasks}  # missing data shows before the model is loaded
    name = get_model_name_from_path(args.model_path)
    output_dir = args.output_dir or Path("eval") / name
    engine = options.build_engine(args)
    template = template_for(engine.model.config, name, args.conv_mode)
    status = 0
    for task in tasks:
        answers = output_dir / task.name / "answers.jsonl"
        settings = options.settings_from(args, template, task.image_folder, max_new_tokens=task.max_new_tokens)
        questions = asked[task.name]
        outcome = run(engine, questions, answers, settings)
        failed = report(outcome, answers, lambda line: print(line, file=sys.stderr))
        if failed:
            print(f"{task.name}: not scored, because some questions have no answer.", file=sys.stderr)
            status = failed
            continue
        score = {"model_id": name, "limit": args.limit, **task.score(answers, args.limit)}
        (answers.parent / "score.json").write_text(json.dumps(score, indent=2) + "\n", encoding="utf-8")
        subset = f", {len(questions)} questions spread evenly over it" if args.limit else ""
        print(f"{task.name}, {task.split} split{subset}\n{task.table(score)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
