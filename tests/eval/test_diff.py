"""`llava report --diff`: planted changes of prompts, pixels, scorers and others are attributed, and nothing else is."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.engine import Engine, SamplingParams
from llava.engine.sequence import Completion, HashedImage, Request, RequestHandle
from llava.eval import main as evaluate
from llava.eval import report
from llava.eval.benchmarks import gqa
from llava.eval.benchmarks.outcomes import Outcome, write_outcomes
from llava.eval.benchmarks.registry import make_task
from llava.eval.reporting.data import read_run
from llava.eval.reporting.diff import (
    ASKED,
    DECODING,
    MISSING,
    NOTHING,
    PIXELS,
    PROMPTS,
    SCORER,
    SERVER,
    UNKNOWN,
    UNREAD,
    WEIGHTS,
    Explanation,
    Part,
    byte_diff,
)  # fmt: skip
from llava.eval.reporting.diff_page import how_known
from llava.eval.run.questions import SHORT_SUFFIX
from llava.eval.run.runner import RunSettings, run
from tests.eval.benchdata import BENCHMARKS, dump, make_everything
from tests.eval.conftest import read_jsonl, write_jsonl
from tests.eval.fake_server import FakeServer

PAIRS = 20
Script = Callable[..., None]
QUESTIONS, IMAGES = 48, 8
GQA_QUESTIONS = "llava_gqa_testdev_balanced.jsonl"
GQA_LABELS = "data/testdev_balanced_questions.json"


def make_gqa(root: Path, seed: int) -> Path:
    """Yes/no questions about images of random colors and sizes."""
    draw = random.Random(seed)
    (root / "data" / "images").mkdir(parents=True)
    for number in range(IMAGES):
        size, color = (draw.randint(20, 40), draw.randint(41, 60)), tuple(draw.randrange(256) for _ in range(3))
        Image.new("RGB", size, color).save(root / "data" / "images" / f"{number}.png")
    ids = [str(number) for number in range(QUESTIONS)]
    rows = [
        {"question_id": each, "image": f"{int(each) % IMAGES}.png", "text": f"Is it {each}?\n{SHORT_SUFFIX}"}
        for each in ids
    ]
    write_jsonl(root / GQA_QUESTIONS, rows)
    labels = {each: {"answer": draw.choice(("yes", "no")), "types": {"structural": "verify"}} for each in ids}
    dump(root / GQA_LABELS, labels)
    return root


@pytest.fixture
def scripted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    """Replace the model by a fixed function of prompt, pixels, decoding and weights; returns a function to set it.

    Prompts are rendered, images preprocessed and both are recorded as in any run.
    """
    script: dict[str, Any] = {"weights": "a", "text": lambda word: word}

    def submit(request: Request) -> RequestHandle:
        assert all(isinstance(image, HashedImage) for image in request.images)
        pixels = [image.digest.hex() for image in request.images if isinstance(image, HashedImage)]
        params = dataclasses.replace(request.params, stop=()).as_dict()
        inputs = repr((str(request.prompt), pixels, params, script["weights"]))
        word = ("yes", "no", "no", "Yes.")[zlib.crc32(inputs.encode()) % 4]
        handle = RequestHandle(lambda: False, 10)
        handle.completion = Completion(script["text"](word), (), script.get("reason", "stop"), 10)
        return handle

    monkeypatch.setattr(engine, "submit", submit)
    ratio = engine.image_aspect_ratio
    yield script.update
    engine.image_aspect_ratio = ratio


@dataclasses.dataclass
class Runs:
    """Makes output folders of `llava eval` below `root`."""

    engine: Engine
    root: Path
    model: str

    def make(self, name: str, data: Path, *, template: str = "v1", weights: str = "", **params: Any) -> Path:
        task = make_task("gqa", data)
        model = weights or self.model
        decoding = SamplingParams(**{"max_new_tokens": 16, **params})
        settings = RunSettings(model, "tiny", template, decoding, task.image_folder, files=task.label_files())
        run(self.engine, task.questions(), self.root / name / "gqa" / "answers.jsonl", settings)
        return self.score(name, data)

    def copy(self, name: str, source: Path) -> Path:
        """A copy of a run without its scores."""
        shutil.copytree(source / "gqa", self.root / name / "gqa", ignore=lambda *_: ["score.json", "outcomes.jsonl"])
        return self.root / name

    def score(self, name: str, data: Path, *more: str) -> Path:
        flags = ["--tasks", "gqa", "--data-root", str(data), "--output-dir", str(self.root / name), "--score-only"]
        assert evaluate.main([*flags, "--model-path", self.model, *more]) == 0
        return self.root / name


@pytest.fixture
def runs(engine: Engine, tiny_dirs: dict[str, Path], tmp_path: Path) -> Runs:
    return Runs(engine, tmp_path, str(tiny_dirs["chat"]))


def explain(first: Path, second: Path) -> Explanation:
    (found,) = report.explain_runs(read_run(first), read_run(second))
    gap = float(found.second.metric or 0) - float(found.first.metric or 0)
    assert sum(part.points for part in found.parts) == pytest.approx(gap)
    return found


def points(found: Explanation) -> dict[str, float]:
    """The parts that are not the unchanged rest."""
    return {part.name: part.points for part in found.parts if part.name != NOTHING or part.points}


def scores(folder: Path) -> dict[str, float]:
    return {row["id"]: row["score"] for row in read_jsonl(folder / "gqa" / "outcomes.jsonl")}


def mean_change(first: Path, second: Path, keys: set[str]) -> float:
    before, after = scores(first), scores(second)
    return 100 * sum(after[key] - before[key] for key in keys) / len(before)


def other_ratio(engine: Engine) -> str | None:
    return None if engine.image_aspect_ratio == "pad" else "pad"


@pytest.mark.parametrize("seed", range(PAIRS))
def test_planted_changes_are_attributed(
    seed: int, scripted: Script, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One change at a time: everything is its part; then all of them, on questions of their own."""
    scripted(weights=str(seed))
    data = make_gqa(tmp_path / "data", seed)
    first = runs.make("first", data)
    assert points(explain(first, runs.make("again", data))) == {}

    found = explain(first, runs.make("template", data, template="llava_v1"))
    assert list(points(found)) == [PROMPTS] and found.parts[0].questions == QUESTIONS and found.changed
    assert found.parts[0].bounds is None

    runs.engine.image_aspect_ratio = other_ratio(runs.engine)
    found = explain(first, runs.make("ratio", data))
    assert list(points(found)) == [PIXELS] and found.parts[0].questions == QUESTIONS and found.changed
    runs.engine.image_aspect_ratio = other_ratio(runs.engine)

    old = runs.copy("old", first)
    with monkeypatch.context() as patch:  # an older rule, which kept final periods
        patch.setattr(gqa, "prediction", lambda text: text.lower())
        runs.score("old", data)
    found = explain(old, first)
    assert list(points(found)) == [SCORER] and found.parts[0].questions > 0 and found.parts[0].points > 0

    other = make_gqa(tmp_path / "other", seed)  # with other prompts of some questions, and another image of others
    rows = read_jsonl(other / GQA_QUESTIONS)
    asked = {row["question_id"] for row in rows[:30] if row["image"] != "4.png"}
    changed = [{**row, "text": f"{row['text']} Please."} if row["question_id"] in asked else row for row in rows]
    write_jsonl(other / GQA_QUESTIONS, changed)
    Image.new("RGB", (50, 20), "white").save(other / "data" / "images" / "4.png")
    drawn = {row["question_id"] for row in rows if row["image"] == "4.png"}
    second = runs.make("second", other)
    found = explain(old, second)
    counts = {part.name: part.questions for part in found.parts if part.name != SCORER}
    assert counts == {PROMPTS: len(asked), PIXELS: len(drawn), NOTHING: QUESTIONS - len(asked | drawn)}
    assert points(found)[PROMPTS] == pytest.approx(mean_change(first, second, asked))
    assert points(found)[PIXELS] == pytest.approx(mean_change(first, second, drawn))
    assert points(found)[SCORER] == pytest.approx(mean_change(old, first, set(scores(first))))
    assert {key for key, _ in found.changed} <= asked | drawn


def test_joint_causes_have_bounds_until_hybrids_are_asked(
    scripted: Script, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the weights of either run; the parts are those of hybrids that were answered beside."""
    data = make_gqa(tmp_path / "data", 2)
    first = runs.make("first", data)
    hybrids = {"a": runs.make("prompts", data, template="llava_v1")}
    scripted(weights="b")
    hybrids["b"] = runs.make("weights", data, weights="other/weights")
    second = runs.make("second", data, template="llava_v1", weights="other/weights")
    (part,) = explain(first, second).parts
    assert part.causes == (PROMPTS, WEIGHTS) and part.bounds is not None
    everything = set(scores(first))
    for hybrid in hybrids.values():
        assert part.bounds[0] <= mean_change(first, hybrid, everything) <= part.bounds[1]
    command = ["--diff", str(first), str(second), "--ask", "--output-dir", str(tmp_path / "out"), "--model-path"]
    monkeypatch.setattr("llava.eval.options.EvalArgs.load_model", lambda _: (runs.engine, "v1"))
    for weights, path in (("a", runs.model), ("b", "other/weights")):
        scripted(weights=weights)
        assert report.main([*command, path]) == 0
        shown = {line.split("|")[1].strip(): line.split("|")[3].strip() for line in capsys.readouterr().out.splitlines()
                 if ASKED in line}  # fmt: skip
        assert len(shown) == 2 and "+0.00" not in shown.values()
        order = [first, hybrids[weights], second]
        names = [PROMPTS, WEIGHTS] if weights == "a" else [WEIGHTS, PROMPTS]
        assert shown == {
            name: f"{mean_change(before, after, everything):+.2f}"
            for name, before, after in zip(names, order, order[1:])
        }
    assert report.main([*command, "third/weights"]) == 2
    assert "the model of one of the runs" in capsys.readouterr().err


def test_joint_causes_on_a_server_are_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of runs with other prompts and another temperature, by a server that stays the same."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def answer(body: dict[str, Any]) -> tuple[int, str]:
        inputs = repr((body["messages"], body["temperature"]))
        return 200, ("yes", "no", "no", "Yes.")[zlib.crc32(inputs.encode()) % 4]

    server = FakeServer(answer)
    data, other = make_gqa(tmp_path / "data", 6), make_gqa(tmp_path / "other", 6)
    rows = read_jsonl(other / GQA_QUESTIONS)
    write_jsonl(other / GQA_QUESTIONS, [{**row, "text": f"Please: {row['text']}"} for row in rows])

    def make(name: str, root: Path, temperature: float) -> Path:
        flags = ["--tasks", "gqa", "--data-root", str(root), "--output-dir", str(tmp_path / name)]
        assert evaluate.main([*flags, "--api-base", server.url, "--temperature", str(temperature)]) == 0
        return tmp_path / name

    first, second = make("first", data, 0.0), make("second", other, 0.5)
    hybrid = make("hybrid", other, 0.0)
    (part,) = explain(first, second).parts
    assert part.causes == (PROMPTS, DECODING, f"{SERVER}{UNKNOWN}")
    capsys.readouterr()
    command = ["--diff", str(first), str(second), "--ask", "--output-dir", str(tmp_path / "out")]
    assert report.main([*command, "--api-base", server.url]) == 0
    shown = {line.split("|")[1].strip(): line.split("|")[3].strip() for line in capsys.readouterr().out.splitlines()
             if ASKED in line}  # fmt: skip
    everything = set(scores(first))
    changes = [mean_change(first, hybrid, everything), mean_change(hybrid, second, everything), 0.0]
    assert shown == dict(zip((PROMPTS, DECODING, f"{SERVER}{UNKNOWN}"), (f"{change:+.2f}" for change in changes)))
    server.models = ["another"]
    assert report.main([*command, "--api-base", server.url]) == 2
    assert "another differs" in capsys.readouterr().err
    server.close()


def test_decoding_and_unread_answers(scripted: Script, runs: Runs, tmp_path: Path) -> None:
    data = make_gqa(tmp_path / "data", 1)
    first = runs.make("first", data)
    assert list(points(explain(first, runs.make("hot", data, temperature=0.5, seed=1)))) == [DECODING]
    scripted(text=lambda word: "" if word == "no" else word, weights="b")
    found = explain(first, runs.make("second", data, weights="other/weights"))
    assert set(points(found)) == {UNREAD, WEIGHTS}
    parts = {part.name: part for part in found.parts}
    unread = sum(not row["text"] for row in read_jsonl(tmp_path / "second" / "gqa" / "answers.jsonl"))
    assert parts[UNREAD].unread == (0, unread) and parts[UNREAD].questions == unread and parts[UNREAD].points < 0


@pytest.mark.parametrize(("reason", "cause"), [("stop", NOTHING), ("length", DECODING)])
def test_a_token_limit_matters_only_to_answers_that_reached_it(
    reason: str, cause: str, scripted: Script, runs: Runs, tmp_path: Path
) -> None:
    scripted(reason=reason)
    data = make_gqa(tmp_path / "data", 1)
    found = explain(runs.make("first", data), runs.make("second", data, max_new_tokens=32))
    assert [part.name for part in found.parts] == [cause]


def test_missing_answers(scripted: Script, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Questions of one run are a part; a run without a score is compared where both have answers."""
    data = make_gqa(tmp_path / "data", 2)
    first = runs.make("first", data)
    rows = read_jsonl(first / "gqa" / "answers.jsonl")
    part = runs.copy("part", first)
    write_jsonl(part / "gqa" / "answers.jsonl", [rows[at * QUESTIONS // 30] for at in range(30)])
    runs.score("part", data, "--limit", "30")
    found = explain(first, part)
    assert {each.name: each.questions for each in found.parts} == {MISSING: QUESTIONS - 30, NOTHING: 30}
    failed = runs.copy("failed", first)
    dump(failed / "other" / "score.json", {})
    (failed / "easy_vqa").mkdir()
    dump(failed / "easy_vqa" / "score.json", {"model_id": "tiny", "task": "easy_vqa"})
    write_jsonl(failed / "gqa" / "answers.jsonl", [{**rows[0], "text": "", "metadata": {"error": "lost"}}, *rows[1:]])
    assert report.main(["--diff", str(first), str(failed), "--output-dir", str(tmp_path / "out")]) == 0
    assert "– (–)" in capsys.readouterr().out
    (found,) = report.explain_runs(read_run(first), read_run(failed))
    assert {each.name: each.questions for each in found.parts} == {MISSING: 1, NOTHING: QUESTIONS - 1}


def test_what_older_runs_did_not_record_is_not_claimed(scripted: Script, runs: Runs, tmp_path: Path) -> None:
    data = make_gqa(tmp_path / "data", 3)
    folders = [runs.make("first", data), runs.make("second", data, template="llava_v1")]
    for folder in folders:
        path = folder / "gqa" / "answers.jsonl"
        write_jsonl(path, [{**row, "metadata": {}} for row in read_jsonl(path)])
        (folder / "gqa" / "outcomes.jsonl").unlink()
    same, other = explain(folders[0], folders[0]), explain(*folders)
    assert [part.name for part in same.parts] == [NOTHING]  # the manifests prove equal prompts and pixels
    assert [part.name for part in other.parts] == [f"{PROMPTS} (not recorded)"] and other.parts[0].bounds is not None
    assert "the scorer" not in other.parts[0].note
    (folders[1] / "gqa" / "answers.jsonl.manifest.json").unlink()
    (part,) = explain(*folders).parts
    assert all(name.endswith("(not recorded)") for name in part.causes) and len(part.causes) == 4


def test_without_labels_the_recorded_outcomes_are_compared(scripted: Script, runs: Runs, tmp_path: Path) -> None:
    data = make_gqa(tmp_path / "data", 4)
    first, second = runs.make("first", data), runs.make("second", data, template="llava_v1")
    before = points(explain(first, second))
    (data / GQA_LABELS).unlink()
    found = explain(first, second)
    assert points(found) == before and not found.first.rescored
    score = json.loads((second / "gqa" / "score.json").read_text())
    dump(second / "gqa" / "score.json", {**score, "scorer": {**score["scorer"], "code": "another"}})
    assert [part.name for part in explain(first, second).parts] == [f"{PROMPTS} + {SCORER} (not recorded)"]
    for folder in (first, second):
        (folder / "gqa" / "outcomes.jsonl").unlink()
    (found,) = report.explain_runs(read_run(first), read_run(second))
    assert not found.parts and "testdev_balanced_questions.json" in found.reason


def test_the_page_shows_parts_prompts_and_images(
    scripted: Script, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_gqa(tmp_path / "data", 5)
    first, second = runs.make("first", data), runs.make("second", data, template="llava_v1", temperature=0.0)
    assert report.main(["--diff", str(first), str(second), "--output-dir", str(tmp_path), "--samples", "3"]) == 0
    text = capsys.readouterr().out
    assert "| prompts " in text and "95 % interval" in text and "p = " in text and "byte " in text
    page = (tmp_path / "diff.html").read_text()
    assert (
        page.count("data:image/jpeg;base64,") == 6 and "<del>" in page and "http" not in page and "<script" not in page
    )
    assert page.index("<h3>Lost") < page.index("<h3>Gained") and "differs" in page


@pytest.mark.parametrize("name", ["pope", "mme", "mmbench", "science_qa", "textvqa", "seed", "easy_vqa"])
def test_the_parts_of_every_metric_sum_up(name: str, tmp_path: Path) -> None:
    """Also of F1, circular accuracy and acc+, which are no means over questions."""
    root = make_everything(tmp_path / "data") / BENCHMARKS[name][0]
    task, draw = make_task(name, root), random.Random(0)
    questions = task.questions()
    for run_name in ("first", "second"):
        rows = [
            {
                "question_id": each.question_id, **({} if each.round_id is None else {"round_id": 0}),
                "prompt": each.prompt, "text": draw.choice(("Yes", "No", "A", "B", "red", "stop")),
                "metadata": {"prompt_hash": run_name if at % 2 else "same", "image_hashes": []},
            }
            for at, each in enumerate(questions)
        ]  # fmt: skip
        folder = tmp_path / run_name / name
        folder.mkdir(parents=True)
        scored = task.score(write_jsonl(folder / "answers.jsonl", rows))
        identity = {"chunk": [0, 1], "checkpoint": "c", "decoding": {"temperature": 0}}
        dump(folder / "answers.jsonl.manifest.json", {"identity": identity})
        facts = {"model_id": "m", "data_root": str(root), "primary_metric": task.primary_metric(scored)}
        dump(folder / "score.json", {**facts, **scored})
    found = explain(tmp_path / "first", tmp_path / "second")
    counts = {part.name: part.questions for part in found.parts}
    assert counts.keys() <= {PROMPTS, UNREAD, NOTHING}
    assert counts[PROMPTS] == len(questions) // 2 and sum(counts.values()) == len(questions)


def test_byte_differences() -> None:
    assert byte_diff("ü a cat", "ü a dog") == [(5, b"cat", b"dog")]
    assert byte_diff("one two three four", "ONE two three FOUR") == [(0, b"one", b"ONE"), (14, b"four", b"FOUR")]
    assert byte_diff("same", "same") == []
    assert byte_diff("一猫", "一狗") == [(3, "猫".encode(), "狗".encode())]  # their first bytes are equal


def test_a_single_cause_is_not_asked_again() -> None:
    for causes, can_ask in (((f"{SERVER}{UNKNOWN}",), False), ((PROMPTS, f"{SERVER}{UNKNOWN}"), True)):
        assert ("--ask" in how_known(Part(causes, 3, 1.0, bounds=(-1.0, 2.0)))) == can_ask


def test_joint_causes_of_a_judged_ratio_have_bounds(tmp_path: Path) -> None:
    """The reference has 8 of 10; with prompts and weights, all grades rise from 4 to 6."""
    root = make_everything(tmp_path / "data") / BENCHMARKS["llava_bench"][0]
    task = make_task("llava_bench", root)
    for name, grade in (("first", 0.4), ("second", 0.6)):
        folder = tmp_path / name / "llava_bench"
        rows = [
            {"question_id": each.question_id, "prompt": each.prompt, "text": "So.",
             "metadata": {"prompt_hash": name, "image_hashes": []}}
            for each in task.questions()
        ]  # fmt: skip
        outcomes = [Outcome(str(row["question_id"]), grade, ["conv"], {"reference": 8}) for row in rows]
        folder.mkdir(parents=True)
        write_jsonl(folder / "answers.jsonl", rows)
        write_outcomes(folder / "outcomes.jsonl", outcomes, ["001.jpg"] * len(rows))
        identity = {"chunk": [0, 1], "checkpoint": name, "decoding": {"temperature": 0}}
        dump(folder / "answers.jsonl.manifest.json", {"identity": identity})
        score = {"task": "llava_bench", "split": "test", "judge": {"model": "j"}, "scorer": {"code": "c"}}
        facts = {"model_id": "m", "data_root": str(root), "primary_metric": 100 * grade * 10 / 8}
        dump(folder / "score.json", {**facts, **score})
    (part,) = explain(tmp_path / "first", tmp_path / "second").parts
    assert part.causes == (PROMPTS, WEIGHTS) and part.points == pytest.approx(25)
    assert part.bounds == pytest.approx((-50, 75))
    assert byte_diff("x\n", "x") == [(1, b"\n", b"")]
