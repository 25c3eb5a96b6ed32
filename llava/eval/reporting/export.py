"""Results for leaderboards: a results file in the format of lmms-eval, and the `model-index` of a model card.

llava report eval/MODEL --format lmms-eval     MODEL/DATE_results.json, as written by lmms-eval
llava report eval/MODEL --format model-index   MODEL/model-index.md, the metadata of a model card on the hub
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from llava import __version__
from llava.errors import DataError
from llava.eval.benchmarks.registry import TASKS
from llava.eval.reporting.data import Run, format_interval
from llava.eval.run.files import Record, Row
from llava.eval.run.manifest import read_manifest
from llava.files import write_text

Target = Mapping[str, tuple[str, float]]  # metric of lmms-eval → metric of `llava eval`, and factor
PERCENT: Final = 0.01


def _pope(name: str) -> Target:
    rates = {rate: rate for rate in ("accuracy", "precision", "recall", "yes_ratio")} | {"f1_score": "f1"}
    return {f"pope_{theirs}": (f"{name}/{ours}", 1.0) for theirs, ours in rates.items()}


_ACCURACY: Final[Target] = {"exact_match": ("accuracy", PERCENT)}
_JUDGED: Final[Target] = {"gpt_eval_llava_all": ("accuracy", 1.0)}
# task of `llava eval` → tasks of lmms-eval; both F1 of POPE and the units are theirs
LMMS_EVAL: Final[Mapping[str, Mapping[str, Target]]] = MappingProxyType(
    {
        "vqav2": {"vqav2_val": _ACCURACY},
        "gqa": {"gqa": _ACCURACY},
        "vizwiz": {"vizwiz_vqa_val": _ACCURACY},
        "science_qa": {"scienceqa": _ACCURACY, "scienceqa_img": {"exact_match": ("img_accuracy", PERCENT)}},
        "textvqa": {"textvqa_val": _ACCURACY},
        "pope": {
            "pope": _pope("pooled"),
            **{f"pope_{short}": _pope(f"categories/{name}")
               for short, name in (("adv", "adversarial"), ("pop", "popular"), ("random", "random"))},
        },
        "mme": {"mme": {"mme_perception_score": ("Perception", 1.0), "mme_cognition_score": ("Cognition", 1.0)}},
        "mmbench": {"mmbench_en_dev": {"gpt_eval_score": ("circular", 1.0)}},
        "mmbench_cn": {"mmbench_cn_dev": {"gpt_eval_score": ("circular", 1.0)}},
        "seed": {
            "seedbench": {
                "seed_all": ("total", PERCENT), "seed_image": ("kinds/image", PERCENT),
                "seed_video": ("kinds/video", PERCENT),
            }
        },
        "llava_bench": {"llava_in_the_wild": _JUDGED},
        "llava_bench_coco": {"llava_bench_coco": _JUDGED},
        "mm_vet": {"mmvet": {"gpt_eval_score": ("accuracy", 1.0)}},
    }
)  # fmt: skip
# datasets on the hub with the questions of a task
HUB: Final = MappingProxyType(
    {
        "vqav2": "lmms-lab/VQAv2", "gqa": "lmms-lab/GQA", "science_qa": "lmms-lab/ScienceQA",
        "textvqa": "lmms-lab/textvqa", "pope": "lmms-lab/POPE", "mme": "lmms-lab/MME", "mmbench": "lmms-lab/MMBench",
        "llava_bench": "liuhaotian/llava-bench-in-the-wild",
    }
)  # fmt: skip


def scored(run: Run) -> dict[str, Record]:
    """The scores that were computed here. Raises `DataError` if there are none, or one has no intervals."""
    found = {task: score for task, score in run.scores.items() if score.get("primary_metric") is not None}
    missing = [task for task, score in found.items() if "intervals" not in score]
    if missing:
        raise DataError(
            f"{run.folder / missing[0] / 'score.json'} has no intervals, because an older version wrote it; score the "
            "run again: llava eval ... --score-only."
        )
    if not found:
        raise DataError(f"{run.folder} has only answers that a server has to score; there is nothing to export.")
    return found


def task_results(score: Record, alias: str, target: Target) -> Row:
    """An entry of `results`: each metric with its clustered standard error, none for absent questions."""
    row: Row = {"alias": alias}
    for name, (path, factor) in target.items():
        interval = score["intervals"].get(path)
        if interval is not None:
            row[f"{name},none"] = factor * interval["value"]
            row[f"{name}_stderr,none"] = factor * interval["standard_error"]
    return row


def lmms_eval(run: Run) -> Row:
    """The content of a results file of lmms-eval. A task that it does not have keeps its name and unit."""
    parts: dict[str, Row] = {name: {} for name in ("results", "configs", "versions", "n-shot", "higher_is_better")}
    parts["n-samples"] = {}
    version, scores = __version__, scored(run)
    for task, score in scores.items():
        own = {task: {"exact_match": (TASKS[task].metric, 1.0)}}
        for name, target in LMMS_EVAL.get(task, own).items():
            facts = {key: score.get(key) for key in ("judge", "unread", "answers", "published_questions")}
            parts["results"][name] = task_results(score, name, target)
            parts["configs"][name] = {
                "task": name, "test_split": score["split"], "output_type": "generate_until", "num_fewshot": 0,
                "metadata": {"evaluator": "llava", "evaluator_task": task, "version": version, **facts},
            }  # fmt: skip
            parts["versions"][name], parts["n-shot"][name] = version, 0
            parts["higher_is_better"][name] = {metric: metric != "pope_yes_ratio" or None for metric in target}
            parts["n-samples"][name] = {"original": score["published_questions"], "effective": score["questions"]}
    manifest = read_manifest(run.folder / next(iter(scores)) / "answers.jsonl") or {}
    limits = {score.get("limit") for score in scores.values()}
    config = {
        "model": "llava", "model_args": f"pretrained={run.name}", "num_fewshot": 0,
        "limit": limits.pop() if len(limits) == 1 else None,
        "gen_kwargs": manifest.get("identity", {}).get("decoding"),
    }  # fmt: skip
    names = list(parts["results"])
    return {
        "results": parts.pop("results"), "group_subtasks": {name: [] for name in names}, **parts, "config": config,
        "git_hash": manifest.get("environment", {}).get("commit"), "date": time.time(), "model_source": "llava",
        "model_name": run.name, "model_name_sanitized": sanitized(run.name),
    }  # fmt: skip


def sanitized(name: str) -> str:
    """A model's name as a folder."""
    return name.replace("/", "__")


def model_index(run: Run) -> str:
    """The metadata block of a model card with the primary metric of each benchmark and its interval."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=HUB.get(task, task),
            dataset_name=TASKS[task].column or task,
            dataset_split=score["split"],
            dataset_args={"questions": score["questions"], "limit": score["limit"]} if score.get("limit") else None,
            metric_type="f1" if task == "pope" else "score" if task == "mme" else "accuracy",
            metric_value=round(score["primary_metric"], 2),
            metric_name=_metric_name(score["primary_interval"]),
        )
        for task, score in scored(run).items()
    ]
    data = ModelCardData(model_name=run.name, eval_results=results)
    return f"---\n{data.to_yaml()}\n---\n"


def _metric_name(interval: Mapping[str, float] | None) -> str | None:
    return f"95 % CI {format_interval(interval)}, {interval['clusters']:,} images" if interval else None


def export(run: Run, form: str, folder: Path) -> Path:
    """Write the results of a run below `folder` as `lmms-eval` or `model-index`; return the path."""
    if form == "model-index":
        path, text = folder / sanitized(run.name) / "model-index.md", model_index(run)
    else:
        path = folder / sanitized(run.name) / time.strftime("%Y%m%d_%H%M%S_results.json")
        text = json.dumps(lmms_eval(run), indent=2, allow_nan=False)
    write_text(path, text)
    return path
