"""VQA answer normalization and soft accuracy: published examples, and properties of every text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.errors import DataError
from llava.eval.benchmarks.parsing import CONTRACTIONS, NUMBERS, normalize, soft_accuracy

VECTORS = {
    "Yes.": "yes",
    "3.5": "3.5",
    "3.": "3",
    "$12.80": "$12.80",
    "1,000": "1000",
    "$1,250.50": "$1250.50",
    "Two dogs": "2 dogs",
    "ten": "10",
    "twenty": "twenty",
    "none": "0",
    "none of them": "0 of them",
    "the cat's hat": "cat 's hat",
    "dont": "don't",
    "I'm": "i'm",
    "im": "im",
    "U.S.A.": "usa",
    "2:30 p.m.": "2:30 pm",
    "yes!": "yes",
    "half-and-half": "half and half",
    "half - and - half": "half and half",
    "a/b c / d": "ab c d",
    "a-b, c": "b c",
    "7-up": "7 up",
    "N/A": "n",
    "R&B": "r&b",
    "(left)": "left",
    "Coca-Cola, Pepsi": "coca cola pepsi",
    "the": "",
    "somebody'd": "somebodyd",
    "shouldnt've": "shouldn't've",
    "." * 40 + "x": "." * 8 + "x",
}


@pytest.mark.parametrize(("text", "wanted"), VECTORS.items())
def test_published_examples(text: str, wanted: str) -> None:
    assert normalize(text) == wanted


def test_tables_have_their_published_size_and_are_immutable() -> None:
    assert (len(CONTRACTIONS), len(NUMBERS)) == (120, 12)
    with pytest.raises(TypeError):
        NUMBERS["more"] = "1"  # type: ignore[index]


@given(st.text(max_size=60))
def test_any_text_gives_lower_case_words_between_single_spaces(text: str) -> None:
    found = normalize(text)
    assert found == " ".join(found.split())
    assert not {"a", "an", "the", ",", "?"} & set(found.split())


@pytest.mark.parametrize(("count", "wanted"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (7, 1.0), (10, 1.0)])
def test_soft_accuracy_of_ten(count: int, wanted: float) -> None:
    assert soft_accuracy("Yes.", ["yes"] * count + ["no"] * (10 - count)) == pytest.approx(wanted)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["one", "2", "three"]), min_size=1, max_size=12), st.randoms())
def test_soft_accuracy_ignores_the_order_of_people(people: list[str], random: object) -> None:
    mixed = list(people)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    assert soft_accuracy("1", mixed) == pytest.approx(soft_accuracy("1", people))
    assert 0 <= soft_accuracy("1", people) <= 1


def test_no_annotators_is_an_error() -> None:
    with pytest.raises(DataError, match="no reference answers"):
        soft_accuracy("yes", [])
