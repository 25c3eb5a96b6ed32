"""Synthetic data of every benchmark in its official layout: a few questions with images and labels."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from llava.eval.benchmarks.mme import TASKS
from llava.eval.run.questions import LETTER_SUFFIX, SHORT_SUFFIX
from tests.eval.conftest import write_jsonl

ASK = f"\n{SHORT_SUFFIX}"
COLORS = ("red", "blue", "green")


def save_image(path: Path, color: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), color).save(path)


def dump(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def make_pope(root: Path) -> None:
    save_image(root / "val2014" / "1.jpg")
    (root / "coco").mkdir()
    rows = []
    for first, category in ((0, "adversarial"), (10, "popular"), (20, "random")):
        questions = [f"Is there a {thing} in the image?" for thing in ("cat", "dog")]
        labels = [{"image": "1.jpg", "text": text, "label": "yes"} for text in questions]
        write_jsonl(root / "coco" / f"coco_pope_{category}.json", labels)
        rows += [
            {"question_id": first + n, "image": "1.jpg", "text": text + ASK, "category": category}
            for n, text in enumerate(questions)
        ]
    write_jsonl(root / "llava_pope_test.jsonl", rows)


def make_textvqa(root: Path) -> None:
    save_image(root / "train_images" / "i.jpg")
    asked = [f"Q{n}?" for n in range(3)]
    rows = [{"question_id": "i", "image": "i.jpg", "text": text + ASK} for text in asked]
    write_jsonl(root / "llava_textvqa_val_v051_ocr.jsonl", rows)
    people = [{"image_id": "i", "question": text, "answers": ["stop"] * 10} for text in asked]
    dump(root / "TextVQA_0.5.1_val.json", {"data": people})


def make_science_qa(root: Path) -> None:
    save_image(root / "images" / "test" / "1" / "image.png")
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
        save_image(place / "0.png")
        (place / "0.txt").write_text("Is it? Please answer yes or no.\tYes\nNot? Please answer yes or no.\tNo\n")
        rows += [
            {"question_id": f"{task}/0.png", "image": f"{task}/0.png", "text": text + ASK, "category": task}
            for text in ("Is it?", "Not?")
        ]
    write_jsonl(root / "llava_mme.jsonl", rows)


def make_vqav2(root: Path) -> None:
    for number, color in enumerate(COLORS):
        save_image(root / "test2015" / f"{number}.jpg", color)
    rows = [
        {"question_id": 100 + n, "image": f"{n % 3}.jpg", "text": f"What is {n}?{ASK}", "category": "default"}
        for n in range(5)
    ]
    write_jsonl(root / "llava_vqav2_mscoco_test-dev2015.jsonl", rows)
    write_jsonl(root / "llava_vqav2_mscoco_test2015.jsonl", [*rows, {**rows[0], "question_id": 900}])
    save_image(root / "val2014" / "COCO_val2014_000000000007.jpg")
    asked = [{"image_id": 7, "question": f"Val {n}?", "question_id": n} for n in range(2)]
    dump(root / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
    people = [{"question_id": n, "answers": [{"answer": "yes"}] * 10} for n in range(2)]
    dump(root / "v2_mscoco_val2014_annotations.json", {"annotations": people})


def make_gqa(root: Path) -> None:
    for number, color in enumerate(COLORS):
        save_image(root / "data" / "images" / f"n{number}.jpg", color)
    ids = [str(n) for n in range(7)]
    rows = [
        {"question_id": each, "image": f"n{int(each) % 3}.jpg", "text": f"Q{each}?{ASK}", "category": "default"}
        for each in ids
    ]
    write_jsonl(root / "llava_gqa_testdev_balanced.jsonl", rows)
    labels = {each: {"answer": "yes", "types": {"structural": "verify"}} for each in ids}
    dump(root / "data" / "testdev_balanced_questions.json", labels)


def make_vizwiz(root: Path) -> None:
    rows = []
    for split in ("test", "val"):
        for number, color in enumerate(COLORS[:2]):
            save_image(root / split / f"VizWiz_{split}_{number:08d}.jpg", color)
    for number in range(2):
        name = f"VizWiz_test_{number:08d}.jpg"
        rows.append({"question_id": number, "image": name, "text": f"What?\nWhen…{ASK}", "category": "default"})
    write_jsonl(root / "llava_test.jsonl", rows)
    people = [{"answer": "yes"}] * 10
    val = [{"image": f"VizWiz_val_{n:08d}.jpg", "question": "What?", "answers": people} for n in range(2)]
    dump(root / "val.json", val)


def cell(color: str) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 30), color).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def make_mmbench(root: Path, *names: str) -> None:
    columns = "index question hint A B C D answer category image source l2-category comment split"
    lines = ["\t".join(columns.split())]
    for index, (first, second, right) in ((7, ("kite", "cup", "A")), (1000007, ("cup", "kite", "B"))):
        lines.append(f"{index}\tWhich?\t\t{first}\t{second}\t\t\t{right}\tcat\t{cell('red')}\ts\tl\t\tdev")
    lines.append(f"8\tWhy?\tA hint.\tNone\tnan\tx\t\tC\tdog\t{cell('blue')}\ts\tl\t\tdev")
    for name in names:
        (root / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_mmbench_en(root: Path) -> None:
    make_mmbench(root, "mmbench_dev_20230712.tsv")
    image_column = 9
    lines = (root / "mmbench_dev_20230712.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines]
    hidden = [[value for at, value in enumerate(row) if rows[0][at] != "answer"] for row in rows]
    assert rows[0][image_column] == "image"
    (root / "mmbench_test_en_20231003.tsv").write_text("".join("\t".join(row) + "\n" for row in hidden))


def make_mmbench_cn(root: Path) -> None:
    make_mmbench(root, "mmbench_dev_cn_20231003.tsv")


def make_seed(root: Path) -> None:
    save_image(root / "SEED-Bench-image" / "1.png")
    save_image(root / "SEED-Bench-video-image" / "v0.png", "blue")
    options = "\nA. a\nB. b\nC. c\nD. d\n" + LETTER_SUFFIX
    rows = [{"question_id": 101, "image": "SEED-Bench-image/1.png", "text": "What?" + options, "category": "default"}]
    rows += [{**rows[0], "question_id": "v0", "image": "SEED-Bench-video-image/v0.png"}]
    write_jsonl(root / "llava-seed-bench.jsonl", rows)
    choices = {f"choice_{letter}": letter for letter in "abcd"}
    asked = [
        {"question_id": "101", "question_type_id": 1, "data_type": "image", "answer": "A", "question": "What?"}
        | choices,
        {"question_id": "v0", "question_type_id": 10, "data_type": "video", "answer": "B", "question": "What?"}
        | choices,
    ]
    dump(root / "SEED-Bench.json", {"question_type": {"Scene": 1, "Action": 10}, "questions": asked})


def make_mm_vet(root: Path) -> None:
    save_image(root / "images" / "v1_0.png")
    rows = [{"image": "v1_0.png", "text": f"What {n}?", "category": "conv", "question_id": n} for n in range(2)]
    write_jsonl(root / "llava-mm-vet.jsonl", rows)
    references = {
        f"v1_{n}": {
            "imagename": "v1_0.png",
            "question": f"What {n}?",
            "answer": "red",
            "capability": ["rec", "ocr"][: n + 1],
        }
        for n in range(2)
    }
    dump(root / "mm-vet.json", references)


def make_llava_bench(root: Path) -> None:
    save_image(root / "images" / "001.jpg")
    kinds = ("conv", "detail", "complex")
    rows = [{"question_id": n, "image": "001.jpg", "text": "Why?", "category": kind} for n, kind in enumerate(kinds)]
    write_jsonl(root / "questions.jsonl", rows)
    write_jsonl(
        root / "answers_gpt4.jsonl", [{"question_id": n, "text": "Because.", "answer_id": f"g{n}"} for n in range(3)]
    )
    write_jsonl(root / "context.jsonl", [{"id": 1, "image": "001.jpg", "caption": "A red card."}])


def make_coco(root: Path) -> None:
    save_image(root / "val2014" / "0.jpg")
    rows = [{"question_id": n, "image": "0.jpg", "text": "Why?", "category": "conv"} for n in range(2)]
    write_jsonl(root / "qa90_questions.jsonl", rows)
    write_jsonl(
        root / "qa90_gpt4_answer.jsonl", [{"question_id": n, "text": "So.", "category": "conv"} for n in range(2)]
    )
    boxes = {
        "id": "0",
        "image": "0.jpg",
        "captions": ["One.", "Two."],
        "instances": [{"category": "cat", "bbox": [0, 0, 1, 1]}],
    }
    write_jsonl(root / "caps_boxes_coco2014_val_80.jsonl", [boxes])


def make_easy_vqa(root: Path) -> None:
    for split, count in (("train", 2), ("test", 3)):
        rows = []
        for image in range(count):
            save_image(root / split / "images" / f"{image}.png", COLORS[image % 3])
            rows += [["what color is the shape?", COLORS[image % 3], image], ["is it red?", "yes", image]]
        dump(root / split / "questions.json", rows)


# task: folder below the data of all benchmarks, questions, how to make it
BENCHMARKS: dict[str, tuple[str, int, Callable[[Path], None]]] = {
    "vqav2": ("vqav2", 5, make_vqav2),
    "gqa": ("gqa", 7, make_gqa),
    "vizwiz": ("vizwiz", 2, make_vizwiz),
    "science_qa": ("scienceqa", 2, make_science_qa),
    "textvqa": ("textvqa", 3, make_textvqa),
    "pope": ("pope", 6, make_pope),
    "mme": ("MME", 28, make_mme),
    "mmbench": ("mmbench", 3, make_mmbench_en),
    "mmbench_cn": ("mmbench_cn", 3, make_mmbench_cn),
    "seed": ("seed_bench", 2, make_seed),
    "llava_bench": ("llava-bench-in-the-wild", 3, make_llava_bench),
    "llava_bench_coco": ("../coco2014_val_qa_eval", 2, make_coco),
    "mm_vet": ("mm-vet", 2, make_mm_vet),
    "easy_vqa": ("easy_vqa", 6, make_easy_vqa),
}


def make_everything(root: Path) -> Path:
    """Write the data of all benchmarks below `root`, and COCO's beside it; return `root`."""
    for folder, _, make in BENCHMARKS.values():
        place = root / folder
        place.mkdir(parents=True)
        make(place)
    return root
