"""Near-duplicate images: copies are found, distinct images are not; the cache resumes; the index misses no pair."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.contamination import KINDS, chart, cropped, landscape, leaves
from llava.data import near_duplicates
from llava.data.image_hash import CROPS, VERSION, content_box, hash_image, similarity
from llava.data.near_duplicates import RADIUS, HashCache, HashIndex, Images, Source, find_near_duplicates, hash_images
from llava.errors import ConfigError, DataError
from llava.images import expand2square, open_image

GRAY = (122, 116, 104)
Scene = Callable[[np.random.Generator], Image.Image]


@pytest.fixture
def pool() -> Executor:
    return ThreadPoolExecutor(1)


def images_of(sources: Sequence[Source]) -> Images:
    return Images(len(sources), sources.__getitem__)


def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that receives the size of each batch that is hashed."""
    made: list[int] = []
    original = near_duplicates._hash_batch

    def counted(batch: Sequence[Source]) -> list[bytes | str]:
        made.append(len(batch))
        return original(batch)

    monkeypatch.setattr(near_duplicates, "_hash_batch", counted)
    return made


def noise(rng: np.random.Generator, side: int = 32) -> Image.Image:
    """Blotches of random colors, made in no time."""
    return Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((side, side), Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("scene", [leaves, landscape, chart])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "combined"])
def test_a_copy_is_similar_and_another_image_is_not(scene: Scene, kind: str) -> None:
    rng = np.random.default_rng(3)
    image, other = scene(rng), scene(rng)
    copy = KINDS[kind](image, rng)
    assert similarity(image, copy) > 0.93 and similarity(copy, image) > 0.93
    assert similarity(image, other) < 0.8 and similarity(copy, other) < 0.8


def test_an_image_in_other_colors_is_not_a_copy_but_a_gray_one_is() -> None:
    image = Image.new("RGB", (64, 64), "white")
    image.paste((200, 60, 60), (10, 20, 40, 50))
    red, green, blue = image.split()
    assert similarity(image, Image.merge("RGB", (green, red, blue))) < 0.7
    assert similarity(image, image.convert("L").convert("RGB")) > 0.9


def test_borders_are_trimmed_to_the_content() -> None:
    image = leaves(np.random.default_rng(0)).resize((200, 120))
    square = expand2square(image, GRAY)
    assert content_box(square) == (0, 40, 200, 160)
    assert content_box(image) == (0, 0, 200, 120)
    assert content_box(Image.new("RGB", (30, 20))) == (0, 0, 30, 20)
    hashes = hash_image(square)
    assert hashes.shape == (2, CROPS)
    assert int(hashes[1, 0] ^ hash_image(image)[0, 0]).bit_count() <= 2
    assert hash_image(Image.new("RGB", (30, 20))).shape == (0, CROPS)


def test_a_reduced_jpeg_keeps_its_shorter_side_and_its_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    leaves(np.random.default_rng(1)).resize((640, 480)).save(buffer, "JPEG", exif=exif)
    reduced, whole = open_image(buffer.getvalue(), min_side=120), open_image(buffer.getvalue())
    assert (reduced.size, whole.size) == ((120, 160), (480, 640))
    assert similarity(reduced, whole) > 0.99
    with pytest.raises(DataError, match="damaged or incomplete"):
        open_image(buffer.getvalue()[:-4000], min_side=120)


def test_the_index_finds_exactly_the_pairs_within_the_radius(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with brute force, also in slices, on hashes that differ from a few centers in 0 to 20 bits."""
    rng = np.random.default_rng(0)
    centers = rng.integers(0, 2**63, 5, dtype=np.uint64)

    def near(count: int) -> np.ndarray:
        flips = [sum(1 << int(bit) for bit in rng.choice(64, int(rng.integers(0, 21)), False)) for _ in range(count)]
        return rng.choice(centers, count) ^ np.array(flips, np.uint64)

    hashes, queries = near(300), near(200)
    owners, asking = np.arange(300) // 3, np.arange(200) // 2
    bits = np.bitwise_count(queries[:, None] ^ hashes[None]).reshape(100, 2, 100, 3).min((1, 3))
    expected = [(int(a), int(b), int(bits[a, b])) for a, b in zip(*np.nonzero(bits <= RADIUS))]
    assert len(expected) > 300
    for most in (2**21, 100):
        monkeypatch.setattr(near_duplicates, "_MAX_PAIRS", most)
        assert [tuple(row) for row in HashIndex(hashes, owners).search(queries, asking).tolist()] == expected


def test_hashes_are_read_from_the_cache_until_the_file_changes(
    tmp_path: Path, pool: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = hashed(monkeypatch)
    rng = np.random.default_rng(0)
    sources: list[Source] = [tmp_path / f"{index}.png" for index in range(40)]
    for source in sources[:-1]:
        noise(rng).save(source)
    sources.append(png(noise(rng)))
    files = images_of(sources)
    first = list(hash_images(files, HashCache(tmp_path / "cache"), pool))
    assert sum(made) == 41 and "39.png: no such file" in str(first[39])
    made.clear()
    again = list(hash_images(files, HashCache(tmp_path / "cache"), pool))
    assert sum(made) == 1  # the missing file, which may appear
    assert all(isinstance(a, str) or np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    made.clear()
    noise(rng).save(tmp_path / "7.png")
    os.utime(tmp_path / "8.png", ns=(0, 0))
    assert not np.array_equal(list(hash_images(files, HashCache(tmp_path / "cache"), pool))[7], first[7])
    assert sum(made) == 3


def test_an_interrupted_check_keeps_what_was_hashed(
    tmp_path: Path, pool: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    sources: list[Source] = [png(noise(rng)) for _ in range(100)]

    def interrupted() -> None:
        for count, _ in enumerate(hash_images(images_of(sources), HashCache(tmp_path / "cache"), pool)):
            if count == 70:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    made = hashed(monkeypatch)
    assert len(list(hash_images(images_of(sources), HashCache(tmp_path / "cache"), pool))) == 100
    assert 4 <= sum(made) < 40


def test_a_file_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("text " * 1000)
    with pytest.raises(ConfigError, match="Cannot use the cache"):
        HashCache(tmp_path / "cache")


def test_hashes_of_another_version_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = (b"a", 1, 2)
    HashCache(tmp_path / "cache").put([(key, b"x")])
    assert HashCache(tmp_path / "cache").get(key) == b"x"
    monkeypatch.setattr(near_duplicates, "VERSION", VERSION + 1)
    assert HashCache(tmp_path / "cache").get(key) is None


def test_blocks_and_the_limit_of_candidates(tmp_path: Path, pool: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of several blocks are numbered over all; candidates beyond the limit are counted."""
    monkeypatch.setattr(near_duplicates, "BLOCK", 8)
    rng = np.random.default_rng(5)
    scenes = [noise(rng, 120) for _ in range(20)]
    ours: list[Source] = [*map(png, scenes), png(Image.new("RGB", (50, 50), "red")), b"text"]
    theirs: list[Source] = [png(cropped(scenes[index], rng)) for index in (3, 12, 19)]
    cache = HashCache(tmp_path / "cache")
    found = find_near_duplicates(images_of(ours), images_of(theirs), cache, pool, 0.9)
    assert [pair[:2] for pair in found.pairs] == [(3, 0), (12, 1), (19, 2)]
    assert (found.uniform, list(found.unreadable), found.skipped) == (1, [21], 0)
    monkeypatch.setattr(near_duplicates, "MAX_CANDIDATES", 2)
    found = find_near_duplicates(images_of(ours), images_of([*theirs, *theirs, *theirs]), cache, pool, 0.9)
    assert (len(found.pairs), found.skipped) == (6, 3)


def test_a_wrong_folder_is_an_error_and_not_a_clean_result(tmp_path: Path, pool: Executor) -> None:
    missing: list[Source] = [tmp_path / f"{index}.jpg" for index in range(101)]
    with pytest.raises(DataError, match="None of the first 101 images can be read: .*no such file"):
        find_near_duplicates(images_of(missing), images_of([]), HashCache(tmp_path / "cache"), pool, 0.9)


def test_bordered_images_are_compared_by_their_content() -> None:
    """A black border around white pages outweighs all that is written on them."""
    rng = np.random.default_rng(0)
    pages = [Image.new("RGB", (240, 200), "black") for _ in range(2)]
    for index, page in enumerate(pages):
        content = Image.new("RGB", (160, 150), "white")
        for line in range(12):
            content.paste("gray", (5, 12 * line, int(rng.integers(20, 155)), 12 * line + 5 + 2 * index))
        page.paste(content, (40, 25))
    assert similarity(*pages) < 0.9
    assert similarity(pages[0], pages[0].resize((180, 150))) > 0.98
