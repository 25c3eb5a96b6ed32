"""Answer parsing shared by benchmarks: VQA answer normalization, soft accuracy, and multiple-choice options.

TextVQA, VQAv2 and VizWiz use the normalization of the VQA challenge. Some results look odd (`none` becomes `0`, `N/A`
becomes `n`), but the published scores were computed with them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from llava.errors import DataError

PUNCTUATION: Final = ';/[]"{}()=+\\_-><@`,?!'
DIGIT_COMMA: Final = re.compile(r"\d,\d")
PERIOD: Final = re.compile(r"\.(?!\d)")
MAX_PERIODS: Final = 32  # the challenge's code passes the flag re.UNICODE, which is 32, as the count
ARTICLES: Final = frozenset(("a", "an", "the"))
LEADING_LETTER: Final = re.compile(r"\s*(?:[(\[{]\s*([A-Za-z])\s*[)\]}]|([A-Za-z])\s*(?:[.):]|$))")
_DIGITS: Final = "zero one two three four five six seven eight nine ten"
NUMBERS: Final = MappingProxyType({"none": "0", **{word: str(n) for n, word in enumerate(_DIGITS.split())}})

_ONE_APOSTROPHE: Final = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm
    I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've
    shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're
    there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're
    you've
"""
_TWO_APOSTROPHES: Final = """
    couldn't've hadn't've mightn't've shouldn't've wouldn't've he'd've I'd've it'd've she'd've somebody'd've
    someone'd've something'd've there'd've they'd've we'd've who'd've you'd've y'all'll
"""


def _contractions() -> Mapping[str, str]:
    table = {word.replace("'", ""): word for word in _ONE_APOSTROPHE.split()}
    for word in _TWO_APOSTROPHES.split():
        start, middle, end = word.split("'")
        table |= {f"{start}{middle}'{end}": word, f"{start}'{middle}{end}": word}
    table |= {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}
    table |= dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
    table |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    return MappingProxyType(table)


CONTRACTIONS: Final = _contractions()


def normalize(text: str) -> str:
    """Normalize an answer as the VQA challenge: lower case, no punctuation or articles, number words as digits."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = (NUMBERS.get(word, word) for word in _without_punctuation(text).split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _without_punctuation(text: str) -> str:
    """Delete marks that occur next to a space anywhere, replace the others by a space."""
    clean = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        clean = clean.replace(mark, "" if beside_space or DIGIT_COMMA.search(text) else " ")
    return PERIOD.sub("", clean, count=MAX_PERIODS)


def soft_accuracy(answer: str, human_answers: Sequence[str]) -> float:
    """VQA accuracy: the mean over the annotators of min(1, matches among the others / 3).

    0.3, 0.6, 0.9 and 1 for 1, 2, 3 and 4 matches of ten. Answers are normalized. Raises `DataError` without annotators.
    """
    if not human_answers:
        raise DataError("A question has no reference answers, so its answer cannot be scored.")
    normalized = normalize(answer)
    matches = [normalize(other) == normalized for other in human_answers]
    total = sum(matches)
    if not total:
        return 0.0
    return sum(min(1.0, (total - own) / 3) for own in matches) / len(human_answers)


def parse_option(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of `options` (letter → text) that an answer chooses, None if it is ambiguous.

    A leading letter, alone or followed by `.`, `)`, `:` or in brackets; otherwise the only option whose text occurs in
    the answer as whole words.
    """
    match = LEADING_LETTER.match(text)
    if match:
        letter = (match[1] or match[2]).upper()
        if letter in options:
            return letter
    lower = text.lower()
    contained = [letter for letter, option in options.items() if option and _contains(lower, option.lower())]
    return contained[0] if len(contained) == 1 else None


def _contains(text: str, option: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(option.strip())}(?!\w)", text) is not None
