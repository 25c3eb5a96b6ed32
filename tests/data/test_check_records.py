"""`llava check` on annotations: bad records by file and index, exact counts, clean copies."""

from __future__ import annotations

import io
import json
import random
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.check import main
from llava.data.annotations import read_records
from llava.data.records import parse_record, quick_check
from tests.data.test_dataset import record


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("red", "blue"):
        Image.new("RGB", (9, 5), name).save(tmp_path / f"{name}.png")
    return tmp_path


RECORDS: list[Any] = [
    record("text é"),
    record("<image>\nwhat?", image="red.png"),
    record("<image>", image="nowhere.png"),
    record("<image> <image>", image="blue.png"),
    {"conversations": [{"from": "user", "value": "x"}, {"from": "gpt", "value": 3}]},
    record("<image> <image>", image=["red.png", "nowhere.png"]),
]
BAD = [2, 4, 5]


def test_report_and_clean_copy(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "data.json").write_text(json.dumps(RECORDS, ensure_ascii=False))
    for name in ("clean.json", "clean.jsonl"):
        assert main([str(root / "data.json"), "--images", str(root), "--write-clean", str(root / name)]) == 1
        output = capsys.readouterr().out.splitlines()
        assert (
            sorted(
                {
                    int(line.split(":")[1])
                    for line in output
                    if line.startswith(f"{root}/data.json:") and " records in " not in line
                }
            )
            == BAD
        )
        assert f"{root}/data.json:4: a turn from gpt has the value '3', expected text" in output
        assert "6 records" in output[-2] and output[-2].endswith("3 bad; good are 2 with images and 1 without.")
        assert output[-1] == f"{root / name}: 3 good records."
        assert list(read_records(root / name)) == [RECORDS[i] for i in range(6) if i not in BAD]
        assert main([str(root / name), "--images", str(root)]) == 0
        capsys.readouterr()
    assert main([str(root / "data.json")]) == 1
    assert "1 bad; good are 4 with images and 1 without" in capsys.readouterr().out
    assert main([str(root / "data.json"), "--images", str(root), "--no-decode"]) == 1
    assert f"data.json:5: image 'nowhere.png' is not in {root}" in capsys.readouterr().out


def test_kinds_of_problems_are_counted_independently_of_file_names(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["my cat.png", "your dog: a story.png", "it's.png"]
    (root / "data.json").write_text(json.dumps([record("<image>", image=name) for name in names]))
    for more, kind in ((), "Cannot read image …: no such file"), (("--no-decode",), "image … is not in …"):
        assert main([str(root / "data.json"), "--images", str(root), *more]) == 1
        assert f"       3 x {kind}" in capsys.readouterr().out


def test_base64_in_place_of_a_path_gives_a_short_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "data.JSONL").write_text(json.dumps([record("<image>", image="iVBORw0KGgoAAAANSUhEUgAA/" * 430)]))
    for more in ((), ("--images", str(root)), ("--images", str(root), "--no-decode")):
        assert main([str(root / "data.JSONL"), *more]) == 1
        output = capsys.readouterr().out
        assert "(10750 characters)', expected the path of a file" in output
        assert max(map(len, output.splitlines())) < 300


def test_keys_that_are_not_used_are_named_once(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = [record("a"), record("b") | {"rejected": "x", "id": 1}, record("c") | {"rejected": "y", "source": "z"}]
    (root / "data.json").write_text(json.dumps([*made, record("d") | {"video": "v.mp4"}]))
    for more in ((), ("--workers", "2")):
        assert main([str(root / "data.json"), *more]) == 1
        output = capsys.readouterr().out
        assert "\n  key 'rejected' is not used (2 x, first in record 1)\n" in output and "'source'" not in output
        assert "data.json:3: the record has video, which is not supported" in output and "1 bad;" in output


def test_images_inside_a_parquet_file(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    good = (root / "red.png").read_bytes()
    rows = [record("<image>", image={"bytes": data, "path": "x.png"}) for data in (good, good[:45], b"%PDF-1.7")]
    pq.write_table(pa.Table.from_pylist(rows), root / "a.parquet")
    assert main([str(root / "a.parquet"), "--images", str(root), "--write-clean", str(root / "b.parquet")]) == 1
    output = capsys.readouterr().out
    assert "a.parquet:1: Cannot read the given image: the file is damaged" in output and "but a PDF document" in output
    assert list(read_records(root / "b.parquet")) == rows[:1]
    assert main([str(root / "b.parquet"), "--images", str(root), "--no-decode"]) == 0
    assert main([str(root / "b.parquet"), "--write-clean", str(root / "b.json")]) == 2
    assert "write a .parquet file" in capsys.readouterr().err and not (root / "b.json").exists()


def test_files_that_are_not_arrays_of_records(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = json.dumps(record("text"))
    for name, text, why in (
        ("one.json", one, "holds dict; expected an array"),
        ("lines.json", f"{one}\n{one}", "one record per line *.jsonl"),
        ("data.txt", "[", "is not valid JSON"),
    ):
        (root / name).write_text(text)
        assert main([str(root / name), "--images", str(root)]) == 2
        assert why in capsys.readouterr().err


def test_conversion_between_formats(root: Path) -> None:
    pytest.importorskip("pyarrow")
    good = [RECORDS[1], RECORDS[0]]
    (root / "data.jsonl").write_text("\n".join([*map(json.dumps, good), "{broken"]))
    assert main([str(root / "data.jsonl"), "--write-clean", str(root / "a.parquet")]) == 1
    assert main([str(root / "a.parquet"), "--write-clean", str(root / "b.json")]) == 0
    assert list(read_records(root / "a.parquet")) == list(read_records(root / "b.json")) == good


def test_mixture(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "a.json").write_text(json.dumps(RECORDS[:2]))
    (root / "b.json").write_text(json.dumps(RECORDS[2:]))
    sets = {name: {"annotation": f"{root}/{name}.json", "root": str(root)} for name in "ab"}
    (root / "meta.json").write_text(json.dumps(sets))
    assert main([str(root / "meta.json")]) == 1
    output = capsys.readouterr().out
    assert "a.json: 2 records" in output and "b.json: 4 records" in output and "b.json:0: Cannot read image" in output


def test_clean_copies_that_cannot_be_written(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyarrow")
    (root / "a.json").write_text(json.dumps([{**RECORDS[0], "id": 1}, {**RECORDS[0], "id": "one"}]))
    assert main([str(root / "a.json"), "--write-clean", str(root / "a.parquet")]) == 2
    assert "do not fit one Parquet schema" in capsys.readouterr().err and not (root / "a.parquet").exists()
    sets = {name: {"annotation": str(root / "a.json"), "root": str(root)} for name in "ab"}
    (root / "meta.json").write_text(json.dumps(sets))
    assert main([str(root / "meta.json"), "--write-clean", str(root / "b.json")]) == 2
    assert "got a mixture" in capsys.readouterr().err and not (root / "b.json").exists()


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--images", "nowhere"], "must be a folder"),
        (["--write-clean", "x.txt"], "ending in .json"),
    ],
)
def test_invalid_command_lines(
    root: Path, more: list[str], why: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    (root / "data.json").write_text(json.dumps(RECORDS[:1]))
    assert main(["data.json", *more]) == 2
    output = capsys.readouterr()
    assert why in output.err and not output.out  # before records are scanned
    assert main(["data.json", "--write-clean", "data.json/clean.json"]) == 2
    assert "Cannot write data.json/clean.json: " in capsys.readouterr().err
    (root / "bad.json").write_text("[{}]")
    assert main(["bad.json", "--write-clean", "x.json"]) == 2
    assert not (root / "x.json").exists()


def test_help_lists_the_flags_of_both_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    output = capsys.readouterr().out
    assert "--write-clean" in output and "--model-base" in output


def test_directories_are_checked_as_models(tiny_dirs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny_dirs["tower"])]) == 0
    assert "vision tower" in capsys.readouterr().out


# ------------------------------------------------------------------ fuzz


def mutated(draw: random.Random, index: int) -> tuple[Any, bool]:
    """A record and whether it is bad: valid ones of every form, bad ones with one problem each."""
    text = "".join(draw.choices('ab \n"\\{}[]é\u2028😀<>', k=draw.randint(0, 12)))
    turns = [{"from": "human", "value": "q" + text}, {"from": "gpt", "value": text}] * draw.randint(1, 3)
    turns = [dict(turn) for turn in turns]
    made: dict[str, Any] = {"id": index, "conversations": turns}
    images = draw.choice([0, 1, 1, 2])
    if images:
        made["image"] = "a.png" if images == 1 and draw.random() < 0.8 else ["a.png"] * images
        turns[0]["value"] = "<image>" * images + "\n" + turns[0]["value"]
    if draw.random() < 0.5:
        shape = draw.randrange(4)
        if shape == 0:
            turns.insert(0, {"from": "system", "value": "be brief"})
        elif shape == 1:
            turns.append({"from": "HUMAN", "value": "bye"})
        elif shape == 2:
            made["extra"] = draw.choice([None, 1.5, {"a": [text]}])
        elif not images:
            made["image"] = draw.choice([None, []])
        return made, False
    last = next(turn for turn in reversed(turns) if turn["from"] == "gpt")
    fault = draw.randrange(12)
    if fault == 0:
        return draw.choice([None, 3, text, [], [made]]), True
    if fault == 1:
        del made["conversations"]
    elif fault == 2:
        made["conversations"] = draw.choice([None, [], {}, "x", 0, [[]], [None], ["x"]])
    elif fault == 3:
        last["from"] = draw.choice(["user", "", None, 3, [], "assistant"])
    elif fault == 4:
        last["value"] = draw.choice([None, 3, [], {"text": "x"}, True])
    elif fault == 5:
        turns.insert(1, dict(turns[0] if images == 0 else turns[1]))
    elif fault == 6:
        turns[0]["value"] += "<image>"
        made["image"] = ["a.png"] * images if images != 1 else ["a.png", "a.png", "a.png"]
    elif fault == 7:
        made["image"] = draw.choice([3, True, {"path": "a.png"}, ["a.png", None], [""], [[]]])
    elif fault == 8:
        last["value"] += "<image>"
        made["image"] = ["a.png"] * (images + 1)
    elif fault == 9:
        del last[draw.choice(["from", "value"])]
    elif fault == 10:
        made["conversations"] = [turn for turn in turns if turn["from"] != "gpt"]
    else:
        last["value"] += "\ud83d"
    return made, True


@pytest.mark.slow
def test_ten_thousand_fuzzed_records_have_exact_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(7)
    made = [mutated(draw, index) for index in range(10_000)]
    bad = [index for index, (_, is_bad) in enumerate(made) if is_bad]
    assert 4000 < len(bad) < 6000
    seen = [(item, *known) for item, _ in made if (known := quick_check(item))]
    assert len(seen) > 1000  # `quick_check` and `parse_record` agree
    for item, text, image in seen:
        close = parse_record(item)
        assert (text.split(), image) == (" ".join(turn.text for turn in close.turns).split(), bool(close.image))
    objects = [(item, is_bad) for item, is_bad in made if isinstance(item, dict)]
    lines = [json.dumps(item) if draw.random() < 0.99 else "{broken" for item, _ in objects]
    broken = [i for i, (line, (_, is_bad)) in enumerate(zip(lines, objects)) if is_bad or line == "{broken"]
    (tmp_path / "a.json").write_text(json.dumps([item for item, _ in made]))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for name, total, wrong in (("a.json", len(made), bad), ("a.jsonl", len(lines), broken)):
        clean = tmp_path / f"clean-{name}"
        assert main([str(tmp_path / name), "--all", "--write-clean", str(clean)]) == 1
        shown = capsys.readouterr().out.splitlines()
        named = {
            int(line.split(":")[1]) for line in shown if line.startswith(f"{tmp_path / name}:") and " bad; " not in line
        }
        assert sorted(named) == wrong
        assert f"{total} records" in shown[-2] and f"{len(wrong)} bad;" in shown[-2]
        assert len(read_records(clean)) == total - len(wrong)
        assert main([str(clean)]) == 0
        capsys.readouterr()


def odd_image(draw: random.Random, index: int) -> tuple[bytes, bool]:
    """Bytes of an unusual image file, and whether training rejects it."""
    size = (draw.randint(2, 40), draw.randint(2, 40))
    kind = index % 14
    out = io.BytesIO()
    noise = Image.effect_noise(size, 60)
    if kind == 0:
        noise.convert("CMYK").save(out, "JPEG")
    elif kind == 1:
        exif = Image.Exif()
        exif[0x0112] = draw.randint(1, 8)
        noise.convert("RGB").save(out, "JPEG", exif=exif)
    elif kind == 2:
        noise.convert("P").save(out, "PNG", transparency=0)
    elif kind == 3:
        noise.convert(draw.choice(["1", "L", "LA", "RGBA", "I;16"])).save(out, "PNG")
    elif kind == 4:
        Image.new("RGB", draw.choice([(1, 3000), (3000, 1), (1, 1), (3, 3)]), "red").save(out, "PNG")
    elif kind == 5:
        noise.save(out, "GIF", save_all=True, append_images=[noise] * 3)
    elif kind == 6:
        noise.save(out, draw.choice(["BMP", "TIFF", "WEBP", "PPM"]))
    elif kind == 7:
        noise.resize((60, 60)).save(out, draw.choice(["JPEG", "PNG", "WEBP", "GIF"]))
        return out.getvalue()[: len(out.getvalue()) // draw.randint(2, 8)], True
    elif kind == 8:
        return bytes(draw.randrange(256) for _ in range(draw.randint(0, 200))), True
    elif kind == 9:
        return png_header(100_000, 100_000), True
    elif kind == 10:
        return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", True
    elif kind == 11:
        return b"<svg xmlns='http://www.w3.org/2000/svg'/>", True
    elif kind == 12:
        noise.resize((60, 60)).save(out, "PNG")
        data = bytearray(out.getvalue())
        middle = len(data) // 2
        data[middle : middle + 20] = bytes(20)
        return bytes(data), True
    else:
        return b"", True
    return out.getvalue(), False


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header declares a size far beyond its data."""
    head = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x00\x00\x00\x00"
    body = b"IDAT" + zlib.compress(bytes(1000))
    chunks = [head, body, b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") for chunk in chunks
    )


@pytest.mark.slow
def test_five_hundred_odd_images_have_exact_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(3)
    bad = []
    for index in range(500):
        data, is_bad = odd_image(draw, index)
        (tmp_path / f"{index}.img").write_bytes(data)
        bad += [index] if is_bad else []
    (tmp_path / "a.json").write_text(json.dumps([record("<image>", image=f"{i}.img") for i in range(500)]))
    assert main([str(tmp_path / "a.json"), "--images", str(tmp_path)]) == 1
    output = capsys.readouterr().out.splitlines()
    named = [
        int(line.split(":")[1]) for line in output if line.startswith(f"{tmp_path}/a.json:") and " bad; " not in line
    ]
    assert named == bad and len(bad) > 200
    assert f"{len(bad)} bad;" in output[-1]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_control_tokens_in_messages_are_named_once(root: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    records = [record("a < b"), record("the </s> tag"), record("<|im_end|>"), record("<div> <image", answer="<br>")]
    (root / "all.json").write_text(json.dumps(records).replace("</s>", "<\\/s>"))  # as PHP writes it
    assert main([str(root / "all.json"), "--write-clean", str(root / f"data{suffix}")]) == 0
    capsys.readouterr()
    assert main([str(root / f"data{suffix}")]) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "control token" in line]
    assert note.startswith(f"note: record 1 of {root}/data{suffix} contains '</s>'") and note.endswith("(2 record(s))")
