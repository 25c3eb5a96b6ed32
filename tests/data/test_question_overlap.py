"""Questions in training texts: no containment above the bound is missed; instructions are not part of a question."""

from __future__ import annotations

import random

from llava.data.question_overlap import CONTAINED, QuestionIndex, _trigrams, drop_instructions


def test_the_index_finds_exactly_the_contained_questions() -> None:
    """Compared with all pairs, on texts of few words, so that many trigrams are shared."""
    draw = random.Random(0)
    words = "is there a dog in the image what color of".split()  # noqa: SIM905
    questions = [" ".join(draw.choices(words, k=draw.randint(1, 12))) for _ in range(200)]
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 30))) for _ in range(200)]
    texts += [f"so {question} now" for question in questions[:50]]
    texts += [question[question.index(" ") + 1 :] for question in questions if " " in question]  # without a trigram
    index, count = QuestionIndex(questions), 0
    for text in texts:
        ours = _trigrams(text)
        shares = [len(_trigrams(question) & ours) / len(_trigrams(question)) for question in questions]
        expected = [(number, share) for number, share in enumerate(shares) if share >= CONTAINED]
        assert index.find(text) == expected
        count += len(expected)
    assert count > 100


def test_case_punctuation_and_width_do_not_matter() -> None:
    index = QuestionIndex(["What's the man's name, on the LEFT?", "图中的狗是什么颜色?", "!!!"])
    assert index.find("what s the man s name on the left") == [(0, 1.0)]
    assert index.find("请问图中的狗是什么颜色") == [(1, 1.0)]
    assert index.find("") == index.find("!!!") == []


def test_instructions_are_dropped_and_the_question_stays() -> None:
    suffix = "Answer the question using a single word or phrase."
    asked = [f"Is there a {thing} in the image?" for thing in ("cat", "dog", "bus")]
    assert drop_instructions([f"{text} Please answer yes or no.\n{suffix}" for text in asked]) == asked
    ocr = [f"What is written?\nReference OCR token: {word}\n{suffix}" for word in ("STOP", "A", "B")]
    assert drop_instructions(ocr) == ["What is written?"] * 3
    assert drop_instructions(["Q?\nA. red\nB. blue", "R?\nA. one\nB. two"]) == [
        "Q?\nA. red\nB. blue",
        "R?\nA. one\nB. two",
    ]
    assert drop_instructions(["Same?", "Same?", ""]) == ["Same?", "Same?", ""]
