"""POPE, TextVQA, ScienceQA and MME by `llava eval` and by their scripts, on made-up data in the official layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.eval import main as evaluate
from llava.eval import model_vqa, model_vqa_science
from llava.eval.questions import LETTER_SUFFIX, read_science_questions
from llava.eval.scorers.mme import TASKS
from llava.eval.tasks import make_task
from tests.eval.conftest import read_jsonl, write_jsonl
from tests.test_package import ROOT

ASK = "\nAnswer the question using a single word or phrase."
COUNTS = {"pope": 4, "textvqa": 3, "science_qa": 2, "mme": 28}
FOLDERS = {"pope": "pope", "textvqa": "textvqa", "science_qa": "scienceqa", "mme": "MME"}


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), "red").save(path)


def dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def make_pope(root: Path) -> None:
    picture(root / "val2014" / "1.jpg")
    (root / "coco").mkdir()
    rows = []
    for first, category in ((0, "adversarial"), (10, "popular")):
        questions = [f"Is there a {thing} in the image?" for thing in ("cat", "dog")]
        labels = [{"image": "1.jpg", "text": text, "label": "yes"} for text in questions]
        write_jsonl(root / "coco" / f"coco_pope_{category}.json", labels)
        rows += [
            {"question_id": first + n, "image": "1.jpg", "text": text + ASK, "category": category}
            for n, text in enumerate(questions)
        ]
    write_jsonl(root / "llava_pope_test.jsonl", rows)


def make_textvqa(root: Path) -> None:
    picture(root / "train_images" / "i.jpg")
    asked = [f"Q{n}?" for n in range(3)]
    rows = [{"question_id": "i", "image": "i.jpg", "text": text + ASK} for text in asked]
    write_jsonl(root / "llava_textvqa_val_v051_ocr.jsonl", rows)
    people = [{"image_id": "i", "question": text, "answers": ["stop"] * 10} for text in asked]
    dump(root / "TextVQA_0.5.1_val.json", {"data": people})


def make_science_qa(root: Path) -> None:
    picture(root / "images" / "test" / "1" / "image.png")
    problem = {"question": "Q?", "choices": ["x", "y"], "answer": 1, "hint": "", "grade": "grade3"}
    dump(root / "problems.json", {"1": {**problem, "image": "image.png"}, "2": {**problem, "image": None}})
    dump(root / "pid_splits.json", {"test": ["1", "2"]})
    turns = [{"from": "human", "value": "<image>\nQ?\nA. x\nB. y"}, {"from": "gpt", "value": "B"}]
    rows = [{"id": "1", "image": "1/image.png", "conversations": turns}]
    rows += [{"id": "2", "conversations": [{"from": "human", "value": "Q?\nA. x\nB. y"}]}]
    dump(root / "llava_test_CQM-A.json", rows)


def make_mme(root: Path) -> None:
    rows = []
    for task in TASKS:
        place = root / "MME_Benchmark_release_version" / task
        picture(place / "0.png")
        (place / "0.txt").write_text("Is it? Please answer yes or no.\tYes\nNot? Please answer yes or no.\tNo\n")
        rows += [
            {"question_id": f"{task}/0.png", "image": f"{task}/0.png", "text": text + ASK, "category": task}
            for text in ("Is it?", "Not?")
        ]
    write_jsonl(root / "llava_mme.jsonl", rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name, make in (("pope", make_pope), ("textvqa", make_textvqa)):
        (root / FOLDERS[name]).mkdir()
        make(root / FOLDERS[name])
    for name, make in (("science_qa", make_science_qa), ("mme", make_mme)):
        (root / FOLDERS[name]).mkdir()
        make(root / FOLDERS[name])
    return root


@pytest.mark.parametrize("name", COUNTS)
def test_llava_eval_answers_and_scores(
    name: str, tiny_dirs: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--tasks", name, "--model-path", str(tiny_dirs["chat"]), "--device", "cpu", "--max-new-tokens", "2"]
    flags += ["--data-root", str(data / FOLDERS[name]), "--output-dir", str(tmp_path)]
    assert evaluate.main(flags) == 0
    assert name in capsys.readouterr().out
    assert len(read_jsonl(tmp_path / name / "answers.jsonl")) == COUNTS[name]
    score = json.loads((tmp_path / name / "score.json").read_text())
    assert score["task"] == name and score["limit"] is None
    rows = read_jsonl(tmp_path / name / "answers.jsonl")
    write_jsonl(tmp_path / "short.jsonl", rows[:-1])
    with pytest.raises(ValueError, match="not scored"):
        make_task(name, data / FOLDERS[name]).score(tmp_path / "short.jsonl")


RIGHT = {
    "pope": (["Yes"] * 4, lambda score: score["mean_f1"]),
    "textvqa": (["Stop."] * 3, lambda score: score["accuracy"]),
    "science_qa": (["B"] * 2, lambda score: score["img_accuracy"]),
    "mme": (["Yes", "No"] * 14, lambda score: score["Perception"] / 20),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_answers_score_full_also_for_a_part_of_the_questions(name: str, data: Path, tmp_path: Path) -> None:
    texts, figure = RIGHT[name]
    task = make_task(name, data / FOLDERS[name])

    def score(limit: int | None) -> float:
        rows = [
            {"question_id": question.question_id, "prompt": question.prompt, "text": text}
            for question, text in zip(task.questions(limit), texts)
        ]
        return float(figure(task.score(write_jsonl(tmp_path / "a.jsonl", rows), limit)))

    assert score(None) == pytest.approx(100)
    if name == "mme":
        with pytest.raises(ValueError, match="no --limit"):
            score(1)
    else:
        assert score(1) == pytest.approx(100)


@pytest.mark.parametrize("name", COUNTS)
def test_a_missing_file_is_named_with_its_source(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"eval\.zip"):
        make_task(name, tmp_path).questions()
    assert str(make_task(name).image_folder).startswith(str(Path("playground/data/eval")))


def test_science_questions_are_asked_with_and_without_the_suffix(data: Path, tmp_path: Path) -> None:
    path = data / "scienceqa" / "llava_test_CQM-A.json"
    first, second = read_science_questions(path, single_pred_prompt=True)
    assert first.prompt == f"<image>\n{first.text}" and first.text == f"Q?\nA. x\nB. y\n{LETTER_SUFFIX}"
    assert second.prompt == second.text and second.images == ()
    assert read_science_questions(path)[1].text == "Q?\nA. x\nB. y"
    (tmp_path / "bad.json").write_text('[{"id": 1}]')
    with pytest.raises(ValueError, match=r"bad\.json is not a list of ScienceQA"):
        read_science_questions(tmp_path / "bad.json")


def test_the_runners_of_long_answers(tiny_dirs: dict[str, Path], data: Path, tmp_path: Path) -> None:
    flags = ["--model-path", str(tiny_dirs["chat"]), "--device", "cpu", "--max-new-tokens", "2", "--temperature", "0"]
    science = ["--question-file", str(data / "scienceqa/llava_test_CQM-A.json"), "--single-pred-prompt"]
    science += ["--image-folder", str(data / "scienceqa/images/test"), "--answers-file", str(tmp_path / "s.jsonl")]
    assert model_vqa_science.main([*flags, *science]) == 0
    assert read_jsonl(tmp_path / "s.jsonl")[0]["prompt"].startswith("<image>\nQ?")
    plain = ["--question-file", str(data / "textvqa/llava_textvqa_val_v051_ocr.jsonl")]
    plain += ["--image-folder", str(data / "textvqa/train_images"), "--answers-file", str(tmp_path / "v.jsonl")]
    assert model_vqa.main([*flags, *plain]) == 0
    assert len(read_jsonl(tmp_path / "v.jsonl")) == 3


def script(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    command = ["sh", f"scripts_internvl/eval/{name}.sh", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


SCRIPTS = sorted(path.stem for path in (ROOT / "scripts_internvl" / "eval").glob("[!_]*.sh"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "says"), [("mme", "Perception"), ("sqa", "IMG-Accuracy"), ("pope", "Mean F1")])
def test_scripts_run_end_to_end(name: str, says: str, tiny_dirs: dict[str, Path], data: Path) -> None:
    flags = ["--device", "cpu", "--max-new-tokens", "2"]
    done = script(name, f"{tiny_dirs['chat']}/", *flags, EVAL_DATA=str(data))
    assert done.returncode == 0, done.stderr
    assert says in done.stdout


@pytest.mark.slow
def test_shards_are_merged_in_order_and_a_dead_one_is_named(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "gqa"
    picture(root / "data" / "images" / "1.jpg")
    ids = [str(n) for n in range(5)]
    rows = [{"question_id": each, "image": "1.jpg", "text": "Q?" + ASK} for each in ids]
    questions = write_jsonl(root / "llava_gqa_testdev_balanced.jsonl", rows)
    dump(root / "data" / "testdev_balanced_questions.json", {each: {"answer": "yes"} for each in ids})
    command = [str(tiny_dirs["chat"]), "--device", "cpu", "--max-new-tokens", "2"]
    variables = {"EVAL_DATA": str(tmp_path), "CUDA_VISIBLE_DEVICES": "0,1"}
    done = script("gqa", *command, **variables)
    assert done.returncode == 0, done.stderr
    folder = next((root / "answers" / "llava_gqa_testdev_balanced").iterdir())
    assert [row["question_id"] for row in read_jsonl(folder / "merge.jsonl")] == ids
    assert "all                5" in done.stdout
    (folder / "merge.jsonl").unlink()
    write_jsonl(questions, [*rows[:4], {**rows[4], "image": "lost.jpg"}])
    done = script("gqa", *command, "--overwrite", **variables)
    assert done.returncode == 2
    assert "shard(s) 1 of 2 failed" in done.stderr
    assert not (folder / "merge.jsonl").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_say_what_is_missing_and_what_they_would_run(name: str, tmp_path: Path) -> None:
    assert "usage: sh" in script(name).stderr
    done = script(name, "some/model", EVAL_DATA=str(tmp_path), OPENAI_API_KEY="")
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr and "docs/Evaluation.md" in done.stderr
    done = script(name, "a/checkpoint-9/", EVAL_DATA=str(tmp_path), LLAVA_DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    first, *others = done.stdout.splitlines()
    assert "--model-path a/checkpoint-9 " in first and "--temperature 0 --conv-mode vicuna_v1" in first
    assert others and all("a_checkpoint-9" in line for line in others)
    assert list(tmp_path.iterdir()) == []
