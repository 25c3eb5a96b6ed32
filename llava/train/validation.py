"""A validation set: its own file or a share of the data, its loss, and answers to look at (users.md VAL-1)."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, cast

import torch
import transformers
from torch.utils.data import Dataset
from transformers.trainer_utils import IntervalStrategy

from llava.arguments import DataArguments, TrainingArguments
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation
from llava.data.dataset import LazySupervisedDataset, Merge
from llava.errors import DataError

logger = logging.getLogger(__name__)
NEW_TOKENS: Final = 64
FILE: Final = "samples.jsonl"


class Share(Dataset[dict[str, torch.Tensor]]):
    """Some items of a data set, by their places in it."""

    def __init__(self, whole: Any, places: Sequence[int]):
        self.whole, self.places = whole, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return cast("dict[str, torch.Tensor]", self.whole[self.places[index]])

    @property
    def lengths(self) -> list[int]:
        return [self.whole.lengths[place] for place in self.places]

    @property
    def modality_lengths(self) -> list[int]:
        return [self.whole.modality_lengths[place] for place in self.places]

    def original(self, index: int) -> int:
        """The place of an item in the whole data set."""
        return self.places[index]

    def check(self, *, wait: bool = False) -> bool:
        return bool(self.whole.check(wait=wait))

    def report(self, merge: Merge = torch.Tensor.long) -> dict[str, int]:
        """That of the whole data set."""
        return cast("dict[str, int]", self.whole.report(merge))


def split(whole: Any, fraction: float, seed: int) -> tuple[Share, Share]:
    """The data without a random share, and that share, both in their order; the same on every rank and in a resume.

    A record that is held out is not trained on in another of its repeats either.
    """
    count = max(1, round(fraction * len(whole)))
    drawn = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed)).tolist()
    record_of = getattr(whole, "record_of", int)
    held_out = {record_of(place): place for place in drawn[:count]}
    rest = [place for place in drawn[count:] if record_of(place) not in held_out]
    if not rest:
        raise DataError(f"--validation_fraction {fraction} of {len(whole)} records leaves none to train on.")
    return Share(whole, sorted(rest)), Share(whole, sorted(held_out.values()))


def add(
    module: dict[str, Any], tokenizer: Any, data_args: DataArguments, args: TrainingArguments, template: Conversation
) -> None:
    """Put the validation set into what `make_supervised_data_module` made, and have it used at every save."""
    if data_args.eval_data_path:
        module["eval_dataset"] = LazySupervisedDataset(data_args.eval_data_path, tokenizer, data_args, template)
    elif data_args.validation_fraction:
        module["train_dataset"], module["eval_dataset"] = split(
            module["train_dataset"], data_args.validation_fraction, args.seed
        )
    else:
        return
    if args.evaluation_strategy == IntervalStrategy.NO:
        args.evaluation_strategy, args.eval_steps, args.do_eval = args.save_strategy, args.save_steps, True
    args.metric_for_best_model, args.greater_is_better = "loss", False
    if args.save_total_limit == 1:
        args.save_total_limit = 2  # the best and the newest
    logger.info("%d records are held out for validation.", len(module["eval_dataset"]))


def note_best(state: Any, metrics: dict[str, float] | None, checkpoint: Path) -> None:
    """Remember the checkpoint with the lowest validation loss; rotation spares it."""
    if state.best_model_checkpoint:  # the folder of a run may have been moved since
        state.best_model_checkpoint = str(checkpoint.with_name(Path(state.best_model_checkpoint).name))
    loss = (metrics or {}).get("eval_loss")
    if loss is not None and (state.best_metric is None or loss < state.best_metric):
        state.best_metric, state.best_model_checkpoint = loss, str(checkpoint)


def open_end(item: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids before the last supervised run of an item, and the ids of that run: the question, and the answer expected."""
    ids, learned = item["input_ids"], item["labels"] != IGNORE_INDEX
    places = learned.nonzero().flatten()
    if not len(places):
        return ids, ids[:0]
    last = int(places[-1])
    before = (~learned[:last]).nonzero().flatten()
    start = int(before[-1]) + 1 if len(before) else 0
    return ids[:start], ids[start : last + 1]


class Answers(transformers.TrainerCallback):
    """After every evaluation, greedy answers to the first records of the validation set, in `samples.jsonl`.

    All ranks generate (ZeRO-3 gathers each layer for it), global rank 0 writes.
    """

    def __init__(self, trainer: Any, count: int):
        self.trainer, self.count = trainer, count

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rarely = args.evaluation_strategy == IntervalStrategy.STEPS and state.eval_steps > state.max_steps
        if rarely and state.is_world_process_zero:
            logger.warning(
                "The run has %d steps and is validated every %d, so never: give a smaller --save_steps, or "
                "--save_strategy epoch.",
                *(state.max_steps, state.eval_steps),
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        lines = []
        for index in range(min(self.count, len(self.trainer.eval_dataset))):
            question, expected = open_end(self.trainer.eval_dataset[index])
            if len(question):
                lines.append({"step": state.global_step, "record": index, **self._answer(index, question, expected)})
        if state.is_world_process_zero:
            with (Path(args.output_dir) / FILE).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def _answer(self, index: int, question: torch.Tensor, expected: torch.Tensor) -> dict[str, str]:
        trainer, tokenizer = self.trainer, self.trainer.tokenizer
        inputs: dict[str, Any] = {"input_ids": question[None], "attention_mask": torch.ones_like(question[None])}
        image = trainer.eval_dataset[index].get("image")
        if image is not None and bool((question == IMAGE_TOKEN_INDEX).any()):
            inputs["images"] = image if image.ndim == 4 else image[None]
        settings = transformers.GenerationConfig(
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id or 0,
            bos_token_id=tokenizer.bos_token_id,
        )
        model = trainer.model.eval()
        with torch.no_grad(), trainer.compute_loss_context_manager():
            made = model.generate(
                **trainer._prepare_inputs(inputs),
                generation_config=settings,
                use_cache=True,
                synced_gpus=bool(trainer.is_deepspeed_enabled),
            )
        texts = {
            "prompt": question[question != IMAGE_TOKEN_INDEX],
            "expected": expected,
            "answer": made[0, len(question) :],
        }
        return {
            name: tokenizer.decode(ids, skip_special_tokens=name != "prompt").strip() for name, ids in texts.items()
        }
