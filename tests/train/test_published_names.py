"""Names that forks import from `llava.train`: each imports from the published module and has its published meaning."""

from __future__ import annotations

import importlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import LlamaTokenizer

from llava import conversation
from llava.conversation import conv_templates
from llava.errors import TemplateError
from llava.model.builder import load_pretrained_model
from llava.train import train as published
from llava.train.llama_flash_attn_monkey_patch import replace_llama_attn_with_flash_attn
from llava.train.llava_trainer import LLaVATrainer
from tests.train import runs

Dirs = dict[str, Path]
NAMES = {
    "llava.train.train": """train ModelArguments DataArguments TrainingArguments LazySupervisedDataset
        DataCollatorForSupervisedDataset preprocess preprocess_multimodal preprocess_v1 preprocess_plain
        preprocess_llama_2 make_supervised_data_module safe_save_model_for_hf_trainer find_all_linear_names
        smart_tokenizer_and_embedding_resize get_mm_adapter_state_maybe_zero_3 get_peft_state_maybe_zero_3
        get_peft_state_non_lora_maybe_zero_3 maybe_zero_3 rank0_print""",
    "llava.train.llava_trainer": """LLaVATrainer LengthGroupedSampler split_to_even_chunks get_length_grouped_indices
        get_modality_length_grouped_indices""",
    "llava.train.llama_flash_attn_monkey_patch": "replace_llama_attn_with_flash_attn",
}
CHAT = [
    {"from": "human", "value": "<image>\nWhat is this?"},
    {"from": "gpt", "value": "A cat."},
    {"from": "human", "value": "Color?"},
    {"from": "gpt", "value": "Black."},
]


@pytest.fixture
def tokenizer(tiny_dirs: Dirs) -> Any:
    loaded = LlamaTokenizer.from_pretrained(tiny_dirs["base"], legacy=False, padding_side="right")
    loaded.pad_token = loaded.unk_token
    return loaded


@pytest.fixture
def model(tiny_dirs: Dirs) -> Any:
    return load_pretrained_model(tiny_dirs["chat"], device="cpu")[1]


@pytest.mark.parametrize("module", NAMES)
def test_every_name_imports_from_its_module(module: str) -> None:
    loaded = importlib.import_module(module)
    assert [name for name in NAMES[module].split() if not callable(getattr(loaded, name, None))] == []
    if hasattr(loaded, "__all__"):
        assert set(NAMES[module].split()) <= set(loaded.__all__)


def test_rank0_print_prints_on_local_rank_0_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        published.rank0_print("rank", rank)
    assert capsys.readouterr().out == "rank 0\n"


def test_preprocess_v1_supervises_the_published_positions(
    vicuna_tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both answers and their end tokens; the ids of the LLaMA vocabulary are known."""
    monkeypatch.setattr(conversation, "default_conversation", conv_templates["v1"])
    for legacy, length, last in ((False, 63, (60, 61, 62)), (True, 64, (61, 62, 63))):
        tokenizer = LlamaTokenizer(str(vicuna_tokenizer_file), legacy=legacy)
        found = published.preprocess_v1([CHAT], tokenizer, has_image=True)
        assert found["input_ids"].shape == found["labels"].shape == (1, length)
        assert found["input_ids"].dtype == found["labels"].dtype == torch.int64
        supervised = (found["labels"][0] != -100).nonzero().flatten().tolist()
        assert supervised == [47, 48, 49, 50, *last]
        assert torch.equal(found["labels"][0, supervised], found["input_ids"][0, supervised])


def test_rows_of_several_conversations_are_padded_on_the_right(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, function in (("v1", published.preprocess_v1), ("llama_2", published.preprocess_llama_2)):
        monkeypatch.setattr(conversation, "default_conversation", conv_templates[name])
        found = function([CHAT, CHAT[:2]], tokenizer, has_image=True)
        alone = published.preprocess([CHAT[:2]], tokenizer, has_image=True)
        short = len(alone["input_ids"][0])
        assert short < found["input_ids"].shape[1]
        assert torch.equal(found["input_ids"][1, :short], alone["input_ids"][0])
        assert (found["input_ids"][1, short:] == tokenizer.pad_token_id).all()
        assert torch.equal(found["labels"][1, :short], alone["labels"][0])
        assert (found["labels"][1, short:] == -100).all()


def test_preprocess_plain_keeps_image_and_caption(vicuna_tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "default_conversation", conv_templates["plain"])
    turns = [{"from": "human", "value": "Describe it. <image>"}, {"from": "gpt", "value": "a cat on a mat"}]
    found = published.preprocess_plain([turns], LlamaTokenizer(str(vicuna_tokenizer_file), legacy=False))
    assert found["input_ids"][0].tolist() == [1, -200, 263, 6635, 373, 263, 1775, 13]
    assert found["labels"][0].tolist() == [-100, -100, 263, 6635, 373, 263, 1775, 13]


def test_a_style_that_the_default_template_does_not_have_is_refused(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "default_conversation", conv_templates["plain"])
    with pytest.raises(TemplateError, match="style TWO, but conversation.default_conversation has PLAIN"):
        published.preprocess_v1([CHAT], tokenizer)


def test_states_are_copies_chosen_by_name_and_gradient(model: Any) -> None:
    model.requires_grad_(False)
    model.get_model().mm_projector.requires_grad_(True)
    named = list(model.named_parameters())
    projector = {name for name, _ in named if "mm_projector" in name}
    found = published.get_mm_adapter_state_maybe_zero_3(named, ["mm_projector"])
    assert set(found) == projector
    for name, value in found.items():
        parameter = dict(named)[name]
        assert torch.equal(value, parameter) and value.data_ptr() != parameter.data_ptr() and not value.requires_grad
    assert set(published.get_peft_state_non_lora_maybe_zero_3(named)) == projector
    everything = published.get_peft_state_non_lora_maybe_zero_3(named, require_grad_only=False)
    assert set(everything) == {name for name, _ in named}
    one = torch.ones(2)
    assert torch.equal(published.maybe_zero_3(one, ignore_status=True, name="x"), one)


def test_an_adapter_state_has_the_biases_that_were_asked_for() -> None:
    layer = "base_model.model.model.layers.0."
    names = [
        *(f"{layer}self_attn.q_proj.lora_A.default.weight", f"{layer}self_attn.q_proj.base_layer.bias"),
        *(f"{layer}self_attn.q_proj.base_layer.weight", f"{layer}norm.bias", "model.vision_tower.a.bias"),
    ]
    named = [(name, torch.nn.Parameter(torch.ones(1))) for name in names]
    for bias, count in (("none", 1), ("lora_only", 2), ("all", 3)):
        found = published.get_peft_state_maybe_zero_3(named, bias)
        assert len(found) == count and names[0] in found
    assert "model.vision_tower.a.bias" not in published.get_peft_state_maybe_zero_3(named, "all")
    assert published.get_peft_state_non_lora_maybe_zero_3(named).keys() == set(names[1:])
    with pytest.raises(NotImplementedError, match="got 'some'"):
        published.get_peft_state_maybe_zero_3(named, "some")


def test_linear_names_are_those_of_the_decoder(model: Any) -> None:
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert published.find_all_linear_names(model) == names


def test_new_tokens_are_embedded_as_the_mean(model: Any, tokenizer: Any) -> None:
    before = model.get_input_embeddings().weight.detach().clone(), model.get_output_embeddings().weight.detach().clone()
    tokens = {"pad_token": "[PAD]", "additional_special_tokens": ["<a>"]}
    published.smart_tokenizer_and_embedding_resize(special_tokens_dict=tokens, tokenizer=tokenizer, model=model)
    after = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for old, new in zip(before, after):
        assert len(new) == len(tokenizer) == len(old) + 2 and torch.equal(new[:-2], old)
        torch.testing.assert_close(new[-2:], old.mean(0, keepdim=True).expand(2, -1))
    assert tokenizer.pad_token_id == len(before[0])


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Four text samples, as of a fork's own data set."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(3, 9) + index
        return {"input_ids": ids, "labels": ids, "image": torch.zeros(3, 56, 56)}


@pytest.mark.parametrize(("stage", "file"), [(1, "mm_projector.bin"), (2, "model.safetensors")])
def test_a_fork_trains_with_the_published_parts(
    model: Any, tokenizer: Any, tmp_path: Path, stage: int, file: str
) -> None:
    model.config.tune_mm_mlp_adapter = stage == 1
    args = published.TrainingArguments(
        output_dir=str(tmp_path / "run"), use_cpu=True, max_steps=2, save_strategy="no", report_to=["none"]
    )
    collator = published.DataCollatorForSupervisedDataset(tokenizer=tokenizer)
    trainer = LLaVATrainer(model=model, tokenizer=tokenizer, args=args, train_dataset=Rows(), data_collator=collator)
    trainer.train()
    published.safe_save_model_for_hf_trainer(trainer=trainer, output_dir=str(tmp_path / "saved"))
    assert (tmp_path / "saved" / file).is_file() and (tmp_path / "saved" / "config.json").is_file()
    saved = runs.tensors(tmp_path / "saved")
    assert all("mm_projector" in name for name in saved) == (stage == 1)
    name = "model.mm_projector.0.weight"
    assert torch.equal(saved[name], model.state_dict()[name])


def test_a_data_module_has_the_published_keys(
    tiny_dirs: Dirs, small_data: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "default_conversation", conv_templates["v1"])
    data_args: Any = published.DataArguments(data_path=str(small_data / "finetune.json"))
    processor = load_pretrained_model(tiny_dirs["chat"], device="cpu")[2]
    vars(data_args).update(image_folder=str(small_data / "images"), image_processor=processor, is_multimodal=True)
    data_args.mm_use_im_start_end = False
    module = published.make_supervised_data_module(tokenizer=tokenizer, data_args=data_args)
    assert set(module) == {"train_dataset", "eval_dataset", "data_collator"} and module["eval_dataset"] is None
    dataset = published.LazySupervisedDataset(
        tokenizer=tokenizer, data_path=str(small_data / "finetune.json"), data_args=data_args
    )
    assert len(dataset) == len(module["train_dataset"]) == 32
    batch = module["data_collator"]([dataset[0], dataset[1]])
    assert set(batch) == {"input_ids", "labels", "attention_mask", "images"} and batch["images"].shape[0] == 2


def test_train_takes_an_attention_implementation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[str] = []
    monkeypatch.setattr(published, "run", lambda model_args, *_: seen.append(model_args.attn_implementation))
    argv = ["--output_dir", str(tmp_path), "--use_cpu", "True", "--data_path", "data.json"]
    monkeypatch.setattr("sys.argv", ["train_mem.py", *argv])
    published.train()
    published.train(attn_implementation="eager")
    published.train([*argv, "--attn_implementation", "sdpa"], attn_implementation="eager")
    assert seen == ["auto", "eager", "sdpa"]


def test_the_flash_attention_patch_warns_once_and_patches_nothing(caplog: pytest.LogCaptureFixture) -> None:
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama.LlamaAttention))
    replace_llama_attn_with_flash_attn.cache_clear()
    with caplog.at_level(logging.WARNING):
        replace_llama_attn_with_flash_attn()
        replace_llama_attn_with_flash_attn()
    assert caplog.text.count("--attn_implementation") == 1
    assert dict(vars(modeling_llama.LlamaAttention)) == before


def test_a_loss_and_a_freeze_policy_are_one_registry_line(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava.errors import ConfigError
    from llava.train import model_setup

    shapes: list[tuple[int, ...]] = []

    def doubled(logits: torch.Tensor, targets: torch.Tensor, tokens: object) -> torch.Tensor:
        shapes.append((*logits.shape, len(targets)))
        return 2 * torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    def head_only(model: Any, model_args: object, training_args: object) -> None:
        model.requires_grad_(False)
        model.get_output_embeddings().requires_grad_(True)

    monkeypatch.setitem(model_setup.LOSSES, "doubled", doubled)
    monkeypatch.setitem(model_setup.FREEZE_POLICIES, "head_only", head_only)
    argv = runs.flags(tiny_dirs, small_data, tmp_path / "plain", 2, max_steps=2, learning_rate=0)
    published.train(argv)
    losses = runs.losses(tmp_path / "plain")
    argv = runs.flags(tiny_dirs, small_data, tmp_path / "own", 2, max_steps=2, freeze_policy="head_only")
    published.train([*argv, "--learning_rate", "0", "--loss", "doubled"])
    assert runs.losses(tmp_path / "own") == pytest.approx(
        [2 * loss for loss in runs.losses(tmp_path / "plain")], abs=1e-3
    )
    assert all(vocabulary == 384 and rows == targets > 0 for rows, vocabulary, targets in shapes)
    published.train(argv)
    before, after = runs.tensors(tmp_path / "plain"), runs.tensors(tmp_path / "own")
    assert {name for name in after if not torch.equal(after[name], before[name])} == {"lm_head.weight"}
    more = {"label_smoothing_factor": 0.5, "z_loss": 0.1, "validation_fraction": 0.2, "evaluation_strategy": "steps"}
    smoothed = runs.flags(tiny_dirs, small_data, tmp_path / "smoothed", 2, max_steps=2, eval_steps=2, **more)
    published.train(smoothed)
    logged = [json.loads(line) for line in (tmp_path / "smoothed" / "log.jsonl").read_text().splitlines()]
    terms = [value for line in logged for name, value in line.items() if name in ("loss", "eval_loss")]
    assert len(terms) > 2 and min(terms) > max(losses) + 1  # the squared log-partition function of 384 words is 35
    with pytest.raises(ConfigError, match="belong to --loss cross_entropy, got --loss doubled"):
        published.train([*smoothed, "--loss", "doubled"])
    for flag in ("--loss", "--freeze_policy"):
        with pytest.raises(ConfigError, match=rf"{flag} must be one of .*, got 'unknown'"):
            published.train([*argv, flag, "unknown"])
