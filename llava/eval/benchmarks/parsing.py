"""The answer normaliser of the VQA challenges and the accuracy over ten people's answers (spec/eval.md §4.1, §4.2).

TextVQA, VQAv2 and VizWiz use both. Some values look odd (`none` becomes `0`, `N/A` becomes `n`); they are kept, because
the published numbers were made with them.
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
MOST_PERIODS: Final = 32  # the challenge's code passes a flag where the count belongs; 32 is that flag's value
ARTICLES: Final = frozenset(("a", "an", "the"))
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
    """The answer as the challenges compare it: lower case, without punctuation and articles, numbers as digits."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = (NUMBERS.get(word, word) for word in _without_punctuation(text).split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _without_punctuation(text: str) -> str:
    """A mark beside a space is deleted wherever it stands, any other becomes a space."""
    clean = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        clean = clean.replace(mark, "" if beside_space or DIGIT_COMMA.search(text) else " ")
    return PERIOD.sub("", clean, count=MOST_PERIODS)


def soft_accuracy(answer: str, people: Sequence[str]) -> float:
    """Mean over the people of min(1, matches among the others / 3); 0.3, 0.6, 0.9, 1 for 1, 2, 3, 4 of ten.

    Both sides are normalised here. `DataError` when nobody was asked.
    """
    if not people:
        raise DataError("A question has no reference answers, so its answer cannot be scored.")
    wanted = normalize(answer)
    same = [normalize(other) == wanted for other in people]
    matches = sum(same)
    if not matches:
        return 0.0
    return sum(min(1.0, (matches - own) / 3) for own in same) / len(people)


# --- Reading the option a multiple-choice answer means ----------------------------------------------------------------


LEADING: Final = re.compile(r"\s*(?:[(\[{]\s*([A-Za-z])\s*[)\]}]|([A-Za-z])\s*(?:[.):]|$))")


def read_option(text: str, options: Mapping[str, str]) -> str | None:
    """The letter among `options` (letter → text) that an answer means, None if it means none or several.

    A leading letter, alone or with `.`, `)`, `:` or in brackets; else the only option whose text the answer contains.
    """
    match = LEADING.match(text)
    if match:
        letter = (match[1] or match[2]).upper()
        if letter in options:
            return letter
    low = text.lower()
    inside = [letter for letter, option in options.items() if option and _contains(low, option.lower())]
    return inside[0] if len(inside) == 1 else None


def _contains(text: str, option: str) -> bool:
    """Whether `option` stands in `text` as whole words."""
    return re.search(rf"(?<!\w){re.escape(option.strip())}(?!\w)", text) is not None
