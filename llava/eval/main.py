"""Answer the questions of benchmarks and score the answers.

    llava eval --tasks easy_vqa --model-path CHECKPOINT [--limit 1000] [--output-dir DIR]
    llava eval --tasks all --model-path CHECKPOINT          with several GPUs visible, one process each
    llava eval --tasks pope,mme --api-base http://127.0.0.1:8000/v1
    llava eval prepare [TASK ...]                           says which file is missing and where it comes from

Per task, DIR/TASK gets `answers.jsonl` (one line a question), its manifest, and `score.json`. An interrupted run
continues where it stopped when the same command is given again, also with another number of processes. Several nodes:
start it by torchrun, or give each part its --num-chunks and --chunk-idx, then --score-only.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.engine.arguments import EngineArgs, add_conv_mode_arg, add_sampling_args
from llava.errors import ConfigError, LlavaError
from llava.eval import options
from llava.eval.benchmarks import prepare
from llava.eval.benchmarks.base import Task
from llava.eval.benchmarks.registry import ALL, TASKS, make_tasks
from llava.eval.run import launch
from llava.eval.run.files import write_json
from llava.eval.run.questions import Question
from llava.eval.run.runner import report, run
from llava.eval.run.shards import merge, shard_path, shards_folder
from llava.parent_process import exit_with_parent
from llava.utils import guarded

Asked = list[tuple[Task, Sequence[Question]]]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", required=True, help=f"comma-separated list of: {', '.join(TASKS)}; or {ALL}")
    EngineArgs.add_cli_args(parser, required=False)
    add_conv_mode_arg(parser)
    options.add_api_flags(parser)
    prepare.add_data_flags(parser)
    parser.add_argument("--output-dir", type=Path, help="default: eval/MODEL_NAME")
    parser.add_argument("--num-chunks", type=int, help="processes (default: one for each GPU of CUDA_VISIBLE_DEVICES)")
    parser.add_argument("--chunk-idx", type=int, help="answer only this part of --num-chunks, and score nothing")
    parser.add_argument("--score-only", action="store_true", help="merge and score what is there; needs no model")
    add_sampling_args(parser, temperature=0.0, max_new_tokens=None)
    options.add_run_flags(parser)
    return parser


def say(line: str) -> None:
    print(line, file=sys.stderr)


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["prepare"]:
        return prepare.main(words[1:])
    args = build_parser().parse_args(words)
    exit_with_parent()
    options.check(args)
    tasks = make_tasks(args.tasks.split(","), args.data_root, args.split, args.eval_data)
    asked: Asked = [(task, task.questions(args.limit)) for task in tasks]  # missing data shows before the model loads
    output_dir = args.output_dir or Path("eval") / options.model_name(args)
    rank = launch.torchrun_rank()
    if args.chunk_idx is not None or rank is not None:
        return answer_part(args, asked, output_dir, rank)
    count = args.num_chunks or (1 if args.api_base else max(1, len(launch.visible_gpus())))
    if not args.score_only and count > 1:
        launch.run_shards("llava.eval.main", words, count)
    elif not args.score_only:
        return answer_and_score(args, asked, output_dir)
    return max([finish(args, task, questions, output_dir, count) for task, questions in asked])


def answer(args: argparse.Namespace, asked: Asked, output_dir: Path, chunk: tuple[int, int]) -> list[int]:
    """Ask every task's questions of one chunk; a status each."""
    model, template = options.build_model(args)
    statuses = []
    for task, questions in asked:
        settings = dataclasses.replace(
            options.settings_from(args, template, task.image_folder, max_new_tokens=task.max_new_tokens),
            chunk=chunk,
            pictures=task.pictures,
            files=tuple(need.path for need in task.needs() if need.path.is_file()),
        )
        path = answers_path(output_dir, task, chunk)
        if args.overwrite:
            score_path(output_dir, task).unlink(missing_ok=True)  # it would outlive its answers
        statuses.append(report(run(model, questions, path, settings), path, say))
        if chunk == (0, 1):
            statuses[-1] = statuses[-1] or finish(args, task, questions, output_dir, 1)
    return statuses


def answers_path(output_dir: Path, task: Task, chunk: tuple[int, int]) -> Path:
    """Where a chunk's answers go; the only chunk's are the whole."""
    whole = output_dir / task.name / "answers.jsonl"
    return whole if chunk == (0, 1) else shard_path(shards_folder(whole), *chunk)


def score_path(output_dir: Path, task: Task) -> Path:
    return output_dir / task.name / "score.json"


def answer_and_score(args: argparse.Namespace, asked: Asked, output_dir: Path) -> int:
    """All in this process, each task scored as soon as it is answered."""
    statuses = answer(args, asked, output_dir, (0, 1))
    for (task, _), status in zip(asked, statuses):
        if status == 1:
            say(f"{task.name}: not scored, because some questions have no answer.")
    return max(statuses)


def answer_part(args: argparse.Namespace, asked: Asked, output_dir: Path, rank: tuple[int, int] | None) -> int:
    """One chunk, named by flags or by torchrun; in the latter case the first process merges and scores in the end."""
    if rank is None:
        return max(answer(args, asked, output_dir, (args.chunk_idx, args.num_chunks or 1)))
    if args.chunk_idx is not None or args.num_chunks is not None:
        raise ConfigError("torchrun gives every process its part; leave out --num-chunks and --chunk-idx.")
    index, count = rank
    statuses = launch.gather_statuses(max(answer(args, asked, output_dir, rank)))
    failed = [index for index, status in enumerate(statuses) if status]
    if failed:
        say(f"error: of {count} shards these failed, see above: {failed}; nothing is merged or scored.")
        return 1
    return 0 if index else max([finish(args, task, questions, output_dir, count) for task, questions in asked])


def finish(args: argparse.Namespace, task: Task, questions: Sequence[Question], output_dir: Path, count: int) -> int:
    """Merge a task's parts and score it; the exit status, 2 with the reason on stderr when there is no score."""
    answers = answers_path(output_dir, task, (0, 1))
    name = options.model_name(args)
    try:
        if count > 1:
            merge([shard_path(shards_folder(answers), index, count) for index in range(count)], answers)
            score_path(output_dir, task).unlink(missing_ok=True)
        result = task.score(answers, args.limit)
    except LlavaError as error:
        say(f"error: {task.name}: {error}")
        return 2
    root = None if task.data_root is None else str(task.data_root)
    facts = {
        "questions": len(questions), "published_questions": task.published_rows, "limit": args.limit,
        "primary_metric": task.primary_metric(result), "data_root": root,
    }  # fmt: skip
    write_json(score_path(output_dir, task), {"model_id": name, **facts, **result}, indent=2)
    subset = f", {len(questions)} questions spread evenly over it" if args.limit else ""
    print(f"{task.name}, {task.split} split{subset}\n{task.table(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
