"""The `model_*` programs and `run_llava`: flags, defaults, records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llava.engine import Engine, SamplingParams
from llava.errors import ImageError
from llava.eval import model_qa, model_vqa, model_vqa_loader, model_vqa_mmbench, model_vqa_science, run_llava
from llava.eval.run.images import Base64Images, prefetch
from llava.eval.run.questions import Question
from llava.eval.run.runner import RunSettings
from tests.eval.benchdata import make_mmbench_en, make_science_qa, make_textvqa
from tests.eval.conftest import read_jsonl, write_jsonl


@pytest.fixture
def flags(engine: Engine, tiny_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("llava.engine.engine.load_engine", lambda *arguments, **options: engine)
    base = ["--model-path", str(tiny_dirs["chat"]), "--device", "cpu", "--max-new-tokens", "3", "--temperature", "0"]
    return [*base, "--answers-file", str(tmp_path / "a.jsonl")]


def test_common_flags_of_all_runners(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for program in (model_vqa, model_vqa_loader, model_vqa_mmbench, model_vqa_science):
        with pytest.raises(SystemExit):
            program.main(["--help"])
        shown = capsys.readouterr().out
        for name in ("model-path", "model-base", "image-folder", "question-file", "answers-file", "conv-mode",
                     "num-chunks", "chunk-idx", "temperature", "top_p", "num_beams", "max-new-tokens", "batch-size",
                     "num-workers", "device", "dtype", "load-4bit", "load-8bit", "seed", "limit", "resume",
                     "overwrite", "image-aspect-ratio", "api-base"):  # fmt: skip
            assert f"--{name}" in shown, (program.__name__, name)


def test_mmbench_by_rounds(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_mmbench_en(tmp_path)
    table = tmp_path / "mmbench_dev_20230712.tsv"
    assert model_vqa_mmbench.main([*flags, "--question-file", str(table), "--single-pred-prompt"]) == 0
    assert [row["round_id"] for row in read_jsonl(tmp_path / "a.jsonl")] == [0, 0, 0]
    assert model_vqa_mmbench.main([*flags, "--question-file", str(table), "--all-rounds"]) == 2
    assert "would rotate twice" in capsys.readouterr().err
    lines = [line for line in table.read_text().splitlines() if not line.startswith("1000007")]
    table.write_text("\n".join(lines) + "\n")
    assert model_vqa_mmbench.main([*flags, "--question-file", str(table), "--all-rounds", "--overwrite"]) == 0
    rows = read_jsonl(tmp_path / "a.jsonl")
    assert [(row["question_id"], row["round_id"]) for row in rows] == [(7, 0), (7, 1), (8, 0), (8, 1), (8, 2)]
    assert rows[3]["options"] == ["nan", "x", "None"] and rows[3]["option_char"] == ["B", "C", "A"]
    assert rows[3]["prompt"].endswith("A. nan\nB. x\nC. None") and len({row["answer_id"] for row in rows}) == 5
    assert model_vqa_mmbench.main([*flags, "--question-file", str(table), "--lang", "fr"]) == 2


def test_science_qa_answer_prompter(flags: list[str], tmp_path: Path) -> None:
    make_science_qa(tmp_path)
    science = ["--question-file", str(tmp_path / "llava_test_CQM-A.json"), "--single-pred-prompt"]
    science += ["--image-folder", str(tmp_path / "images/test")]
    assert model_vqa_science.main([*flags, *science]) == 0
    first = read_jsonl(tmp_path / "a.jsonl")
    assert first[0]["prompt"].startswith("<image>\nQ?")
    assert (
        model_vqa_science.main([*flags, *science, "--answer-prompter"]) == 2
    )  # the file has answers of other settings
    assert model_vqa_science.main([*flags, *science, "--answer-prompter", "--overwrite"]) == 0
    for row, before in zip(read_jsonl(tmp_path / "a.jsonl"), first):
        assert row["text"].startswith(f"{before['text']}\n The answer is ")


def test_long_answers(flags: list[str], tmp_path: Path) -> None:
    make_textvqa(tmp_path)
    plain = ["--question-file", str(tmp_path / "llava_textvqa_val_v051_ocr.jsonl")]
    assert model_vqa.main([*flags, *plain, "--image-folder", str(tmp_path / "train_images")]) == 0
    assert len(read_jsonl(tmp_path / "a.jsonl")) == 3


def test_one_answer_about_two_images(
    flags: list[str],
    images: Path,
    capsys: pytest.CaptureFixture[str],
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda request: (asked.append(request), submit(request))[1])
    base = flags[:-2]
    one, two = (str(images / f"{name}.png") for name in ("red", "blue"))
    assert run_llava.main([*base, "--image-file", one, "--sep", "", "--query", "What is it?"]) == 0
    query = "Is <image-placeholder> like <image-placeholder>?"
    assert run_llava.main([*base, "--image-file", f"{one};{two}", "--sep", ";", "--query", query]) == 0
    assert [len(request.images) for request in asked] == [1, 2]
    assert asked[1].prompt.endswith("Is <image> like <image>? ASSISTANT:") and "<image>\nWhat" in asked[0].prompt
    assert capsys.readouterr().out.count("\n") >= 2
    monkeypatch.setattr("llava.engine.engine.load_engine", lambda *arguments, **options: pytest.fail("loaded"))
    assert run_llava.main([*base, "--image-file", "none.png", "--query", "x"]) == 2
    assert run_llava.main([*base, "--image-file", one, "--query", "x", "--conv-mode", "v9"]) == 2


def test_a_language_model_answers_without_images(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    questions = write_jsonl(tmp_path / "q.jsonl", [{"question_id": n, "text": "What is red?"} for n in range(2)])
    flags = ["--model-name", str(tiny_dirs["base"]), "--question-file", str(questions), "--max-new-tokens", "5"]
    for name in ("a", "b"):
        answers = ["--answers-file", str(tmp_path / f"{name}.jsonl"), "--device", "cpu"]
        assert model_qa.main([*flags, *answers]) == 0
    rows = read_jsonl(tmp_path / "a.jsonl")
    assert list(rows[0]) == ["question_id", "text", "answer_id", "model_id", "metadata"]
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "config.json").write_text('{"model_type": "strange"}')
    for unfit in (tmp_path, tmp_path / "strange"):
        assert model_qa.main(["--model-name", str(unfit), "--question-file", str(questions), "--device", "cpu"]) == 2


def test_worker_processes_open_images_in_order(images: Path) -> None:
    names = ("red", "green", "blue", "gray")
    questions = [Question(n, str(n), (f"{names[n % 4]}.png",)) for n in range(20)] + [Question(20, "x", ("gone.png",))]
    settings = RunSettings("", "", "", SamplingParams(1), images)
    found = list(prefetch(questions, range(21), settings.source, 2))
    assert [position for position, _ in found] == list(range(21))
    colors = [images[0].getpixel((0, 0)) for _, images in found[:4]]  # type: ignore[index]
    assert colors == [(255, 0, 0), (0, 128, 0), (0, 0, 255), (128, 128, 128)]
    assert isinstance(found[20][1], ImageError)


def test_images_in_a_table() -> None:
    with pytest.raises(ImageError, match="not base64"):
        Base64Images({"a": "?"}).open("a")
    with pytest.raises(ImageError, match="Cannot read image 'b'"):
        Base64Images({}).read("b")
