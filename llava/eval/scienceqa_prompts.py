"""ScienceQA prompt formats: training conversations, instruction files, and the benchmark's question file.

A format is INPUT-OUTPUT, where the letters stand for the parts in order: question (Q), context (C), multiple choices
(M), lecture (L), explanation (E, `solution` in the data) and answer (A).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from llava.eval.benchmarks.science_qa import OPTIONS, Problem, read_problems
from llava.eval.run.files import Row, write_json, write_jsonl

INPUTS: Final = ("CQM", "QCM", "QCML", "QCME", "QCMLE", "QCLM", "QCEM", "QCLEM")
OUTPUTS: Final = ("A", "AL", "AE", "ALE", "AEL", "LA", "EA", "LEA", "ELA", "LEPA")
FORMATS: Final = tuple(f"{given}-{wanted}" for given in INPUTS for wanted in OUTPUTS)


def _tidy(text: str) -> str:
    """Replace double spaces once, as published, and remove a final `BECAUSE:` without a reason."""
    return text.replace("  ", " ").strip().removesuffix("BECAUSE:").strip()


def _reasons(problem: Problem, code: str) -> str:
    parts = {"L": problem.get("lecture") or "", "E": problem.get("solution") or ""}
    return " ".join(parts[letter] for letter in code).strip()


def model_input(problem: Problem, code: str) -> str:
    """The input: one line per part in the order of `code`, without a leading `Question: `."""
    choices = " ".join(f"({letter}) {choice}" for letter, choice in zip(OPTIONS, problem["choices"], strict=False))
    lines = []
    for part in re.findall("[LE]+|[QCM]", code):
        if part == "Q":
            lines.append(f"Question: {problem['question']}")
        elif part == "C":
            lines.append(f"Context: {(problem.get('hint') or '').strip() or 'N/A'}")
        elif part == "M":
            lines.append(f"Options: {choices}")
        else:
            lines.append(f"BECAUSE: {_reasons(problem, part)}")
    return _tidy("\n".join(lines)).removeprefix("Question: ")


def model_output(problem: Problem, code: str) -> str:
    """The output. As in the published code, `AL` contains the solution and `AE` the lecture."""
    letter = OPTIONS[problem["answer"]]
    if code == "LEPA":
        solution = _reasons(problem, "E")
        lines = [f"LECTURE: {_reasons(problem, 'L')}", f"SOLUTION: {solution}" if solution else ""]
        return _tidy("\n".join([*filter(None, lines), "###", f"ANSWER: {letter}."]))
    if code.startswith("A"):
        reasons = _reasons(problem, {"AL": "E", "AE": "L"}.get(code, code[1:]))
        return _tidy(f"The answer is {letter}." + (f" BECAUSE: {reasons}" if code != "A" else ""))
    return _tidy(f"{_reasons(problem, code[:-1])} The answer is {letter}.")


def _rows(base_dir: Path, split: str, prompt_format: str) -> Iterator[tuple[dict[str, str], str, str]]:
    """Yield the id and image, if any, the input with `<image>` on its last line, and the output."""
    given, wanted = prompt_format.split("-")
    for pid, problem in read_problems(base_dir, split).items():
        image = {"image": f"{pid}/{problem['image']}"} if problem.get("image") else {}
        text = model_input(problem, given) + ("\n<image>" if image else "")
        yield {"id": pid, **image}, text, model_output(problem, wanted)


def _conversation(text: str, answer: str) -> list[Row]:
    return [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]


def convert_to_llava(base_dir: Path, split: str, prompt_format: str) -> Path:
    """Write `llava_SPLIT_FORMAT.json`: training conversations."""
    path = base_dir / f"llava_{split}_{prompt_format}.json"
    rows = [{**head, "conversations": _conversation(*pair)} for head, *pair in _rows(base_dir, split, prompt_format)]
    write_json(path, rows, indent=2)
    return path


def convert_to_jsonl(base_dir: Path, split: str, prompt_format: str) -> Path:
    """Write `scienceqa_SPLIT_FORMAT.jsonl`: one instruction and output per line."""
    path = base_dir / f"scienceqa_{split}_{prompt_format}.jsonl"
    rows = [
        {**head, "instruction": text, "output": answer} for head, text, answer in _rows(base_dir, split, prompt_format)
    ]
    write_jsonl(path, rows)
    return path


def question_text(problem: Problem) -> str:
    """The question in the form of the benchmark's file: `<image>`, context, question, lettered options."""
    lines = ["<image>"] if problem.get("image") else []
    lines += [f"Context: {problem['hint']}"] if problem.get("hint") else []
    options = (f"{letter}. {choice}" for letter, choice in zip(OPTIONS, problem["choices"], strict=False))
    return "\n".join((*lines, problem["question"], *options))


def convert_to_questions(base_dir: Path, split: str, prompt_format: str = "CQM-A") -> Path:
    """Write `llava_SPLIT_CQM-A.json`, the question file of the benchmark."""
    path = base_dir / f"llava_{split}_{prompt_format}.json"
    rows = []
    for pid, problem in read_problems(base_dir, split).items():
        image = {"image": f"{pid}/{problem['image']}"} if problem.get("image") else {}
        turns = _conversation(question_text(problem), OPTIONS[problem["answer"]])
        rows.append({"id": pid, **image, "conversations": turns})
    write_json(path, rows, indent=2)
    return path


TASKS: Final[Mapping[str, Callable[[Path, str, str], Path]]] = {
    "convert_to_llava": convert_to_llava,
    "convert_to_jsonl": convert_to_jsonl,
    "convert_to_questions": convert_to_questions,
}
DEFAULTS: Final[Mapping[str, str]] = {
    "convert_to_llava": "QCM-LEA",
    "convert_to_jsonl": "QCM-LEPA",
    "convert_to_questions": "CQM-A",
}


def convert(task: str, base_dir: Path, split: str, prompt_format: str | None) -> str:
    """Run a conversion and return the path of its output."""
    return str(TASKS[task](base_dir, split, prompt_format or DEFAULTS[task]))
