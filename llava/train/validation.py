"""Validation during training: the held-out records, generated sample answers, and the best checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, TrainerCallback, TrainerState
from transformers.trainer_utils import IntervalStrategy

from llava.arguments import DataArguments, TrainingArguments
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation
from llava.data.dataset import LazySupervisedDataset, Merge, MixtureDataset, Sizes
from llava.errors import DataError

if TYPE_CHECKING:
    from llava.train.llava_trainer import LLaVATrainer

logger = logging.getLogger(__name__)
MAX_NEW_TOKENS: Final = 64
SAMPLES_FILE: Final = "samples.jsonl"


SupervisedDataset = LazySupervisedDataset | MixtureDataset


class Subset(torch.utils.data.Subset[dict[str, Tensor]]):
    """The items of a data set at `indices`."""

    dataset: SupervisedDataset

    @property
    def lengths(self) -> list[int]:
        return [self.dataset.lengths[index] for index in self.indices]

    @property
    def modality_lengths(self) -> list[int]:
        return [self.dataset.modality_lengths[index] for index in self.indices]

    def sizes(self, indices: Sequence[int]) -> Sizes:
        return self.dataset.sizes([self.indices[index] for index in indices])

    def original(self, index: int) -> int:
        """Index of an item in the full data set."""
        return self.indices[index]

    def check(self, *, wait: bool = False) -> bool:
        return self.dataset.check(wait=wait)

    def report(self, merge: Merge = Tensor.long) -> dict[str, int]:
        """Fault counts of the full data set."""
        return self.dataset.report(merge)


def split(dataset: SupervisedDataset, fraction: float, seed: int) -> tuple[Subset, Subset]:
    """Split off a random fraction for validation: (training set, validation set), both in file order.

    The split depends on the seed alone, so all ranks and resumed runs agree. Repeats of a held-out record in a mixture
    are removed from the training set, too.
    """
    count = max(1, round(fraction * len(dataset)))
    drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    record_of = getattr(dataset, "record_of", int)
    held_out = {record_of(index): index for index in drawn[:count]}
    rest = [index for index in drawn[count:] if record_of(index) not in held_out]
    if not rest:
        raise DataError(
            f"--validation_fraction {fraction} of {len(dataset)} records leaves nothing to train on; lower it."
        )
    return Subset(dataset, sorted(rest)), Subset(dataset, sorted(held_out.values()))


def add_validation_set(
    module: dict[str, object],
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataArguments,
    args: TrainingArguments,
    template: Conversation,
) -> None:
    """Add the validation set to a data module and, unless a strategy is given, evaluate at every save."""
    if data_args.eval_data_path:
        held_out: LazySupervisedDataset | Subset
        held_out = LazySupervisedDataset(data_args.eval_data_path, tokenizer, data_args, template)
    elif data_args.validation_fraction:
        module["train_dataset"], held_out = split(
            module["train_dataset"],  # type: ignore[arg-type]
            data_args.validation_fraction,
            args.seed,
        )
    else:
        return
    module["eval_dataset"] = held_out
    if args.evaluation_strategy == IntervalStrategy.NO:
        args.evaluation_strategy, args.eval_steps, args.do_eval = args.save_strategy, args.save_steps, True
    args.metric_for_best_model, args.greater_is_better = "loss", False
    if args.save_total_limit == 1:
        args.save_total_limit = 2  # the best and the newest
    logger.info("Validation set: %d records.", len(held_out))


def track_best_checkpoint(state: TrainerState, metrics: Mapping[str, float] | None, checkpoint: Path) -> None:
    """Record the checkpoint with the lowest validation loss in the trainer state; rotation keeps it."""
    if state.best_model_checkpoint:  # the output directory may have been moved since
        state.best_model_checkpoint = str(checkpoint.with_name(Path(state.best_model_checkpoint).name))
    loss = (metrics or {}).get("eval_loss")
    if loss is not None and (state.best_metric is None or loss < state.best_metric):
        state.best_metric, state.best_model_checkpoint = loss, str(checkpoint)


def split_last_answer(item: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Ids of a record up to its last answer, and those of the answer (empty if nothing is supervised)."""
    ids, supervised = item["input_ids"], item["labels"] != IGNORE_INDEX
    positions = supervised.nonzero().flatten()
    if not len(positions):
        return ids, ids[:0]
    last = int(positions[-1])
    before = (~supervised[:last]).nonzero().flatten()
    start = int(before[-1]) + 1 if len(before) else 0
    return ids[:start], ids[start : last + 1]


class SampleGenerations(TrainerCallback):
    """Writes greedy answers to the first validation records to `samples.jsonl` after every evaluation.

    All ranks generate, because ZeRO-3 gathers each layer for it; global rank 0 writes.
    """

    def __init__(self, trainer: LLaVATrainer, count: int):
        self.trainer, self.count = trainer, count

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: object) -> None:
        by_steps = args.evaluation_strategy == IntervalStrategy.STEPS
        if by_steps and state.eval_steps > state.max_steps and state.is_world_process_zero:
            logger.warning(
                "Validation every %d steps never happens in a run of %d steps; lower --save_steps or set "
                "--save_strategy epoch.",
                state.eval_steps,
                state.max_steps,
            )

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: object) -> None:
        lines = []
        for index in range(min(self.count, len(self.trainer.eval_dataset))):
            item = self.trainer.eval_dataset[index]
            if len(split_last_answer(item)[0]):
                lines.append({"step": state.global_step, "record": index, **self._generate(item)})
        if state.is_world_process_zero:
            with (Path(args.output_dir) / SAMPLES_FILE).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def _generate(self, item: Mapping[str, Tensor]) -> dict[str, str]:
        """Prompt, expected answer and greedy answer of a record as text."""
        trainer, tokenizer = self.trainer, self.trainer.tokenizer
        prompt, expected = split_last_answer(item)
        inputs = {"input_ids": prompt[None], "attention_mask": torch.ones_like(prompt[None])}
        if "image" in item and bool((prompt == IMAGE_TOKEN_INDEX).any()):
            image = item["image"]
            inputs["images"] = image if image.ndim == 4 else image[None]
        config = GenerationConfig(
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id or 0,
            bos_token_id=tokenizer.bos_token_id,
        )
        model = trainer.model.eval()
        with torch.no_grad(), trainer.compute_loss_context_manager():
            output = model.generate(
                **trainer._prepare_inputs(inputs),
                generation_config=config,
                use_cache=True,
                synced_gpus=bool(trainer.is_deepspeed_enabled),
            )
        return {
            "prompt": tokenizer.decode(prompt[prompt != IMAGE_TOKEN_INDEX]).strip(),
            "expected": tokenizer.decode(expected, skip_special_tokens=True).strip(),
            "answer": tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip(),
        }
