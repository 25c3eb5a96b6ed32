"""ScienceQA prompt formats: training conversations, instruction files, and the benchmark's question file.

A format is INPUT-OUTPUT, where the letters stand for the parts in order: question (Q), context (C), multiple choices
(M), lecture (L), explanation (E, `solution` in the data) and answer (A).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
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


def question_text(problem: Problem) -> str:
    """The question in the form of the benchmark's file: `<image>`, context, question, lettered options."""
    lines = ["<image>"] if problem.get("image") else []
    lines += [f"Context: {problem['hint']}"] if problem.get("hint") else []
    options = (f"{letter}. {choice}" for letter, choice in zip(OPTIONS, problem["choices"], strict=False))
    return "\n".join((*lines, problem["question"], *options))


def _conversation(text: str, answer: str) -> list[Row]:
    return [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]


def _rows(task: str, base_dir: Path, split: str, prompt_format: str) -> Iterator[Row]:
    """Yield the rows of a conversion; in the inputs of the published formats, `<image>` is the last line."""
    input_code, output_code = prompt_format.split("-")
    for pid, problem in read_problems(base_dir, split).items():
        head = {"id": pid, **({"image": f"{pid}/{problem['image']}"} if problem.get("image") else {})}
        text = model_input(problem, input_code) + ("\n<image>" if problem.get("image") else "")
        answer = model_output(problem, output_code)
        if task == "convert_to_questions":
            text, answer = question_text(problem), OPTIONS[problem["answer"]]
        if task == "convert_to_jsonl":
            yield {**head, "instruction": text, "output": answer}
        else:
            yield {**head, "conversations": _conversation(text, answer)}


# task: default format and output file
TASKS: Final[Mapping[str, tuple[str, str]]] = {
    "convert_to_llava": ("QCM-LEA", "llava_{}_{}.json"),  # training conversations
    "convert_to_jsonl": ("QCM-LEPA", "scienceqa_{}_{}.jsonl"),  # instructions and outputs
    "convert_to_questions": ("CQM-A", "llava_{}_{}.json"),  # the question file of the benchmark
}


def convert(task: str, base_dir: Path, split: str, prompt_format: str | None) -> str:
    """Run a conversion of `TASKS` and return the path of its output."""
    default_format, name = TASKS[task]
    prompt_format = prompt_format or default_format
    path = base_dir / name.format(split, prompt_format)
    rows = list(_rows(task, base_dir, split, prompt_format))
    if path.suffix == ".jsonl":
        write_jsonl(path, rows)
    else:
        write_json(path, rows, indent=2)
    return str(path)
