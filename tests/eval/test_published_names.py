"""Names that users of LLaVA import from `llava.eval`, called as its documentation shows."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from llava.constants import IMAGE_TOKEN_INDEX
from llava.engine import Engine, SamplingParams
from llava.errors import ConfigError, DataError, ImageError
from llava.eval import eval_textvqa, m4c_evaluator, model_vqa, model_vqa_loader, run_llava
from llava.eval.run.questions import Question
from llava.eval.run.runner import Outcome, RunSettings
from llava.mm_utils import get_model_name_from_path
from tests.eval.conftest import question_rows, read_jsonl, write_jsonl


@pytest.fixture
def model_path(engine: Engine, tiny_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("llava.engine.engine.load_engine", lambda *arguments, **options: engine)
    return str(tiny_dirs["chat"])


def test_run_llava_as_in_the_readme(model_path: str, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "What is in the image?"
    image_file = str(images / "red.png")
    args = type('Args', (), {
        "model_path": model_path,
        "model_base": None,
        "model_name": get_model_name_from_path(model_path),
        "query": prompt,
        "conv_mode": None,
        "image_file": image_file,
        "sep": ",",
        "temperature": 0,
        "top_p": None,
        "num_beams": 1,
        "max_new_tokens": 512,
    })()  # fmt: skip
    args.max_new_tokens = 4
    run_llava.eval_model(args)  # type: ignore[func-returns-value]
    answer = capsys.readouterr().out
    flags = ["--model-path", model_path, "--image-file", image_file, "--query", prompt, "--max-new-tokens", "4"]
    assert run_llava.main(flags) == 0
    assert answer.strip() and capsys.readouterr().out == answer
    args.conv_mode = "v9"
    with pytest.raises(ValueError, match="'v9'"):
        run_llava.eval_model(args)


def test_load_image(images: Path) -> None:
    image = run_llava.load_image(str(images / "red.png"))
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(ImageError):
        run_llava.load_image(str(images / "none.png"))


@pytest.mark.parametrize(("program", "tokens"), [(model_vqa, 1024), (model_vqa_loader, 128)])
def test_eval_model_answers_a_question_file(
    program: object, tokens: int, model_path: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attributes are strings and numbers, as in the published programs; `max_new_tokens` has the program's default."""
    questions = write_jsonl(tmp_path / "questions.jsonl", question_rows(4))
    args = argparse.Namespace(
        model_path=model_path, model_base=None, image_folder=str(images), question_file=str(questions),
        answers_file=str(tmp_path / "answers.jsonl"), conv_mode="vicuna_v1", num_chunks=2, chunk_idx=1, temperature=0,
        top_p=None, num_beams=1,
    )  # fmt: skip
    limits: list[int] = []
    run = model_vqa_loader.run

    def run_short(model: Engine, questions: list[Question], answers: Path, settings: RunSettings) -> Outcome:
        limits.append(settings.params.max_new_tokens)
        return run(model, questions, answers, dataclasses.replace(settings, params=SamplingParams(3)))

    monkeypatch.setattr(model_vqa_loader, "run", run_short)
    assert program.eval_model(args) is None  # type: ignore[attr-defined]
    assert limits == [tokens]
    assert [row["prompt"] for row in read_jsonl(tmp_path / "answers.jsonl")] == [
        "What is number 2?",
        "What is number 3?",
    ]
    args.question_file = "none.jsonl"
    with pytest.raises(DataError, match="is not a file"):
        program.eval_model(args)  # type: ignore[attr-defined]


def test_chunks_are_consecutive() -> None:
    assert model_vqa.split_list(list(range(5)), 2) == [[0, 1, 2], [3, 4]]
    assert model_vqa.get_chunk(list(range(5)), 2, 1) == [3, 4]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_data_loader_yields_prompts_and_pixels(
    workers: int, engine: Engine, tiny_dirs: dict[str, Path], images: Path
) -> None:
    questions = [row for row in question_rows(4) if "image" in row]
    tokenizer = AutoTokenizer.from_pretrained(tiny_dirs["chat"], use_fast=False)
    parts = (questions, str(images), tokenizer, engine.image_processor, engine.model.config)
    loader = model_vqa_loader.create_data_loader(*parts, num_workers=workers)
    items = list(loader)
    assert len(items) == len(loader) == 4
    for (input_ids, pixels), row in zip(items, questions):
        assert input_ids.shape[0] == 1 and (input_ids == IMAGE_TOKEN_INDEX).sum() == 1
        assert row["text"] in tokenizer.decode(input_ids[0][input_ids[0] >= 0])
        assert pixels.shape[:2] == (1, 3) and pixels.shape[2] == pixels.shape[3] and pixels.dtype == torch.float32
    with pytest.raises(ConfigError, match="batch_size must be 1, got 2"):
        model_vqa_loader.create_data_loader(*parts, batch_size=2)


def test_textvqa_and_m4c() -> None:
    suffix = "\nAnswer the question using a single word or phrase."
    assert eval_textvqa.prompt_processor("What Is It?" + suffix) == "what is it?"
    assert m4c_evaluator.EvalAIAnswerProcessor()("The Two dogs.") == "2 dogs"
    pairs = [{"pred_answer": "Yes.", "gt_answers": ["yes"] * 3 + ["no"] * 7}]
    assert m4c_evaluator.TextVQAAccuracyEvaluator().eval_pred_list(pairs) == pytest.approx(0.9)
