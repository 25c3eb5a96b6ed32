"""Answer parsing shared by benchmarks: VQA answer normalization, soft accuracy, and multiple-choice options.

TextVQA, VQAv2 and VizWiz use the normalization of the VQA challenge. Some results look odd (`none` becomes `0`, `N/A`
becomes `n`), but the published scores were computed with them. An empty answer never matches.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
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


@functools.lru_cache(maxsize=1 << 16)
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
    normalized = normalize(answer)
    return _leave_one_out(answer, [normalize(other) == normalized for other in human_answers])


def official_soft_accuracy(answer: str, human_answers: Sequence[str]) -> float:
    """`soft_accuracy` as computed by the program of the VQA challenge, which normalizes nothing if all people agree."""
    people = [_one_line(other) for other in human_answers]
    if len(set(people)) != 1:
        return soft_accuracy(answer, human_answers)
    return _leave_one_out(answer, [other == _one_line(answer) for other in people])


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _leave_one_out(answer: str, matches: Sequence[bool]) -> float:
    if not matches:
        raise DataError("A question has no reference answers, so its answer cannot be scored.")
    if not answer.strip():
        return 0.0
    total = sum(matches)
    return sum(min(1.0, (total - own) / 3) for own in matches) / len(matches)


_JOINING: Final = r"(?:because|since|as|and|or|is|was|but|for|due|which|based|given|with)"
# a letter in brackets; a capital that is neither part of a word, nor an article or a pronoun; a final small letter
_LETTER: Final = (
    r"(?:[(\[{]+\s*([A-Za-z])\s*[)\]}]+"
    rf"|(?<![A-Za-z0-9'’-])([B-HJ-Z]|[AI](?!\s+(?!{_JOINING}\b)[a-z]))(?![A-Za-z0-9'’-])"
    r"|(?<![A-Za-z0-9'’-])([a-z])(?=\W*$))"
)
_WORDS: Final = "is|are|was|be|would|should|must|to|the|this|question|correct|most|likely|final|option|choice|letter"
_STATED: Final = (
    re.compile(
        r"(?:\b(?i:answer|choose|select|pick|go\s+with)\b|答案|选)"
        rf"(?:\s|[:=\-\"'是为应该选择项]|\b(?i:{_WORDS})\b)*{_LETTER}",
        re.ASCII,
    ),
    re.compile(
        rf"{_LETTER}[)\].:]?\s+(?:is|would be)\s+(?:the\s+)?(?:most\s+)?(?:correct|right|best|answer)\b", re.ASCII
    ),
)
_ALONE: Final = re.compile(r"\W*(?:(?:(?i:option|choice|answer)\b|选项|选择|答案|选|是)\W*)?([A-Za-z])\W*")
_ALSO: Final = re.compile(
    rf"[)\].:]*\s*(?:[/&、]|\b(?:or|and)\b|或者?|和|(?=[(\[{{])|,(?=\W*[A-Za-z]\W*(?:$|and\b|or\b|[A-Z]\b)))\s*"
    rf"(?:(?i:or|and|option|choice)\s+)*{_LETTER}",
    re.ASCII,
)
_LABEL: Final = re.compile(rf"(?:^\s*|\b(?:or|and)\s+){_LETTER}\s*[).\]:、]", re.MULTILINE | re.ASCII)
_MENTION: Final = re.compile(_LETTER, re.ASCII)
_NEGATION: Final = re.compile(
    r"\b(?:not|never|cannot|neither|nor|wrong|incorrect)\b|n['’]t\b|[不没非错]", re.IGNORECASE
)
_MARKUP: Final = re.compile(r"</answer>|\\(?:text|textbf|mathrm|mathbf|rm)\b|[*_`#\\]+", re.IGNORECASE)
_MATH: Final = re.compile(r"\$([^$]+)\$")
_BOXED: Final = re.compile(r"\\boxed\b|\\fbox\b|<answer>", re.IGNORECASE)
_INSIDE: Final = r"[^\W\u2e80-\U0010ffff]"  # a character of a word; there are no spaces between CJK words


def _plain(text: str) -> str:
    """Text without Markdown, LaTeX and width variants; a box or an `<answer>` becomes a statement of the answer."""
    text = _MATH.sub(r"\1", unicodedata.normalize("NFKC", text))
    return _MARKUP.sub("", _BOXED.sub(" answer is ", text)).strip()


def _letters(matches: Iterable[re.Match[str]], options: Mapping[str, str]) -> set[str]:
    return {next(filter(None, match.groups())).upper() for match in matches} & options.keys()


def parse_option(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of `options` (letter → text) that an answer chooses, None if it chooses none or several.

    In this order: the answer is a letter (`B`, `(b)`, `Option B`); it is an option's text; it states a letter (`The
    answer is B`, `\\boxed{B}`, `答案是B`, one alone on the first or last line); it starts with a label (`B. cat`); it
    mentions one letter; it contains one option's text as whole words. Letters may be bracketed, bold, or full width.
    Negated and contradicting answers choose nothing.
    """
    text = _plain(text)
    lines = text.splitlines() or [""]
    alone = _letters(filter(None, map(_ALONE.fullmatch, (lines[0], lines[-1]))), options)
    if len(lines) == 1 and alone:
        return alone.pop()
    texts = {letter: _plain(option) for letter, option in options.items() if option.strip()}
    same = [letter for letter, option in texts.items() if _comparable(option) == _comparable(text) != ""]
    if len(same) == 1:
        return same[0]
    stated = [match for pattern in _STATED for match in pattern.finditer(text) if not _negated(text, match.start())]
    found = alone | _letters(stated, options)
    if found:
        found |= _letters(filter(None, (_ALSO.match(text, match.end()) for match in stated)), options)
        return found.pop() if len(found) == 1 else None
    leading = LEADING_LETTER.match(text)
    if leading and (letter := (leading[1] or leading[2]).upper()) in options:
        if _comparable(text[leading.end() :]) == _comparable(texts.get(letter, "")):
            return letter
        also = _ALSO.match(text, leading.end(leading.lastindex or 0))
        others = _letters((*_LABEL.finditer(text), *filter(None, [also])), options)
        return letter if others <= {letter} else None
    return _mentioned(text, options, texts)


def _mentioned(text: str, options: Mapping[str, str], texts: Mapping[str, str]) -> str | None:
    """The only option of which an answer mentions the letter or the text."""
    spans = [(*match.span(), letter) for letter, option in texts.items() for match in _find(option, text)]
    whole = [s for s in spans if not any(o[0] <= s[0] and s[1] <= o[1] and o[1] - o[0] > s[1] - s[0] for o in spans)]
    rest = list(text)
    for start, end, _ in whole:
        rest[start:end] = "x" * (end - start)
    remaining = "".join(rest)
    found = {letter for _, _, letter in whole} | _letters(_MENTION.finditer(remaining), options)
    begins = any(not text[:start].strip(" \"'") for start, _, _ in whole)  # as in: No, it is not.
    return found.pop() if len(found) == 1 and (begins or not _NEGATION.search(remaining)) else None


def _find(option: str, text: str) -> Iterable[re.Match[str]]:
    """Occurrences of an option's text as whole words or numbers."""
    if not option or option.casefold() not in text.casefold():
        return ()
    before = rf"(?<!{_INSIDE})(?<!\d[.,])" if re.match(_INSIDE, option) else ""
    after = rf"(?!{_INSIDE})(?![.,]\d)" if re.match(_INSIDE, option[-1:]) else ""
    return re.finditer(f"{before}{re.escape(option)}{after}", text, re.IGNORECASE)


def _comparable(text: str) -> str:
    return " ".join(text.casefold().strip(" .。!,;:\"'()[]").split())


def _negated(text: str, position: int) -> bool:
    """Whether the clause before a position is negated."""
    return _NEGATION.search(re.split(r"[.,;:!?\n。，；]", text[:position])[-1]) is not None
