"""Answer the questions of benchmarks and score the answers.

    llava eval --tasks easy_vqa --model-path CHECKPOINT [--limit 1000] [--output-dir DIR]
    llava eval --tasks all --model-path CHECKPOINT          one process per visible GPU
    llava eval --tasks pope,mme --api-base http://127.0.0.1:8000/v1
    llava eval --tasks pope,gqa --prompt-profile lmms-eval  ask with the prompts of lmms-eval
    llava eval prepare [TASK ...]                           list missing files and their sources
    llava eval prepare TASK ... --lmms-eval PYTHON          write local tasks for lmms-eval

Each task writes DIR/TASK/answers.jsonl (one line per question), its manifest, and score.json. The same command resumes
an interrupted run, also with another number of processes. On several nodes, start it with torchrun, or run each part
with --num-chunks and --chunk-idx and finish with --score-only.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava.errors import ConfigError, LlavaError
from llava.eval.benchmarks import prepare
from llava.eval.benchmarks.base import Task
from llava.eval.benchmarks.outcomes import FILE
from llava.eval.benchmarks.profiles import LLAVA, PROFILES, ask_as, recorded_profile, token_limit
from llava.eval.benchmarks.registry import ALL, TASKS, make_tasks
from llava.eval.options import EvalArgs
from llava.eval.run import launch
from llava.eval.run.files import write_json
from llava.eval.run.manifest import read_manifest, scorer_record
from llava.eval.run.questions import Question
from llava.eval.run.runner import report, run
from llava.eval.run.shards import merge, shard_path, shard_paths, shards_folder
from llava.parent_process import exit_with_parent
from llava.utils import guarded

WHOLE = (0, 1)  # the only chunk of one


@dataclass(frozen=True)
class TaskArgs(EvalArgs):
    """Settings of `llava eval`."""

    tasks: str = ""
    split: str | None = None
    data_root: Path | None = None
    eval_data: Path | None = None
    output_dir: Path | None = None
    num_chunks: int | None = None
    chunk_idx: int | None = None
    score_only: bool = False
    prompt_profile: str = LLAVA


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tasks", required=True, help=f"comma-separated list of: {', '.join(TASKS)}; or {ALL}")
    prepare.add_data_flags(parser)
    add("--output-dir", type=Path, help="default: eval/MODEL_NAME")
    add("--num-chunks", type=int, help="number of processes (default: one per GPU of CUDA_VISIBLE_DEVICES)")
    add("--chunk-idx", type=int, help="answer only this chunk of --num-chunks, without scoring")
    add("--score-only", action="store_true", help="merge and score existing answers without loading a model")
    help_text = "prompts and token limits: LLaVA's or those of another harness (default %(default)s)"
    add("--prompt-profile", choices=(LLAVA, *PROFILES), default=LLAVA, help=help_text)
    EvalArgs.add_cli_args(parser)
    return parser


def log(line: str) -> None:
    print(line, file=sys.stderr)


@dataclass(frozen=True)
class Evaluation:
    """The tasks of one command with their questions, and the folder for answers and scores."""

    args: TaskArgs
    tasks: Sequence[tuple[Task, Sequence[Question]]]
    output_dir: Path

    def answers_path(self, task: Task, chunk: tuple[int, int] = WHOLE) -> Path:
        whole = self.output_dir / task.name / "answers.jsonl"
        return whole if chunk == WHOLE else shard_path(shards_folder(whole), *chunk)

    def score_path(self, task: Task) -> Path:
        return self.output_dir / task.name / "score.json"

    def drop_score(self, task: Task) -> None:
        """Remove the score and the outcomes of answers that are replaced."""
        for path in (self.score_path(task), self.answers_path(task).with_name(FILE)):
            path.unlink(missing_ok=True)

    def answer(self, chunk: tuple[int, int]) -> list[int]:
        """Answer one chunk of every task and return the exit statuses. An only chunk is scored as well."""
        model, template = self.args.load_model()
        statuses = []
        for task, questions in self.tasks:
            profile = self.args.prompt_profile
            settings = dataclasses.replace(
                self.args.run_settings(template, task.image_folder, token_limit(profile, task)),
                chunk=chunk,
                images=task.images,
                files=task.label_files(),
                prompt_profile=None if profile == LLAVA else profile,
            )
            path = self.answers_path(task, chunk)
            if self.args.overwrite:
                self.drop_score(task)
            status = report(run(model, questions, path, settings), path, log)
            if chunk == WHOLE:
                status = status or self.score(task, questions)
            statuses.append(status)
        return statuses

    def answer_and_score(self) -> int:
        """Answer and score every task in this process; return the exit status."""
        statuses = self.answer(WHOLE)
        for (task, _), status in zip(self.tasks, statuses):
            if status == 1:
                log(f"{task.name}: not scored, because some questions have no answer.")
        return max(statuses)

    def answer_rank(self, rank: int, count: int) -> int:
        """Answer the chunk of a torchrun process; rank 0 merges and scores afterwards."""
        if self.args.chunk_idx is not None or self.args.num_chunks is not None:
            raise ConfigError("torchrun assigns the chunks; remove --num-chunks and --chunk-idx.")
        statuses = launch.gather_statuses(max(self.answer((rank, count))))
        failed = [index for index, status in enumerate(statuses) if status]
        if failed:
            log(f"error: {len(failed)} of {count} shards failed, see above: {failed}; nothing is merged or scored.")
            return 1
        return 0 if rank else self.merge_and_score(count)

    def merge_and_score(self, count: int) -> int:
        """Merge the shards of every task and score it; return the exit status."""
        return max([self.score(task, questions, count) for task, questions in self.tasks])

    def score(self, task: Task, questions: Sequence[Question], count: int = 1) -> int:
        """Score a task, after merging if it has several shards; the exit status is 2 if that is not possible."""
        answers = self.answers_path(task)
        try:
            if count > 1:
                merge(shard_paths(shards_folder(answers), count), answers)
                self.drop_score(task)
            scores = task.score(answers, self.args.limit)
        except LlavaError as error:
            log(f"error: {task.name}: {error}")
            return 2
        facts = {
            "model_id": self.args.model_name, "questions": len(questions), "published_questions": task.published_rows,
            "limit": self.args.limit, "primary_metric": task.primary_metric(scores),
            "primary_interval": scores.get("intervals", {}).get(task.metric),
            "data_root": None if task.data_root is None else str(task.data_root),
            "prompt_profile": recorded_profile((read_manifest(answers) or {}).get("identity", {})),
            "scorer": scorer_record(task, answers),
        }  # fmt: skip
        write_json(self.score_path(task), {**facts, **scores}, indent=2)
        subset = f", {len(questions)} evenly spaced questions" if self.args.limit else ""
        print(f"{task.name}, {task.split} split{subset}\n{task.summary(scores)}")
        return 0


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["prepare"]:
        return prepare.main(words[1:])
    namespace = build_parser().parse_args(words)
    exit_with_parent()
    args = TaskArgs.from_cli_args(namespace)
    tasks = make_tasks(args.tasks.split(","), args.data_root, args.split, args.eval_data)
    # reports missing data before loading the model
    questions = [(task, ask_as(args.prompt_profile, task, task.questions(args.limit))) for task in tasks]
    evaluation = Evaluation(args, questions, args.output_dir or Path("eval") / args.model_name)
    if (rank := launch.torchrun_rank()) is not None:
        return evaluation.answer_rank(*rank)
    if args.chunk_idx is not None:
        return max(evaluation.answer((args.chunk_idx, args.num_chunks or 1)))
    count = args.num_chunks or (1 if args.api_base else max(1, len(launch.visible_gpus())))
    if not args.score_only and count == 1:
        return evaluation.answer_and_score()
    if not args.score_only:
        launch.run_shards("llava.eval.main", words, count)
    return evaluation.merge_and_score(count)


if __name__ == "__main__":
    sys.exit(main())
