"""Separate joint causes of a gap by running hybrids of two runs: the weights of one with inputs of the other.

With the first run's weights, its prompts, pixels and decoding settings are replaced by the second's one after the
other, and the weights last; with the second's weights, these come first. Questions stay joint if the hashes of a
hybrid's prompts and pixels are not those recorded by the runs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from llava.errors import ConfigError
from llava.eval.benchmarks.profiles import ask_as
from llava.eval.reporting.diff import ASKABLE, DECODING, INPUTS, MODELS, NUMERIC_KEYS, PIXELS, PROMPTS, Classes
from llava.eval.reporting.sides import Side
from llava.eval.run.answers import read_complete_lines, row_error, row_key
from llava.eval.run.files import Record
from llava.eval.run.manifest import to_json
from llava.eval.run.questions import Question

if TYPE_CHECKING:
    from llava.eval.options import EvalArgs
    from llava.eval.run.runner import EvalModel

logger = logging.getLogger(__name__)

STEPS: Final = (PROMPTS, PIXELS, DECODING)


def ask_hybrids(
    args: EvalArgs, folder: Path, first: Side, second: Side, classes: Classes
) -> Sequence[tuple[str, Mapping[str, Record]]]:
    """Answers of hybrids to the questions with several known causes; kept in `folder` and reused.

    Raises `ConfigError` if the model of `args` is that of neither run.
    """
    joint = [key for key, names in classes.items() if len(names) > 1 and ASKABLE.issuperset(names)]
    if not joint:
        logger.warning("%s: no question has several recorded causes; there is nothing to run.", first.task.name)
        return []
    names = [name for name in STEPS if any(name in classes[key] for key in joint)]
    rest = next((name for name in MODELS if any(name in classes[key] for key in joint)), None)
    engine, template = args.load_model()
    from llava.engine import Engine
    from llava.eval.run.local_model import LocalModel

    model: EvalModel = LocalModel(engine) if isinstance(engine, Engine) else engine
    identity = to_json(model.identity(args.run_settings(template, Path())))
    same = ("checkpoint", *NUMERIC_KEYS)
    owner = next((side for side in (first, second) if all(side.identity.get(k) == identity.get(k) for k in same)), None)
    if owner is None:
        raise ConfigError(
            f"--ask needs the model of one of the runs with its {', '.join(NUMERIC_KEYS)}; {args.model_name} differs."
        )

    def ask(changed: AbstractSet[str]) -> dict[str, Record]:
        sources = {name: second if name in changed else first for name in STEPS}
        if isinstance(engine, Engine):
            ratio = sources[PIXELS].identity.get("image_aspect_ratio")
            engine.image_aspect_ratio = None if ratio is None else str(ratio)
        label = "-".join(("second" if owner is second else "first", "weights", *sorted(changed)))
        return _answer(args, model, folder / first.task.name / f"{label}.jsonl", joint, sources)

    found: list[tuple[str, Mapping[str, Record]]] = []
    if rest and owner is second:
        found.append((rest, ask(frozenset())))
    for at, name in enumerate(names, 1):
        is_last = at == len(names) and not (rest and owner is first)
        found.append((name, second.rows if is_last else ask(frozenset(names[:at]))))
    return [*found, (rest, second.rows)] if rest and owner is first else found


def _questions(side: Side, keys: Sequence[str]) -> list[Question]:
    """The questions of a run from its question file; one that is no longer in it has its recorded prompt."""
    questions = ask_as(side.prompt_profile, side.task, side.task.questions(side.score.get("limit")))
    asked = {question.key: question for question in questions}
    rows = [side.rows[key] for key in keys]
    return [asked.get(row_key(row)) or Question(row["question_id"], row["prompt"], round_id=row.get("round_id"))
            for row in rows]  # fmt: skip


def _answer(
    args: EvalArgs, model: EvalModel, path: Path, keys: Sequence[str], sources: Mapping[str, Side]
) -> dict[str, Record]:
    """Answers by question, if their recorded hashes are those of the sources."""
    from llava.engine import SamplingParams
    from llava.eval.run.runner import run

    prompts, pixels = sources[PROMPTS], sources[PIXELS]
    pairs = zip(_questions(prompts, keys), _questions(pixels, keys))
    questions = [replace(question, images=shown.images) for question, shown in pairs]
    template, decoding = prompts.identity.get("template"), sources[DECODING].identity["decoding"]
    settings = args.run_settings(str(template["name"]) if isinstance(template, dict) else "", prompts.task.image_folder)
    params = SamplingParams(**{**decoding, "stop": tuple(decoding["stop"])})
    settings = replace(settings, params=params, images=pixels.task.images, follow_up=prompts.identity.get("follow_up"))
    run(model, questions, path, settings)
    answers: dict[str, Record] = {}
    for key, row in zip(keys, read_complete_lines(path), strict=True):
        facts = row.get("metadata", {})
        if row_error(row) is None and all(facts.get(INPUTS[name]) == sources[name].facts(key).get(INPUTS[name])
                                          for name in (PROMPTS, PIXELS)):  # fmt: skip
            answers[key] = row
    if len(answers) < len(keys):
        logger.warning("%s: %d of %d questions failed or have prompts or pixels other than recorded; they stay joint.",
                       path, len(keys) - len(answers), len(keys))  # fmt: skip
    return answers
