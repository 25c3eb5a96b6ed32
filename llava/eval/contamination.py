"""Find benchmark images and questions in training data: `llava check DATA --against BENCHMARK ...`.

    llava check playground/llava_v1_5_mix665k.json --image_folder playground/data --against pope mme --html report.html
    llava check data.json --image_folder images --against other.jsonl=other_images photos/

DATA is an annotation file or a mixture. BENCHMARK is a task of `llava eval`, its folder or question file, another
question or annotation file (FILE=DIR names the folder of its images), or a folder of images.

Images are near-duplicates if one is a resized, re-encoded, padded or cropped (up to 10 % of its width and height) copy
of the other. A question is reported if a record contains it together with a near-duplicate of its image, or if its text
is rare: ten or more words, in at most three records and asked about at most three images. Other questions that occur in
training records, such as "Is there a dog in the image?", are only counted.

Image hashes are cached, so an interrupted check resumes. The exit status is 0 if nothing was found, 1 if
near-duplicates or questions were found, 3 if nothing was found but some images or records could not be read, 2 for
errors.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tqdm import tqdm

from llava.data.check_records import read_datasets
from llava.data.dataset_scan import default_workers
from llava.data.near_duplicates import HashCache, Images, NearDuplicates, find_near_duplicates, worker_pool
from llava.data.question_overlap import QuestionIndex, words_of
from llava.data.training_set import TrainingSet
from llava.errors import ConfigError
from llava.eval.benchmarks.base import EVAL_DATA
from llava.eval.reporting.contamination import (
    RARE_TEXT,
    SAME_IMAGE,
    BenchmarkReport,
    ImagePair,
    QuestionPair,
    Report,
    render_page,
    summary,
)
from llava.eval.reporting.rendering import data_url
from llava.eval.run.contents import Asked, Benchmark, human_texts, read_benchmark
from llava.files import write_text
from llava.images import open_image
from llava.utils import guarded

THRESHOLD: Final = 0.92
RARE_WORDS, RARE_RECORDS, RARE_IMAGES = 10, 3, 3
THUMBNAIL: Final = 288  # pixels of the longer side
SMALL: Final = 300  # images up to which worker processes are not worth starting


@dataclass(frozen=True)
class Found:
    """A benchmark question in a training record."""

    record: int
    text: str
    contained: float


class QuestionSearch:
    """Search of training records for the questions of benchmarks."""

    def __init__(self, benchmarks: Sequence[Benchmark]) -> None:
        self.benchmarks = benchmarks
        self.owners: defaultdict[str, list[tuple[int, Asked]]] = defaultdict(list)
        for number, benchmark in enumerate(benchmarks):
            for asked in benchmark.questions:
                self.owners[" ".join(words_of(asked.text))].append((number, asked))
        self.owners.pop("", None)
        self.texts = list(self.owners)
        self.index = QuestionIndex(self.texts)
        self.counts: Counter[int] = Counter()  # records by text
        self.first: defaultdict[int, list[Found]] = defaultdict(list)  # by text, at most RARE_RECORDS each
        self.with_image: list[tuple[int, Asked, Found]] = []

    def add(self, number: int, texts: Sequence[str], near: set[tuple[int, int]]) -> None:
        """Search the `texts` of a record; `near` are the (benchmark, image) pairs that its images duplicate."""
        best: dict[int, Found] = {}
        for text in texts:
            for key, contained in self.index.find(text):
                if key not in best or contained > best[key].contained:
                    best[key] = Found(number, text, contained)
        for key, found in best.items():
            self.counts[key] += 1
            if self.counts[key] <= RARE_RECORDS:
                self.first[key].append(found)
            self.with_image += [
                (benchmark, asked, found)
                for benchmark, asked in (self.owners[self.texts[key]] if near else ())
                if any((benchmark, image) in near for image in asked.images)
            ]

    def rare(self) -> list[tuple[int, Asked, Found]]:
        """Long questions that occur in few records and are asked about few images."""
        return [
            (benchmark, asked, found)
            for key, count in self.counts.items()
            if count <= RARE_RECORDS and len(self.texts[key].split()) >= RARE_WORDS
            if len({asked.images for _, asked in self.owners[self.texts[key]]}) <= RARE_IMAGES
            for benchmark, asked in self.owners[self.texts[key]]
            for found in self.first[key]
        ]

    def pairs(self, training: TrainingSet, reports: Sequence[BenchmarkReport]) -> list[QuestionPair]:
        """The questions to report; counts are added to `reports`."""
        pairs, seen, reported = [], set(), set()
        for reason, rows in ((SAME_IMAGE, self.with_image), (RARE_TEXT, self.rare())):
            for number, asked, found in rows:
                if (id(asked), found.record) in seen:
                    continue
                seen.add((id(asked), found.record))
                if id(asked) not in reported:
                    reported.add(id(asked))
                    reports[number].questions_with_image += reason == SAME_IMAGE
                    reports[number].rare_questions += reason == RARE_TEXT
                name, place = reports[number].name, training.place(found.record)
                pairs.append(
                    QuestionPair(name, asked.question_id, asked.text, place, found.text, found.contained, reason)
                )
        for key in self.counts:
            for number, asked in self.owners[self.texts[key]]:
                reports[number].common_questions += id(asked) not in reported
        return pairs


def check(
    training: TrainingSet, benchmarks: Sequence[Benchmark], cache: HashCache, workers: int, threshold: float
) -> Report:
    """Compare training data with benchmarks, with progress on stderr."""
    begin = time.perf_counter()
    places = [(number, index) for number, each in enumerate(benchmarks) for index in range(len(each.images))]
    joined = Images(len(places), lambda index: benchmarks[places[index][0]].load(places[index][1]))
    total = joined.count + len(training)
    with (
        worker_pool(0 if total <= SMALL else workers) as pool,
        tqdm(total=total, unit="image", desc="images", mininterval=1, smoothing=0.05) as bar,
    ):
        found = find_near_duplicates(Images(len(training), training.load), joined, cache, pool, threshold, bar.update)
    near: defaultdict[int, set[tuple[int, int]]] = defaultdict(set)
    for ours, theirs, _ in found.pairs:
        near[ours].add(places[theirs])
    search = QuestionSearch(benchmarks)
    if search.texts:
        for number, record in tqdm(training.records(), total=training.record_count, unit="record", desc="questions"):
            matched = set().union(*(near[image] for image in training.images_of(number) if image in near))
            search.add(number, human_texts(record), matched)
    reports, pairs = _image_report(training, benchmarks, places, found)
    return Report(
        data=", ".join(str(file) for file, *_ in training.files),
        records=training.record_count,
        images=len(training),
        seconds=time.perf_counter() - begin,
        bad_records={training.place(number): text for number, text in training.bad.items()},
        unreadable={training.name(index): text for index, text in found.unreadable.items()},
        uniform=found.uniform,
        skipped_candidates=found.skipped,
        benchmarks=reports,
        image_pairs=pairs,
        question_pairs=search.pairs(training, reports),
    )


def _image_report(
    training: TrainingSet, benchmarks: Sequence[Benchmark], places: Sequence[tuple[int, int]], found: NearDuplicates
) -> tuple[list[BenchmarkReport], list[ImagePair]]:
    """Counts of each benchmark, and the pairs of images, most similar first."""
    asked: defaultdict[tuple[int, int], list[str]] = defaultdict(list)
    for number, benchmark in enumerate(benchmarks):
        for each in benchmark.questions:
            for image in each.images:
                asked[number, image].append(each.question_id)
    reports = [BenchmarkReport(each.name, len(each.images), len(each.questions)) for each in benchmarks]
    for index, text in found.benchmark_unreadable.items():
        number, image = places[index]
        reports[number].unreadable[benchmarks[number].images[image]] = text
    for index in found.benchmark_uniform:
        reports[places[index][0]].uniform += 1
    for index in {theirs for _, theirs, _ in found.pairs}:
        reports[places[index][0]].images_found += 1
    pairs = []
    for ours, theirs, similarity in sorted(found.pairs, key=lambda pair: -pair[2]):
        number, image = place = places[theirs]
        names = benchmarks[number].name, benchmarks[number].images[image], training.name(ours)
        records = [training.place(record) for record in training.records_of(ours)]
        pairs.append(ImagePair(*names, similarity, records, asked[place], (ours, place)))
    return reports, pairs


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava" / "image_hashes.sqlite"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava check", description=__doc__, usage="llava check DATA --against BENCHMARK [BENCHMARK ...] [...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="training data: an annotation file or a mixture")
    add("--against", nargs="+", action="extend", required=True, metavar="BENCHMARK", help="see above")
    add("--image_folder", "--images", type=Path, metavar="DIR", help="image folder (default: the folder of the file)")
    default = Path(os.environ.get("EVAL_DATA", EVAL_DATA))
    add("--eval-data", type=Path, default=default, help="parent folder of all tasks (EVAL_DATA; %(default)s)")
    add("--html", type=Path, metavar="FILE", help="write a page with the pairs side by side")
    add("--max-pairs", type=int, default=200, help="pairs of images and of questions on the page (%(default)s)")
    add("--json", action="store_true", help="print one JSON object with all pairs in place of the summary")
    add("--threshold", type=float, default=THRESHOLD, help="similarity of near-duplicate images (%(default)s)")
    add("--cache", type=Path, default=default_cache(), metavar="FILE", help="hashes of images (%(default)s)")
    add("--workers", type=int, default=default_workers(), help="number of processes (%(default)s)")
    return parser


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {args.workers}.")
    if not 0 < args.threshold <= 1:
        raise ConfigError(f"--threshold must be above 0 and at most 1, got {args.threshold}.")
    if args.image_folder is not None and not args.image_folder.is_dir():
        raise ConfigError(f"--image_folder must be a folder, got {args.image_folder}.")
    cache = HashCache(args.cache)
    benchmarks = [read_benchmark(word, args.image_folder, args.eval_data) for word in args.against]
    training = TrainingSet(read_datasets(args.data, args.image_folder))
    try:
        report = check(training, benchmarks, cache, args.workers, args.threshold)
    except KeyboardInterrupt:
        print("Interrupted; the same command continues with the images that are not hashed yet.", file=sys.stderr)
        raise
    if args.html:

        def thumbnails(pair: ImagePair) -> tuple[str, str]:
            ours, (number, image) = pair.numbers
            first, second = map(open_image, (training.load(ours), benchmarks[number].load(image)))
            return data_url(first, THUMBNAIL, quality=80), data_url(second, THUMBNAIL, quality=80)

        write_text(args.html, render_page(report, args.max_pairs, thumbnails))
    print(json.dumps(report.to_json(), indent=1) if args.json else summary(report))
    return report.status


if __name__ == "__main__":
    sys.exit(main())
