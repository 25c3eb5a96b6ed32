"""Prompt ids, model names and stopping criteria: the published values, without the published defects."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import LlamaTokenizer

from llava.errors import ImageError
from llava.mm_utils import (
    KeywordsStoppingCriteria,
    get_model_name_from_path,
    load_image_from_base64,
    tokenizer_image_token,
)
from tests.data import zoo


def cases(golden_dir: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((golden_dir / "prompts" / f"{name}.json").read_text())["cases"]  # type: ignore[no-any-return]


@pytest.mark.golden
@pytest.mark.parametrize("legacy", [True, False])
def test_golden_tokens(golden_dir: Path, vicuna_tokenizer_file: Path, legacy: bool) -> None:
    tokenizer = LlamaTokenizer(str(vicuna_tokenizer_file), legacy=legacy)
    checked = 0
    for case in cases(golden_dir, "tokens"):
        if case["legacy"] is legacy:
            index = {key: case[key] for key in ("image_token_index",) if key in case}
            assert tokenizer_image_token(case["prompt"], tokenizer, **index) == case["ids"]
            tensor = tokenizer_image_token(case["prompt"], tokenizer, return_tensors="pt", **index)
            assert (tensor.tolist(), tensor.dtype) == (case["ids"], torch.int64)
            checked += 1
    assert checked == 24


@pytest.mark.parametrize("name", sorted(zoo.MAKERS))
@pytest.mark.parametrize("prompt", ["<image>", "", "<image>\nhi", "<|im_start|>user\n<image>x<image><image>yes", "a"])
def test_bos_comes_first_if_and_only_if_the_tokenizer_adds_one(name: str, prompt: str) -> None:
    tokenizer = zoo.make(name)
    ids = tokenizer_image_token(prompt, tokenizer)
    pieces = [
        tokenizer(piece, add_special_tokens=False).input_ids if piece else [] for piece in prompt.split("<image>")
    ]
    body = pieces[0] + [token for piece in pieces[1:] for token in [-200, *piece]]
    bos = [tokenizer.bos_token_id] if name in ("llama-legacy", "llama-new", "llama-fast", "llama3-like") else []
    assert ids == bos + body
    assert None not in ids


def test_other_tensor_types_are_rejected() -> None:
    with pytest.raises(ValueError, match="must be 'pt' for a tensor"):
        tokenizer_image_token("a", zoo.make("llama-new"), return_tensors="np")  # type: ignore[call-overload]


@pytest.mark.golden
def test_golden_names(golden_dir: Path) -> None:
    for case in cases(golden_dir, "names"):
        assert get_model_name_from_path(case["path"]) == case.get("name", case.get("intended"))


@pytest.mark.parametrize(
    ("path", "name"),
    [("checkpoint-5", "checkpoint-5"), ("/checkpoint-5/", "checkpoint-5"), ("run/checkpoint-5", "run_checkpoint-5")],
)
def test_names(path: str, name: str) -> None:
    assert get_model_name_from_path(path) == name


# ------------------------------------------------------------------ stopping


@pytest.mark.golden
@pytest.mark.parametrize("legacy", [True, False])
def test_golden_stopping(golden_dir: Path, vicuna_tokenizer_file: Path, legacy: bool) -> None:
    tokenizer = LlamaTokenizer(str(vicuna_tokenizer_file), legacy=legacy)
    for case in cases(golden_dir, "stopping"):
        if case["legacy"] is legacy:
            prompt, wanted = case["prompt_ids"], case.get("intended", case["decisions"])
            stop = KeywordsStoppingCriteria(case["keywords"], tokenizer, torch.tensor([prompt]))
            steps = [torch.tensor([prompt + case["generated_ids"][: n + 1]]) for n in range(len(wanted))]
            assert [stop(step, None) for step in steps] == wanted, case["id"]


def encode(text: str) -> list[int]:
    return zoo.make("llama-new")(text, add_special_tokens=False).input_ids  # type: ignore[no-any-return]


@settings(deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=5), st.sampled_from(["###", "</s>", "STOP"]))
def test_a_batch_stops_when_its_last_row_stops(places: list[int], keyword: str) -> None:
    tokenizer = zoo.make("llama-new")
    rows = [encode("a " * place)[:place] + encode(f" {keyword}") + encode("b " * 40) for place in places]
    rows = [row[:30] for row in rows]
    single = []
    for row in rows:
        alone = KeywordsStoppingCriteria([keyword], tokenizer, torch.tensor([[1, -200]]))
        single.append(next(n for n in range(31) if alone(torch.tensor([[1, -200, *row[:n]]]), None)))
    batch = KeywordsStoppingCriteria([keyword], tokenizer, torch.tensor([[1, -200]] * len(rows)))
    for n in range(31):
        assert batch(torch.tensor([[1, -200, *row[:n]] for row in rows]), None) is (n >= max(single))


def test_no_keyword_no_token_and_longer_keywords_do_not_raise() -> None:
    tokenizer = zoo.make("llama-new")
    prompt = torch.tensor([[1, *encode("###"), -200]])
    stop = KeywordsStoppingCriteria([None, "", "###", "a very long keyword, longer than the text"], tokenizer, prompt)
    assert stop(prompt, None) is False
    assert stop(torch.cat([prompt, torch.tensor([encode("x")])], 1), None) is False
    assert KeywordsStoppingCriteria([None], tokenizer, prompt)(torch.tensor([[1, -200, 5, 2]]), None) is False


def test_a_row_that_stopped_stays_stopped() -> None:
    tokenizer = zoo.make("llama-new")
    stop = KeywordsStoppingCriteria(["</s>"], tokenizer, torch.tensor([[1], [1]]))
    assert stop(torch.tensor([[1, 2], [1, 9]]), None) is False
    assert stop(torch.tensor([[1, 0, 0], [1, 9, 2]]), None) is True


# ------------------------------------------------------------------ base64


def test_load_image_from_base64() -> None:
    buffer = io.BytesIO()
    Image.new("LA", (3, 2), (7, 0)).save(buffer, "PNG")
    text = base64.encodebytes(buffer.getvalue()).decode()  # with line breaks
    image = load_image_from_base64(text)
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (3, 2), (255, 255, 255))
    for broken in ("data:image/png;base64," + text, "é", "", base64.b64encode(b"no image").decode()):
        with pytest.raises(ImageError):
            load_image_from_base64(broken)
