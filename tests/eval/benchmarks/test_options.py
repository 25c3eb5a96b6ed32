"""Multiple-choice answers in the forms that models give: the letter that they choose, or none."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.eval import eval_mmbench
from llava.eval.benchmarks import mmbench
from llava.eval.benchmarks.parsing import parse_option
from tests.eval.conftest import read_jsonl, write_jsonl

ANIMALS = {"A": "dog", "B": "cat", "C": "red car", "D": "dark red car"}
REWORDINGS = {
    "sentence": "The answer is {letter}.",
    "bold": "**{letter}**",
    "option": "Option {letter}",
    "brackets": "({letter})",
    "boxed": "$\\boxed{{\\text{{{letter}}}}}$",
    "Chinese": "答案是{letter}",
    "label": "{letter}. {text}",
    "small": "{small}",
    "one bracket": "{letter})",
    "text": "{text}",
    "full width": "{wide}",
    "tags": "<answer>{letter}</answer>",
    "thinking": "<think>A or B? Not C.</think>\n{letter}",
    "explained": "The correct answer is **{letter}**. The other options are wrong.",
}


def reword(form: str, letter: str, text: str) -> str:
    wide = chr(ord(letter) + 0xFEE0)
    return REWORDINGS[form].format(letter=letter, text=text, small=letter.lower(), wide=wide)


def published_mmbench(golden_dir: Path) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """A table of the questions whose published answers are in the golden data, with one wrong answer, and copies."""
    rows, answers = [], []
    for number, row in enumerate(read_jsonl(golden_dir / "eval" / "samples" / "mmbench" / "answers.jsonl")):
        for copy in range(2):
            options = row["options"][copy:] + row["options"][:copy]
            index = row["question_id"] + copy * mmbench.COPY_OFFSET
            letter = "AB"[("AB".index(row["text"]) + copy) % 2]
            right = "AB"["BA".index(letter)] if number == 0 else letter
            cells = dict(zip("AB", (option.replace("\n", " ") for option in options)))
            rows.append({"index": str(index), "question": "Q", **cells, "answer": right, "category": "c", "image": "x"})
            answers.append({**row, "question_id": index, "text": letter, "options": options})
    return rows, answers


@pytest.mark.golden
@pytest.mark.parametrize("form", REWORDINGS)
def test_reworded_published_answers_to_mmbench_give_the_published_score(
    form: str, golden_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, answers = published_mmbench(golden_dir)
    lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
    (tmp_path / "t.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    printed = []
    for change in (False, True):
        said = [
            {**row, "text": reword(form, row["text"], row["options"]["AB".index(row["text"])])} if change else row
            for row in answers
        ]
        files = ["--annotation-file", str(tmp_path / "t.tsv")]
        files += ["--result-file", str(write_jsonl(tmp_path / "a.jsonl", said))]
        assert eval_mmbench.main(files) == 0
        printed.append(capsys.readouterr().out)
    assert "Circular accuracy: 75.00%" in printed[0] and "Unread answers: 0 of 8" in printed[0]
    assert printed[1] == printed[0]


@pytest.mark.golden
@pytest.mark.parametrize("form", REWORDINGS)
def test_the_golden_mmbench_case_scores_the_same_in_other_words(form: str, golden_dir: Path, tmp_path: Path) -> None:
    case = golden_dir / "eval" / "cases" / "mmbench-dev" / "in"
    rows = mmbench.read_table(case / "mmb.tsv")
    by_index = {row["index"]: row for row in rows}
    answers = read_jsonl(case / "answers" / "tiny-v1.jsonl")
    expected = mmbench.score_answers(rows, mmbench.read_predictions(case / "answers" / "tiny-v1.jsonl", rows))
    for answer in answers:
        options = mmbench.options_of(by_index[str(answer["question_id"])])
        if answer["text"] in options:  # the others choose an option that there is not
            answer["text"] = reword(form, answer["text"], options[answer["text"]])
    path = write_jsonl(tmp_path / "a.jsonl", answers)
    assert mmbench.score_answers(rows, mmbench.read_predictions(path, rows)) == expected
    assert expected["unread"] == 2  # C and D where there are two options


CHOSEN = {
    "B": """B: cat|{B}|`B`|"B"|B、猫|Ｂ．|（Ｂ）|B cat|B, cat|B - cat|Choice B|answer: b|the answer is b.|ANSWER IS B.
        |Answer - B|Answer: (B) because A is wrong|The answer is B. Note that A is common.
        |I considered (A), but no. Final answer: B.
        |The correct option is B|I would go with option B|I choose (B).|B is the correct answer because A shows a dog
        |Option B is the best choice.|A) is wrong; the answer is B|So the answer should be B, since it is furry
        |这张图显示一只动物，所以答案是B项|正确答案是选项 B|我选B|应该选B。|The image shows B|So it is \\textbf{B}|### B
        |B\n\nExplanation: Option A is wrong, since it shows a dog.|A man rides A horse, not B. So:\n\n**B**|正解はBです
        |{"answer": "B", "reason": "A is wrong"}|Option B: cat|B (cat)|Cat (B)|Die Antwort ist B|La respuesta es B.
        |[[B]]|The animal is a cat, so the answer is (B) and not (A).|I'd say B.|本题选B|B选项|(b) cat|b: cat|“B”|«B»|#B
        |cat|Cat.|The cat|It is a cat.|The answer is a cat|The answer is A cat|A cat|I see a cat""",
    "A": "a|A dog|A dog.|I think it is A|The answer is A because it barks|the answer is a|A: dog|Dog",
    "C": "red car|It is the red car.",
    "D": "dark red car|It is a dark red car",
    "": """|A or B|A and B|A, B|A/B|(A) or (B)|选A或B|A、B|Both A and B|The answer is A or B|The answer is A, B.
        |A. dog or B. cat|1|second
        |B\nThe answer is A.|A\nB|B (dog)|(A)(B)|A/B/C/D|A and/or B|It could be A or C|I'm not sure, maybe B|Not A
        |The answer is A. Wait, the answer is B.|The answer is not B|It is not a cat|不是B|答案不是B|Neither A nor B|E
        |dog and cat|a catalogue|None of the above|I don't know|Sorry, I can't help with images of people.|!|?""",
}


@pytest.mark.parametrize("letter", CHOSEN)
def test_letters_and_texts_are_read_and_ambiguous_answers_are_not(letter: str) -> None:
    texts = [text.strip() for text in CHOSEN[letter].split("|")]
    assert {text: parse_option(text, ANIMALS) for text in texts} == dict.fromkeys(texts, letter or None)


def test_all_options_in_a_row_choose_none() -> None:
    assert parse_option("A. dog\nB. cat\nC. red car\nD. dark red car", ANIMALS) is None
    assert parse_option("A. dog\nB. cat\nC. red car\nD. dark red car\nThe answer is C.", ANIMALS) == "C"


def test_option_texts_that_look_like_answers() -> None:
    numbers = {"A": "5", "B": "-5", "C": "1.5", "D": "$5"}
    assert [parse_option(text, numbers) for text in ("It is 5.", "x = -5", "about 1.5", "$5", "0.5")] == [*"ABCD", None]
    vitamins = {"A": "Vitamin A", "B": "Vitamin C", "C": "Both A and B"}
    texts = ("The answer is Vitamin C", "It is vitamin a", "Both A and B", "C. Both A and B.")
    assert [parse_option(text, vitamins) for text in texts] == ["B", "A", "C", "C"]
    answers = {"A": "yes", "B": "no"}
    texts = ("No, it is not.", "No, there isn't", "Yes, it is", "yes and no", "maybe")
    assert [parse_option(text, answers) for text in texts] == ["B", "B", "A", None, None]
    chinese = {"A": "狗", "B": "猫", "C": "红色汽车"}
    assert [parse_option(text, chinese) for text in ("图中是一只猫。", "答案是猫", "狗和猫", "不是猫")] == [
        "B",
        "B",
        None,
        None,
    ]


TEXTS = (
    *(
        "cat",
        "both B and C",
        "not a dog",
        "no",
        "yes",
        "None of the above",
        "5",
        "-5",
        "15",
        "$5",
        "x = 3, y = 4",
        "I am",
    ),
    *(
        "The letter A is red",
        "It is not option A.",
        "A. Lincoln",
        "the U.S.A.",
        "dark red car",
        "red car",
        "猫",
        "狗或猫",
    ),
    *(
        "Does A's board slide in less time with wax or without?",
        "B-52",
        "wrong",
        "can't tell",
        "answer",
        "left or right",
    ),
)


@settings(deadline=None)
@given(st.lists(st.sampled_from(TEXTS), min_size=2, max_size=5, unique=True), st.data())
def test_every_form_of_a_letter_is_read_whatever_the_options_say(texts: list[str], data: st.DataObject) -> None:
    options = dict(zip("ABCDE", texts))
    letter = data.draw(st.sampled_from(sorted(options)))
    for form in set(REWORDINGS) - {"thinking"}:  # which `final_answer` removes before
        assert parse_option(reword(form, letter, options[letter]), options) == letter, form


@settings(deadline=None)
@given(st.text(alphabet="ABCDabcd .,:()[]{}*$\\\n是选或答案notraweis", max_size=40))
def test_any_text_chooses_an_option_or_none(text: str) -> None:
    found = parse_option(text, ANIMALS)
    assert found is None or found in ANIMALS
    assert found is None or re.search(r"[A-Da-d]|dog|cat|car", text)


def test_a_question_without_its_last_rounds_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.tsv").write_text("index\tquestion\tA\tB\tanswer\n1\tQ\tx\ty\tA\n2\tQ\tx\ty\tB\n", encoding="utf-8")
    rounds = [(1, 0, "A"), (2, 0, "B"), (1, 1, "B"), (2, 1, "A")]
    rows = [
        {"question_id": index, "round_id": turn, "text": text, "options": ["y", "x"][:: -1 if not turn else 1],
         "option_char": ["B", "A"][:: -1 if not turn else 1]}
        for index, turn, text in rounds
    ]  # fmt: skip
    flags = ["--annotation-file", str(tmp_path / "t.tsv"), "--result-file"]
    assert eval_mmbench.main([*flags, str(write_jsonl(tmp_path / "a.jsonl", rows))]) == 0
    assert "Circular accuracy: 100.00%" in capsys.readouterr().out
    assert eval_mmbench.main([*flags, str(write_jsonl(tmp_path / "a.jsonl", rows[:-1]))]) == 2
    assert "1 answer(s) missing" in (error := capsys.readouterr().err) and json.dumps(2) in error
