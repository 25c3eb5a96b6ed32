"""Questions of benchmarks within training texts: containment of word trigrams.

A question is found in a text that has at least 80 % of its trigrams. Candidates come from an index of each question's
rarest trigrams, as many as guarantee that no such text is missed (prefix filtering, Chaudhuri et al., ICDE 2006).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Final

CONTAINED: Final = 0.8  # of a question's trigrams
SHARED: Final = 0.05  # of the questions: a line that so many share is an instruction, not part of a question
_CJK: Final = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # written without spaces: each character counts as a word
_WORD: Final = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
_LINE: Final = re.compile(r"(?<=[?？])\s+|\n+")


def words_of(text: str) -> list[str]:
    """Words in lower case without punctuation."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def _trigrams(text: str) -> set[int]:
    """Hashes of the word trigrams, or of all words if there are fewer than three; empty for a text without words."""
    words = words_of(text)
    if len(words) < 3:
        return {hash(tuple(words))} if words else set()
    return set(map(hash, zip(words, words[1:], words[2:])))


def drop_instructions(texts: Sequence[str]) -> list[str]:
    """Questions without the lines that many of them share, such as the format of the answer.

    A question ends at its question mark. Lines with a colon are compared up to it ("Reference OCR token: …"). The first
    line is always kept.
    """
    split = [[line for line in _LINE.split(text.strip()) if line] or [""] for text in texts]
    counts = Counter(key for lines in split for key in {line.partition(":")[0] for line in lines[1:]})
    least = max(2, SHARED * len(texts))
    return ["\n".join([lines[0], *(x for x in lines[1:] if counts[x.partition(":")[0]] < least)]) for lines in split]


class QuestionIndex:
    """Index of questions."""

    def __init__(self, questions: Sequence[str]) -> None:
        self.trigrams = [_trigrams(question) for question in questions]
        frequency = Counter(each for trigrams in self.trigrams for each in trigrams)
        self.postings: defaultdict[int, list[int]] = defaultdict(list)
        for index, trigrams in enumerate(self.trigrams):
            count = len(trigrams) - self._least(trigrams) + 1
            for each in sorted(trigrams, key=lambda each: (frequency[each], each))[:count]:
                self.postings[each].append(index)

    @staticmethod
    def _least(trigrams: set[int]) -> int:
        return -int(-len(trigrams) * CONTAINED // 1)

    def find(self, text: str) -> list[tuple[int, float]]:
        """Indices of the questions that the text contains, with the fraction of their trigrams found."""
        ours = _trigrams(text)
        candidates = {index for each in ours & self.postings.keys() for index in self.postings[each]}
        shared = [(index, len(self.trigrams[index] & ours)) for index in sorted(candidates)]
        return [
            (index, count / len(self.trigrams[index]))
            for index, count in shared
            if count >= self._least(self.trigrams[index])
        ]
