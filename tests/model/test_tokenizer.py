"""Tokenizer files as newer libraries write them: the same ids, or one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaTokenizerFast, PreTrainedTokenizerFast

from llava.errors import CheckpointError
from llava.model.tokenizer import load_tokenizer
from tests import tiny

TEXTS = ["The shape is red.", "  two  spaces\n", "<|im_start|>user\nWhy?<|im_end|>", "Ünï 12345", ""]
TOKENS = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
Data = dict[str, Any]


def edit(file: Path, change: Callable[[Data], object]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def pairs(data: Data) -> None:
    data["model"]["merges"] = [merge.split(" ") for merge in data["model"]["merges"]]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A byte-level BPE in the form of transformers 4.36."""
    tiny.make_mpt_tokenizer(tmp_path / "old")
    return tmp_path / "old"


@pytest.fixture
def new(old: Path, tmp_path: Path) -> Path:
    """The same tokenizer as transformers 5 writes it: two files."""
    directory = tmp_path / "new"
    directory.mkdir()
    shutil.copy(old / "tokenizer.json", directory)
    edit(directory / "tokenizer.json", pairs)
    settings = {
        **TOKENS, "tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "is_local": True,
        "extra_special_tokens": ["<|im_start|>", "<|im_end|>"], "model_max_length": 2048, "padding_side": "right",
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def test_files_of_transformers_5_give_the_same_ids(old: Path, new: Path, tmp_path: Path) -> None:
    expected, found = load_tokenizer(old), load_tokenizer(new, padding_side="left")
    assert [found(text).input_ids for text in TEXTS] == [expected(text).input_ids for text in TEXTS]
    assert found.additional_special_tokens == ["<|im_start|>", "<|im_end|>"]
    assert (found.eos_token, found.model_max_length, found.padding_side) == ("<|endoftext|>", 2048, "left")
    assert found.name_or_path == str(new)
    found.save_pretrained(tmp_path / "saved")
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert [again(text).input_ids for text in TEXTS] == [expected(text).input_ids for text in TEXTS]


@pytest.mark.parametrize("named", ["GPT2Tokenizer", "GPTNeoXTokenizer", "GPT2TokenizerFast", None])
def test_pairs_under_any_class(old: Path, new: Path, named: str | None) -> None:
    edit(new / "tokenizer_config.json", lambda data: data.update(tokenizer_class=named))
    expected, found = load_tokenizer(old), load_tokenizer(new)
    assert [found(text).input_ids for text in TEXTS] == [expected(text).input_ids for text in TEXTS]


def test_a_llama_tokenizer_without_its_sentencepiece_file(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    LlamaTokenizerFast.from_pretrained(tiny_dirs["base"], legacy=False).save_pretrained(tmp_path / "both")
    (tmp_path / "both" / "tokenizer.model").unlink()
    edit(tmp_path / "both" / "tokenizer_config.json", lambda data: data.update(tokenizer_class="LlamaTokenizer"))
    expected, found = load_tokenizer(tiny_dirs["base"]), load_tokenizer(tmp_path / "both")
    for text in ("The shape is red.", "Why?"):
        assert found(text).input_ids == expected(text).input_ids


def test_a_sentencepiece_file_is_read_beside_new_settings(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(tiny_dirs["base"], tmp_path / "base")
    edit(base / "tokenizer_config.json", lambda data: data.update(is_local=False, extra_special_tokens=["<x>"]))
    (base / "tokenizer.json").write_text("of a newer library, and not read")
    expected, found = load_tokenizer(tiny_dirs["base"]), load_tokenizer(base)
    assert found("The shape is red.").input_ids == expected("The shape is red.").input_ids
    assert found.convert_tokens_to_ids("<x>") == len(expected)
    found.save_pretrained(tmp_path / "saved")
    written = (tmp_path / "saved" / "tokenizer.model").read_bytes()
    assert written == (tiny_dirs["base"] / "tokenizer.model").read_bytes()


def test_a_chat_template_in_its_own_file_is_kept(new: Path, old: Path, tmp_path: Path) -> None:
    for directory in (new, old):
        (directory / "chat_template.jinja").write_text("{{ messages }}")
        load_tokenizer(directory).save_pretrained(tmp_path / "saved")
        assert (
            json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"
        )


def test_merges_that_are_all_reachable_need_no_ignore_merges(old: Path, new: Path) -> None:
    edit(new / "tokenizer.json", lambda data: data["model"].update(ignore_merges=True))
    expected, found = load_tokenizer(old), load_tokenizer(new)
    assert [found(text).input_ids for text in TEXTS] == [expected(text).input_ids for text in TEXTS]


def unreachable(data: Data) -> None:
    """An entry that no merge makes, as in Llama 3."""
    data["model"]["vocab"]["zzzz"] = 380
    data["model"]["ignore_merges"] = True


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (unreachable, "ignore_merges"),
        (lambda data: data["model"].update(merges=[["a b", "c"]]), "contain spaces"),
        (lambda data: data.update(pre_tokenizer=METASPACE), "does not split"),
        (lambda data: data.update(pre_tokenizer={"type": "OfTomorrow"}), "did not match"),
    ],
)  # fmt: skip
def test_what_the_pinned_library_computes_otherwise_is_refused(
    new: Path, change: Callable[[Data], object], reason: str
) -> None:
    edit(new / "tokenizer.json", change)
    with pytest.raises(
        CheckpointError, match=f"is in a newer form.*{reason}.*use the tokenizer files of the model"
    ) as e:
        load_tokenizer(new)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("named", ["SentencePieceBackend", "PythonBackend", "MistralCommonBackend"])
def test_a_class_of_transformers_5_without_a_counterpart_is_named(new: Path, named: str) -> None:
    edit(new / "tokenizer_config.json", lambda data: data.update(tokenizer_class=named))
    with pytest.raises(CheckpointError, match=f"is in a newer form .tokenizer_class {named}"):
        load_tokenizer(new)


def test_damage_is_still_called_damage(old: Path) -> None:
    (old / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be loaded: .*download the tokenizer files again"):
        load_tokenizer(old)
