"""Runs of a benchmark: answers, failures, resumption, manifests, and image prefetching."""

from __future__ import annotations

import dataclasses
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llava.conversation import get_template, stop_strings
from llava.engine import Engine, Request, SamplingParams, load_engine
from llava.engine.chat import render_question
from llava.engine.sequence import HashedImage, hash_image
from llava.errors import ConfigError, ImageError
from llava.eval.run.answers import short_hash
from llava.eval.run.images import prefetch
from llava.eval.run.local_model import LocalModel
from llava.eval.run.manifest import manifest_path
from llava.eval.run.questions import Question, read_questions
from llava.eval.run.runner import RunSettings, group_by_images, report, run
from llava.images import open_image, preprocess_image
from llava.provenance import checkpoint_fingerprint
from tests.eval.conftest import question_rows, read_jsonl, write_jsonl


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    return read_questions(write_jsonl(tmp_path / "questions.jsonl", question_rows(21)))


@pytest.fixture
def settings(tiny_dirs: dict[str, Path], images: Path) -> RunSettings:
    return RunSettings(str(tiny_dirs["chat"]), "tiny", "v1", SamplingParams(6), images, num_workers=2)


def test_answers_equal_those_of_single_requests(
    engine: Engine, questions: list[Question], settings: RunSettings, tmp_path: Path
) -> None:
    outcome = run(engine, questions, tmp_path / "a.jsonl", settings)
    rows = read_jsonl(tmp_path / "a.jsonl")
    assert outcome.asked == 21 and not outcome.failures
    assert [(row["question_id"], row["prompt"]) for row in rows] == [(q.question_id, q.prompt) for q in questions]
    template = get_template("v1")
    for question, row in list(zip(questions, rows))[:6]:
        prompt = render_question(template, question.prompt, len(question.images), engine.model.config)
        assert prompt.count("<image>\n") == len(question.images)
        images = [open_image(settings.image_folder / name) for name in question.images]
        request = Request(prompt, images, SamplingParams(6, stop=stop_strings(template)))
        assert row["text"] == engine.generate([request])[0].text


def test_a_resumed_run_asks_no_question_twice(
    engine: Engine, questions: list[Question], settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    run(engine, questions, path, settings)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    outcome = run(engine, questions, path, settings)
    assert 0 < outcome.asked < 21 and outcome.asked + outcome.reused == 21
    assert path.read_bytes() == whole
    monkeypatch.setattr(engine, "submit", lambda request: pytest.fail("asked again"))
    assert run(engine, questions, path, settings).asked == 0


def test_failures_are_recorded_and_retried(
    engine: Engine, settings: RunSettings, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = tmp_path / "images" / "torn.png"
    torn.parent.mkdir()
    torn.write_bytes((images / "red.png").read_bytes()[:40])
    questions = [
        Question(0, "fine", (str(images / "red.png"),)),
        Question(1, "torn", (str(torn),)),
        Question(2, "gone", ("nowhere.png",)),
        Question(3, "two tags <image> <image>", (str(images / "red.png"),)),
        Question(4, "too long " * 3000),
        Question(5, "fine too"),
    ]
    path = tmp_path / "a.jsonl"
    outcome = run(engine, questions, path, settings)
    rows = read_jsonl(path)
    assert {question_id for question_id, _ in outcome.failures} == {1, 2, 3, 4}
    reasons = [row["metadata"].get("error", "") for row in rows]
    for at, text in ((0, ""), (1, "torn.png"), (2, "nowhere.png"), (3, "2 <image>"), (4, "tokens long"), (5, "")):
        assert text in reasons[at] and bool(text) == bool(reasons[at])
    assert json.loads(manifest_path(path).read_text())["status"] == "failed"
    lines: list[str] = []
    assert report(outcome, path, lines.append) == 1 and "4 question(s) failed" in lines[-1]
    torn.write_bytes((images / "red.png").read_bytes())
    assert {question_id for question_id, _ in run(engine, questions, path, settings).failures} == {2, 3, 4}
    assert read_jsonl(path)[1]["text"]


def test_sampled_answers_depend_on_neither_batch_nor_shard(
    tiny_dirs: dict[str, Path], questions: list[Question], settings: RunSettings, tmp_path: Path
) -> None:
    hot = dataclasses.replace(settings, params=SamplingParams(6, temperature=1.5, seed=5))
    one, many = (load_engine(tiny_dirs["chat"], device="cpu", max_batch_size=size) for size in (1, 8))
    run(many, questions, tmp_path / "whole.jsonl", hot)
    parts = b""
    for k in range(3):
        run(one, questions, tmp_path / f"{k}.jsonl", dataclasses.replace(hot, chunk=(k, 3)))
        parts += (tmp_path / f"{k}.jsonl").read_bytes()
    assert parts == (tmp_path / "whole.jsonl").read_bytes()
    assert settings.seed_for(questions[0]) is None
    assert hot.seed_for(questions[0]) != hot.seed_for(questions[1])


def test_another_models_answers_are_not_continued(
    engine: Engine, questions: list[Question], settings: RunSettings, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    run(engine, questions, path, settings)
    before = path.read_bytes()
    for changed, name in (
        (dataclasses.replace(settings, params=SamplingParams(7)), "decoding"),
        (dataclasses.replace(settings, template="llava_v1"), "template"),
        (dataclasses.replace(settings, model_path=str(tmp_path)), "checkpoint"),
        (dataclasses.replace(settings, chunk=(0, 2)), "chunk"),
        (dataclasses.replace(settings, quantization="4 bit"), "quantization"),
    ):
        with pytest.raises(ConfigError, match=f"was made with {name}"):
            run(engine, questions, path, changed)
    with pytest.raises(ConfigError, match="was made with questions"):
        run(engine, questions[:-1], path, settings)
    assert path.read_bytes() == before
    run(engine, questions, path, dataclasses.replace(settings, params=SamplingParams(1), overwrite=True))
    assert path.read_bytes() != before


def test_answers_without_a_manifest_require_a_flag(
    engine: Engine, questions: list[Question], settings: RunSettings, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    run(engine, questions, path, settings)
    manifest_path(path).unlink()
    with pytest.raises(ConfigError, match="--overwrite to start over or --resume"):
        run(engine, questions, path, settings)
    assert run(engine, questions, path, dataclasses.replace(settings, resume=True)).asked == 0


def test_the_manifest_records_the_settings(
    engine: Engine, questions: list[Question], settings: RunSettings, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    run(engine, questions, path, settings)
    manifest = json.loads(manifest_path(path).read_text())
    assert manifest["status"] == "complete" and manifest["questions"] == 21 and manifest["batch_size"] == 4
    identity = manifest["identity"]
    assert identity["template"]["text"].endswith("USER: <image>\n{question} ASSISTANT:")
    assert identity["decoding"]["max_new_tokens"] == 6 and identity["dtype"] == "float32"
    assert manifest["environment"]["packages"]["transformers"] == "4.36.2"


def test_answers_record_their_inputs_and_how_they_ended(
    engine: Engine, questions: list[Question], settings: RunSettings, tmp_path: Path
) -> None:
    """Equal with and without workers; hashes follow the prompt and the pixels, and only those."""

    def facts(name: str, **changes: Any) -> list[dict[str, Any]]:
        run(engine, questions, tmp_path / name, dataclasses.replace(settings, **changes))
        return [row["metadata"] for row in read_jsonl(tmp_path / name)]

    first, again, other = facts("a"), facts("b", num_workers=0), facts("c", template="llava_v1")
    assert first == again
    prompt = render_question(get_template("v1"), questions[0].prompt, 1, engine.model.config)
    assert [row.get("first_prompt") for row in first] == [prompt, *[None] * 20]
    assert first[0]["prompt_hash"] == short_hash(prompt.encode()) and len({row["prompt_hash"] for row in first}) == 21
    pixels = preprocess_image(
        open_image(settings.image_folder / questions[0].images[0]), engine.image_processor, engine.image_aspect_ratio
    )
    assert first[0]["image_hashes"] == [hash_image(pixels).digest.hex()[:16]] and first[4]["image_hashes"] == []
    assert first[0]["image_sizes"] == [[30, 20]] and first[0]["image_tokens"] < first[0]["prompt_tokens"]
    assert first[4]["image_tokens"] == 0 and {row["finish_reason"] for row in first} <= {"stop", "length"}
    for before, after in zip(first, other):
        assert before["image_hashes"] == after["image_hashes"] and before["prompt_hash"] != after["prompt_hash"]


def test_the_manifest_and_the_last_line_have_the_statistics_of_the_run(
    engine: Engine, questions: list[Question], settings: RunSettings, tmp_path: Path
) -> None:
    """Those of this run only: the engine has answered before."""
    path, lines = tmp_path / "a.jsonl", list[str]()
    before = engine.statistics()
    outcome = run(engine, questions, path, settings)
    report(outcome, path, lines.append)
    found = json.loads(manifest_path(path).read_text())["engine"]
    assert outcome.statistics is not None and found == dataclasses.asdict(outcome.statistics)
    assert before.requests > 0 and found["requests"] == 21 == engine.statistics().requests - before.requests
    assert found["prompt_tokens"] == found["computed_tokens"] + found["cached_tokens"] > 21 * 16
    assert found["images"] == sum(len(question.images) for question in questions)
    assert 0 < sum(found["seconds"].values()) <= outcome.seconds + 1
    assert lines[-1] == outcome.statistics.summary() and " of 4; time: tower " in lines[-1]


def test_fingerprint_follows_weights_and_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    first = checkpoint_fingerprint(tmp_path)
    (tmp_path / "notes.txt").write_text("not part of it")
    assert checkpoint_fingerprint(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    second = checkpoint_fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert len({first, second, checkpoint_fingerprint(tmp_path)}) == 3
    assert checkpoint_fingerprint("org/name") == "org/name"


def test_questions_are_grouped_by_image() -> None:
    questions = [Question(n, str(n), (f"{n % 3}.png",)) for n in range(9)]
    assert list(group_by_images(questions, range(9))) == [0, 3, 6, 1, 4, 7, 2, 5, 8]
    assert list(group_by_images(questions, range(9), window=5)) == [0, 3, 1, 4, 2, 5, 8, 6, 7]


def test_consecutive_questions_share_images_that_are_opened_lazily(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    real = open_image
    monkeypatch.setattr("llava.images.open_image", lambda path: (opened.append(path.name), real(path))[1])
    questions = [Question(n, str(n), (f"{('red', 'green', 'blue', 'gray')[n // 5 % 4]}.png",)) for n in range(40)]
    stream = prefetch(questions, range(40), settings.source, 0)
    next(stream)
    assert len(opened) == 1
    assert [position for position, _ in stream] == list(range(1, 40)) and len(opened) == 8


def test_memory_holds_two_batches_of_requests(
    engine: Engine, questions: list[Question], settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, most = 0, 0
    submit = engine.submit

    def counting(request: Request) -> Any:
        nonlocal live, most
        live += 1
        most = max(most, live)
        return submit(request)

    monkeypatch.setattr(engine, "submit", counting)
    for _ in LocalModel(engine).answer(questions, range(len(questions)), settings):
        live -= 1
    assert live == 0 and most <= 2 * engine.max_batch_size


def test_images_are_preprocessed_by_the_workers(
    engine: Engine, settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal pixels, answers and cache hits; the engine's thread does not preprocess."""
    for number in range(20):
        Image.new("RGB", (30, 20), (number, 90, 10 * number)).save(tmp_path / f"{number}.png")
    questions = [Question(n, f"What is it? {n}", (f"{n // 2}.png",)) for n in range(40)]
    settings = dataclasses.replace(settings, image_folder=tmp_path)
    found = []
    for workers in (0, 2):
        fresh = Engine(engine.model, engine.tokenizer, engine.image_processor, max_batch_size=4)
        with monkeypatch.context() as patch:
            if workers:
                patch.setattr(
                    "llava.engine.features.preprocess_image", lambda *_: pytest.fail("on the engine's thread")
                )
            path = tmp_path / f"{workers}.jsonl"
            outcome = run(fresh, questions, path, dataclasses.replace(settings, num_workers=workers))
        assert not outcome.failures
        done = fresh.statistics()
        identity = json.loads(manifest_path(path).read_text())["identity"]
        found.append((path.read_bytes(), identity, done.computed_tokens, done.cached_tokens, done.encoded_images))
    assert found[0] == found[1]


@pytest.mark.parametrize("aspect_ratio", ["pad", None])
def test_workers_give_the_pixels_and_digests_of_this_process(
    engine: Engine, settings: RunSettings, aspect_ratio: str | None
) -> None:
    names = ("red", "green", "blue", "gray")
    questions = [Question(n, str(n), (f"{names[n % 4]}.png", "red.png")) for n in range(16)]

    def preprocess(image: Image.Image) -> torch.Tensor:
        return preprocess_image(image, engine.image_processor, aspect_ratio)

    for position, images in prefetch(questions, range(16), settings.source, 2, preprocess):
        assert not isinstance(images, ImageError)
        for name, found in zip(questions[position].images, images, strict=True):
            want = hash_image(preprocess(settings.source.open(name)))
            assert isinstance(found, HashedImage) and isinstance(found.content, torch.Tensor)
            assert found.digest == want.digest
            assert torch.equal(found.content, want.content)
    assert all(
        isinstance(image, Image.Image)
        for _, images in prefetch(questions, range(16), settings.source, 0, preprocess)
        for image in images
    )


def test_an_image_that_cannot_be_preprocessed_fails_only_its_question(settings: RunSettings) -> None:
    questions = [Question(n, str(n), ("red.png" if n % 2 else "blue.png",)) for n in range(16)]
    refused = open_image(settings.image_folder / "red.png").getpixel((0, 0))

    def preprocess(image: Image.Image) -> torch.Tensor:
        if image.getpixel((0, 0)) == refused:
            raise ImageError("A canvas is too large.")
        return torch.zeros(3, 2, 2)

    for position, images in prefetch(questions, range(16), settings.source, 2, preprocess):
        assert isinstance(images, ImageError) == bool(position % 2)


@dataclasses.dataclass(frozen=True)
class Tracked:
    """Image source that keeps weak references to its images, and to their pixels once a test adds these."""

    opened: dict[str, weakref.ref[Image.Image]] = dataclasses.field(default_factory=dict)
    pixels: dict[str, weakref.ref[torch.Tensor]] = dataclasses.field(default_factory=dict)

    def open(self, name: str) -> Image.Image:
        image = Image.new("RGB", (30, 30), (int(name), 0, 0))
        self.opened[name] = weakref.ref(image)
        return image

    def read(self, name: str) -> bytes:
        raise NotImplementedError

    def alive(self) -> set[str]:
        references = [*self.opened.items(), *self.pixels.items()]
        return {name for name, reference in references if reference() is not None}


@pytest.mark.parametrize("follow_up", [None, " So:"])
def test_finished_questions_free_their_images(
    engine: Engine, settings: RunSettings, monkeypatch: pytest.MonkeyPatch, follow_up: str | None
) -> None:
    source, handles = Tracked(), weakref.WeakKeyDictionary[Any, str]()
    settings = dataclasses.replace(settings, images=source, num_workers=0, follow_up=follow_up)
    questions = [Question(n, "x" * (n % 7 + 1), (str(n),)) for n in range(30)]
    submit, submitted, latest = engine.submit, [], "none"

    def tracking(request: Request) -> Any:
        handle = submit(request)
        assert isinstance(request.images[0], HashedImage)
        handles[handle] = max(source.opened, key=int)  # images are opened one by one
        assert isinstance(request.images[0].content, torch.Tensor)
        source.pixels[handles[handle]] = weakref.ref(request.images[0].content)
        submitted.append(handles[handle])
        return handle

    monkeypatch.setattr(engine, "submit", tracking)
    gc.collect()
    gc.disable()  # freed by their last reference, not at some later collection
    try:
        answered = set()
        for position, _, error, *_ in LocalModel(engine).answer(questions, range(30), settings):
            assert error is None
            answered.add(str(position))
            latest = max(source.opened, key=int)
            unfinished = {name for handle, name in handles.items() if not handle.done}
            kept = source.alive() - unfinished
            assert kept <= ({latest} if follow_up is None else {latest} | (source.alive() - answered) | {str(position)})
    finally:
        gc.enable()
    assert len(answered) == 30
    assert source.alive() == set()


@pytest.mark.parametrize("follow_up", [None, " So:"])
def test_prefixes_are_cached_for_follow_ups_only(
    engine: Engine,
    questions: list[Question],
    settings: RunSettings,
    monkeypatch: pytest.MonkeyPatch,
    follow_up: str | None,
) -> None:
    kept: list[bool] = []
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda request: (kept.append(request.cache_prefix), submit(request))[1])
    list(LocalModel(engine).answer(questions, range(21), dataclasses.replace(settings, follow_up=follow_up)))
    assert kept.count(True) == (0 if follow_up is None else 21)
    assert kept.count(False) == 21
