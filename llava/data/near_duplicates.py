"""Near-duplicates between two sets of images: hashes cached on disk, candidates by multi-index hashing, verification.

Memory is proportional to the benchmark: 128 bytes per image for hashes and 1 KB for their index. Training images are
processed in blocks.
"""

from __future__ import annotations

import functools
import hashlib
import os
import signal
import sqlite3
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, combinations, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from llava.data.image_hash import CROPS, DECODED_SIDE, VERSION, Hashes, hash_image, similarity
from llava.errors import ConfigError, DataError
from llava.images import open_image
from llava.parent_process import VARIABLE, exit_with_parent

Source = Path | bytes  # an image file, or its content
Key = tuple[bytes, int, int]  # name, size and modification time of an image in the cache
C = TypeVar("C")
T = TypeVar("T")
R = TypeVar("R")
Ints = npt.NDArray[np.int64]

BLOCK: Final = 4096  # images matched at a time
BATCH: Final = 32  # images or pairs per job
AHEAD: Final = 4 * (os.cpu_count() or 1)  # jobs submitted ahead of the one whose result is next
RADIUS: Final = 9  # largest Hamming distance of candidates; all such pairs are found
MAX_CANDIDATES: Final = 16  # benchmark images that a training image is compared with
_CHUNKS: Final = 4  # of 16 bits: if at most 11 of 64 bits differ, at most 2 differ in one of the chunks
_MASKS: Final = (0, *(1 << a for a in range(16)), *(1 << a | 1 << b for a, b in combinations(range(16), 2)))
_POPCOUNT: Final = np.array([value.bit_count() for value in range(2**16)], np.uint8)
_MAX_PAIRS: Final = 2**21  # hash pairs held at a time


@dataclass(frozen=True)
class Images:
    """Numbered images; `load` returns the image with a number."""

    count: int
    load: Callable[[int], Source]


class HashCache:
    """Hashes of image files on disk, by path, size and modification time; those of image contents by SHA-256."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=60)
            if self._db.execute("PRAGMA user_version").fetchone()[0] != VERSION:
                self._db.executescript(f"DROP TABLE IF EXISTS hashes; PRAGMA user_version = {VERSION}")
            self._db.execute("CREATE TABLE IF NOT EXISTS hashes (name BLOB PRIMARY KEY, size, mtime, hashes BLOB)")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(f"Cannot use the cache {self.path}: {error}; remove it or choose another one.") from error

    @staticmethod
    def key(source: Source) -> Key:
        """Key of an image; the name of a missing file is empty."""
        if isinstance(source, bytes):
            return hashlib.sha256(source).digest(), len(source), 0
        try:
            status = source.stat()
        except (OSError, ValueError):
            return b"", 0, 0
        return os.fsencode(os.path.abspath(source)), status.st_size, status.st_mtime_ns  # noqa: PTH100  # resolve() is slow

    def get(self, key: Key) -> bytes | None:
        query = "SELECT hashes FROM hashes WHERE name = ? AND size = ? AND mtime = ?"
        with self._errors():
            row = self._db.execute(query, key).fetchone() if key[0] else None
        return None if row is None else bytes(row[0])

    def put(self, rows: Sequence[tuple[Key, bytes]]) -> None:
        with self._errors(), self._db:
            self._db.executemany("REPLACE INTO hashes VALUES (?, ?, ?, ?)", [(*key, value) for key, value in rows])


def _start_worker(parent: int) -> None:
    os.environ[VARIABLE] = str(parent)
    exit_with_parent()


@contextmanager
def worker_pool(workers: int) -> Iterator[Executor]:
    """An executor of `workers` processes; a thread of this process for 0."""
    pool: Executor = ThreadPoolExecutor(1)
    if workers:
        pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (os.getpid(),))
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: on Ctrl-C this process ends the workers
        for _ in range(workers):
            pool.submit(int)  # starts a process
        signal.signal(signal.SIGINT, handler)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise DataError("A worker process was killed; check the free memory, or use fewer --workers.") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _hash_batch(sources: Sequence[Source]) -> list[bytes | str]:
    """Hashes as bytes, or the reason why the image cannot be read."""
    results: list[bytes | str] = []
    for source in sources:
        try:
            results.append(hash_image(open_image(source, min_side=DECODED_SIDE)).tobytes())
        except DataError as error:
            results.append(str(error.args[0]))
    return results


@functools.lru_cache(maxsize=64)
def _opened(source: Source) -> Image.Image:
    image = open_image(source, min_side=2 * DECODED_SIDE)
    return image.reduce(max(1, min(image.size) // (2 * DECODED_SIDE)))


def _compare_batch(pairs: Sequence[tuple[Source, Source]]) -> list[float]:
    return [similarity(_opened(first), _opened(second)) for first, second in pairs]


def _in_order(
    pool: Executor, task: Callable[[list[T]], list[R]], jobs: Iterable[tuple[C, list[T]]]
) -> Iterator[tuple[C, list[R]]]:
    """Run `task` on each (context, items) and yield (context, results) in order, a bounded number of jobs ahead."""
    waiting: deque[tuple[C, Future[list[R]] | None]] = deque()
    for job in chain(jobs, repeat(None, AHEAD)):
        if job is not None:
            waiting.append((job[0], pool.submit(task, job[1]) if job[1] else None))
        if waiting and (job is None or len(waiting) > AHEAD):
            context, future = waiting.popleft()
            yield context, future.result() if future else []


def hash_images(images: Images, cache: HashCache, pool: Executor) -> Iterator[Hashes | str]:
    """The hashes of each image in order, or why it cannot be read; new hashes are cached after each batch."""

    def jobs() -> Iterator[tuple[list[tuple[Key, bytes | str | None]], list[Source]]]:
        for start in range(0, images.count, BATCH):
            known: list[tuple[Key, bytes | str | None]] = []
            missing = []
            for index in range(start, min(start + BATCH, images.count)):
                try:
                    source = images.load(index)
                    key = cache.key(source)
                    known.append((key, cache.get(key)))
                    missing += [source] if known[-1][1] is None else []
                except DataError as error:
                    known.append(((b"", 0, 0), str(error.args[0])))
            yield known, missing

    for known, made in _in_order(pool, _hash_batch, jobs()):
        new = iter(made)
        values = [next(new) if value is None else value for _, value in known]
        cache.put([(key, new) for (key, old), new in zip(known, values) if old is None and isinstance(new, bytes)])
        for value in values:
            yield value if isinstance(value, str) else np.frombuffer(value, np.uint64).reshape(-1, CROPS)


class HashIndex:
    """All hashes within `RADIUS` bits of a query (Norouzi et al., "Fast Search in Hamming Space with Multi-Index
    Hashing", CVPR 2012). `owners` (E,) are the images of the hashes (E,).
    """

    def __init__(self, hashes: Hashes, owners: Ints) -> None:
        self.hashes, self.owners = hashes, owners
        chunks = _chunks(hashes)
        self.order = [np.argsort(chunk, kind="stable") for chunk in chunks]
        self.starts = [np.searchsorted(chunk[order], np.arange(2**16 + 1)) for chunk, order in zip(chunks, self.order)]

    def search(self, queries: Hashes, owners: Ints) -> Ints:
        """Rows (owner of the query, owner of the hash, distance in bits): the closest hashes of each pair of images."""
        found, held = [np.empty((0, 3), np.int64)], 0
        for chunk, order, starts in zip(_chunks(queries), self.order, self.starts):
            for mask in _MASKS:
                value = (chunk ^ np.uint16(mask)).astype(np.int64)
                count = starts[value + 1] - starts[value]
                nonempty = np.flatnonzero(count)
                ends = np.cumsum(count[nonempty])
                total = int(ends[-1]) if len(ends) else 0
                for rows in np.split(nonempty, np.searchsorted(ends, range(_MAX_PAIRS, total, _MAX_PAIRS))):
                    pairs = self._pairs(queries, owners, rows, starts[value[rows]], count[rows], order)
                    found.append(pairs)
                    held += len(pairs)
                if held > _MAX_PAIRS:
                    found, held = [_closest(np.concatenate(found))], 0
        return _closest(np.concatenate(found))

    def _pairs(self, queries: Hashes, owners: Ints, rows: Ints, starts: Ints, count: Ints, order: Ints) -> Ints:
        """Close pairs of each query in `rows` and the `count` hashes of its bucket."""
        query = np.repeat(rows, count)
        within = np.arange(len(query)) - np.repeat(np.cumsum(count) - count, count)
        entry = order[np.repeat(starts, count) + within]
        bits = _POPCOUNT[(queries[query] ^ self.hashes[entry]).view(np.uint16).reshape(-1, _CHUNKS)].sum(1)
        near = np.flatnonzero(bits <= RADIUS)
        return np.stack([owners[query[near]], self.owners[entry[near]], bits[near].astype(np.int64)], axis=1)


def _chunks(hashes: Hashes) -> npt.NDArray[np.uint16]:
    return np.ascontiguousarray(hashes.view(np.uint16).reshape(-1, _CHUNKS).T)


def _closest(pairs: Ints) -> Ints:
    """Each pair of owners once, with the smallest distance."""
    pairs = pairs[np.lexsort(pairs.T[::-1])]
    return pairs[np.append(True, (pairs[1:, :2] != pairs[:-1, :2]).any(1))] if len(pairs) else pairs


def flatten(hashes: Sequence[Hashes], crops: int = CROPS) -> tuple[Hashes, Ints]:
    """The first `crops` hashes of every view of N images, and the images they belong to."""
    owners = np.repeat(np.arange(len(hashes)), [len(each) * crops for each in hashes])
    rows = np.concatenate([np.empty((0, CROPS), np.uint64), *hashes])
    return np.ascontiguousarray(rows[:, :crops]).reshape(-1), owners


class BenchmarkIndex:
    """Hashes of the images of benchmarks, to be compared with blocks of training images."""

    def __init__(self, hashes: Sequence[Hashes]) -> None:
        self.whole = flatten(hashes, 1)
        self.index = HashIndex(*flatten(hashes))

    def candidates(self, block: Sequence[Hashes]) -> tuple[Ints, int]:
        """Rows (image of the block, benchmark image, distance), and the number of those beyond `MAX_CANDIDATES`.

        Either image may be a crop of the other.
        """
        crops_of_ours = self.index.search(*flatten(block, 1))
        crops_of_theirs = HashIndex(*flatten(block)).search(*self.whole)[:, [1, 0, 2]]
        pairs = _closest(np.concatenate([crops_of_ours, crops_of_theirs]))
        pairs = pairs[np.lexsort((pairs[:, 2], pairs[:, 0]))]
        rank = np.arange(len(pairs)) - np.searchsorted(pairs[:, 0], pairs[:, 0])
        return pairs[rank < MAX_CANDIDATES], int((rank >= MAX_CANDIDATES).sum())


@dataclass
class NearDuplicates:
    """Pairs (training image, benchmark image, similarity) of two sets of images.

    `unreadable` maps indices of images to reasons; `uniform` images have nothing to compare. `skipped` is the number
    of candidates beyond `MAX_CANDIDATES` per image.
    """

    pairs: list[tuple[int, int, float]] = field(default_factory=list)
    unreadable: dict[int, str] = field(default_factory=dict)
    benchmark_unreadable: dict[int, str] = field(default_factory=dict)
    uniform: int = 0
    benchmark_uniform: list[int] = field(default_factory=list)
    skipped: int = 0


def find_near_duplicates(
    training: Images,
    benchmark: Images,
    cache: HashCache,
    pool: Executor,
    threshold: float,
    progress: Callable[[int], object] = lambda count: None,
) -> NearDuplicates:
    """Compare all `training` images with all `benchmark` images; `progress` is told the number of images hashed."""
    found = NearDuplicates()
    theirs: list[Hashes] = []
    for index, result in enumerate(hash_images(benchmark, cache, pool)):
        theirs.append(_readable(result, index, found.benchmark_unreadable))
        found.benchmark_uniform += [index] if not isinstance(result, str) and not len(result) else []
        progress(1)
    against = BenchmarkIndex(theirs)
    block: list[Hashes] = []
    for index, result in enumerate(hash_images(training, cache, pool)):
        block.append(_readable(result, index, found.unreadable))
        found.uniform += not isinstance(result, str) and not len(result)
        progress(1)
        if len(block) == BLOCK or index == training.count - 1:
            if len(found.unreadable) == index + 1 > 100:
                raise DataError(f"None of the first {index + 1} images can be read: {result}")
            candidates, skipped = against.candidates(block)
            found.skipped += skipped
            _verify(
                found, candidates[:, :2] + np.array([index + 1 - len(block), 0]), training, benchmark, pool, threshold
            )
            block = []
    return found


def _readable(result: Hashes | str, index: int, unreadable: dict[int, str]) -> Hashes:
    if not isinstance(result, str):
        return result
    unreadable[index] = result
    return np.empty((0, CROPS), np.uint64)


def _verify(
    found: NearDuplicates, candidates: Ints, training: Images, benchmark: Images, pool: Executor,
    threshold: float,
) -> None:  # fmt: skip
    """Add the candidates whose images are similar."""
    rows = [(int(ours), int(theirs)) for ours, theirs in candidates]
    batches = (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))
    jobs = ((batch, [(training.load(a), benchmark.load(b)) for a, b in batch]) for batch in batches)
    for batch, values in _in_order(pool, _compare_batch, jobs):
        found.pairs += [(a, b, value) for (a, b), value in zip(batch, values) if value >= threshold]
