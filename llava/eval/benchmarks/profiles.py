"""Prompt profiles: the prompts and token limits with which other harnesses ask the questions of a benchmark.

A profile changes the text sent to the model and the token limit, nothing else: answers are recorded and scored as with
LLaVA's prompts, so that `llava report --diff` attributes a gap to the prompts. The texts are byte for byte those of
lmms-eval 0.7.3 (its `default` prompts).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from llava.errors import ConfigError
from llava.eval.benchmarks.base import Task
from llava.eval.benchmarks.mmbench import MMBench, options_of
from llava.eval.benchmarks.mme import ENDING, official_questions
from llava.eval.benchmarks.textvqa import prompt_processor
from llava.eval.benchmarks.vqa import UNANSWERABLE
from llava.eval.run.files import Record
from llava.eval.run.questions import LETTER_SUFFIX, SHORT_SUFFIX, Question

LLAVA: Final = "llava"
REASON: Final = (
    "First please perform reasoning, and think step by step to provide best answer to the following question: \n\n"
)
LETTER_SUFFIX_LMMS_CN: Final = "请直接使用所提供的选项字母作为答案回答。"
Texts = Callable[[Task, Sequence[Question]], Sequence[str]]


@dataclass(frozen=True)
class Prompts:
    """The token limit of a task, and the texts for its questions; by default those of LLaVA."""

    max_new_tokens: int
    texts: Texts | None = None


def _mme(task: Task, questions: Sequence[Question]) -> Sequence[str]:
    """The official questions, where a request for a short answer replaces the one for yes or no."""
    rows = [{"question_id": each.question_id, "prompt": each.prompt} for each in questions]
    asked = official_questions(task.image_folder, rows)
    return [f"{text.strip().replace(f' {ENDING}', '')}\n{SHORT_SUFFIX}" for text in asked]


def plain_question(text: str) -> str:
    """A question without the instructions for short answers."""
    return text.removesuffix(f"\n{SHORT_SUFFIX}").removesuffix(f"\n{UNANSWERABLE}")


def _vizwiz(task: Task, questions: Sequence[Question]) -> Sequence[str]:
    """Only the first letter of the question is a capital."""
    asked = (plain_question(each.prompt) for each in questions)
    return [f"{text.capitalize()}\n{UNANSWERABLE}\n{SHORT_SUFFIX}" for text in asked]


def _textvqa(task: Task, questions: Sequence[Question]) -> Sequence[str]:
    """Without OCR words; only the first letter of the question is a capital."""
    return [f"{prompt_processor(each.prompt).capitalize()}\n{SHORT_SUFFIX}" for each in questions]


def _mmbench(suffix: str) -> Texts:
    def texts(task: Task, questions: Sequence[Question]) -> Sequence[str]:
        assert isinstance(task, MMBench)
        rows = {int(row["index"]): row for row in task.rows}
        return [_mmbench_text(rows[int(each.question_id)], suffix) for each in questions]

    return texts


def _mmbench_text(row: Record, suffix: str) -> str:
    options = "".join(f"{letter}. {text}\n" for letter, text in options_of(row).items())
    hint = f"{row['hint']} " if row.get("hint") else ""
    return f"{hint}{row['question']} There are several options:\n{options}\n{suffix}"


def _mm_vet(task: Task, questions: Sequence[Question]) -> Sequence[str]:
    return [f"{REASON}{each.prompt}" for each in questions]


PROFILES: Final[Mapping[str, Mapping[str, Prompts]]] = MappingProxyType(
    {
        "lmms-eval": {
            "vqav2": Prompts(16),
            "gqa": Prompts(16),
            "vizwiz": Prompts(1024, _vizwiz),
            "science_qa": Prompts(16),
            "textvqa": Prompts(1024, _textvqa),
            "pope": Prompts(128),
            "mme": Prompts(16, _mme),
            "mmbench": Prompts(1024, _mmbench(LETTER_SUFFIX)),
            "mmbench_cn": Prompts(256, _mmbench(LETTER_SUFFIX_LMMS_CN)),
            "seed": Prompts(1024),
            "llava_bench": Prompts(4096),
            "llava_bench_coco": Prompts(1024),
            "mm_vet": Prompts(1024, _mm_vet),
        },
    }
)


def recorded_profile(identity: Record) -> str:
    """The profile of a run by the identity in its manifest."""
    return str(identity.get("prompt_profile", LLAVA))


def _prompts(profile: str, task: Task) -> Prompts:
    if profile not in PROFILES:
        raise ConfigError(f"Unknown prompt profile {profile!r}; choose from {', '.join((LLAVA, *PROFILES))}.")
    if task.name not in PROFILES[profile]:
        raise ConfigError(f"Profile {profile} has no prompts for {task.name}; it has {', '.join(PROFILES[profile])}.")
    return PROFILES[profile][task.name]


def token_limit(profile: str, task: Task) -> int:
    """The token limit of a task without `--max-new-tokens`."""
    return task.max_new_tokens if profile == LLAVA else _prompts(profile, task).max_new_tokens


def ask_as(profile: str, task: Task, questions: Sequence[Question]) -> Sequence[Question]:
    """The questions with the texts of a profile. Raises `ConfigError` if it has no prompts for the task."""
    texts = None if profile == LLAVA else _prompts(profile, task).texts
    if texts is None:
        return questions
    return [replace(each, text=text) for each, text in zip(questions, texts(task, questions), strict=True)]
