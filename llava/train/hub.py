"""Uploads to the Hugging Face hub during training: `--push_to_hub`, with the flags of transformers.

Global rank 0 uploads in the background. A failed upload is a warning: it never stops a run, and the next save or the
end of the run tries again.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
import time
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, Final

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils.tqdm import disable_progress_bars
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import HubStrategy

from llava.arguments import TrainingArguments
from llava.errors import ConfigError, one_line
from llava.model.saving import SIDE_FILES
from llava.placement import offline
from llava.train.model_card import card_text
from llava.train.run_metadata import CARD_FILE

logger = logging.getLogger(__name__)
STAGING: Final = ".hub"  # in the output directory: what is being uploaded
MODEL_FILES: Final = (
    *SIDE_FILES,
    *("model*.safetensors", "model.safetensors.index.json", "pytorch_model*", "mm_projector.*"),
    *("adapter_*", "non_lora_trainables.*"),
)
# Nothing else of the output directory: training_args.bin is a pickle, samples.jsonl holds validation records.
RUN_FILES: Final = (CARD_FILE, "loss.png", "run.json", "log.jsonl", "trainer_state.json", "runs/*", "eval/*/score.json")
PROGRESS_SECONDS: Final = 60.0


def open_repository(args: TrainingArguments) -> HubUploader | None:
    """The uploader of a run with `--push_to_hub` on global rank 0, else None.

    Creates the repository if there is none. Raises `ConfigError` unless the token can write to it.
    """
    if not args.push_to_hub or args.process_index:
        return None
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    if offline():
        raise ConfigError(
            f"--push_to_hub cannot upload to {name} in offline mode; unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE, or "
            "drop the flag and upload after the run with `huggingface-cli upload`."
        )
    api = HfApi()
    try:
        name = api.create_repo(name, private=args.hub_private_repo or None, exist_ok=True).repo_id
        # The hub answers for a repository that exists whoever asks, but takes a file only with the right to write.
        api.preupload_lfs_files(name, [CommitOperationAdd(CARD_FILE, b"write access")])
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ConfigError(
            f"--push_to_hub cannot write to {name}: {_describe(error)}. Set HF_TOKEN to a token with write access, or "
            "run `huggingface-cli login`."
        ) from error
    logger.info("Uploading to %s/%s: %s.", api.endpoint, name, args.hub_strategy.value.replace("_", " "))
    return HubUploader(api, name, args)


class HubUploader(TrainerCallback):
    """Uploads saved models to the repository `name`, one at a time.

    `--hub_strategy` as in transformers: `every_save` uploads the model of each save, `checkpoint` the whole checkpoint,
    too, as `last-checkpoint`, `all_checkpoints` each under its own name, and `end` the final model only. A save during
    an upload is skipped without `--hub_always_push`.
    """

    def __init__(self, api: HfApi, name: str, args: TrainingArguments):
        self.api, self.name = api, name
        self.output_dir = Path(args.output_dir)
        self.strategy, self.always = HubStrategy(args.hub_strategy), args.hub_always_push
        self._running: Future[bool] | None = None
        self._saved = self._uploaded = 0  # step of the last checkpoint
        shutil.rmtree(self.output_dir / STAGING, ignore_errors=True)  # of a run that was killed

    @property
    def whole(self) -> bool:
        """Whether whole checkpoints are uploaded, with the states to resume from."""
        return self.strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: object) -> None:
        if self.strategy is HubStrategy.END:
            return
        self._saved = state.global_step
        if self._running is not None and not self._running.done() and not self.always:
            logger.info("The last upload still runs; step %d is not uploaded.", self._saved)
        elif self._stage(self._saved):
            self._running = self.api.run_as_future(self._upload_checkpoint, self._saved)

    def _stage(self, step: int) -> bool:
        """Link what to upload of a checkpoint into a folder of its own, because runs delete checkpoints."""
        checkpoint, folder = self.output_dir / f"checkpoint-{step}", self.output_dir / STAGING / f"step-{step}"
        files = {file: file.name for pattern in MODEL_FILES for file in checkpoint.glob(pattern)}
        try:
            for file, name in files.items():
                _link(file, folder / name)
            if self.whole:
                name = "last-checkpoint" if self.strategy is HubStrategy.CHECKPOINT else checkpoint.name
                for file in checkpoint.rglob("*"):
                    if file.is_file() and file.name != "training_args.bin":
                        _link(file, folder / name / file.relative_to(checkpoint))
            (folder / CARD_FILE).write_text(card_text(self.output_dir, self.name), encoding="utf-8")
        except Exception as error:  # neither is that of a disk
            logger.warning("Step %d cannot be prepared for its upload: %s", step, _describe(error))
            return False
        return True

    def _upload_checkpoint(self, step: int) -> bool:
        folder = self.output_dir / STAGING / f"step-{step}"
        stale = "last-checkpoint/*" if self.strategy is HubStrategy.CHECKPOINT else None
        done = self._upload(folder, f"Training in progress, step {step}", delete_patterns=stale)
        self._uploaded = step if done else self._uploaded
        shutil.rmtree(folder, ignore_errors=True)
        return done

    def _upload(self, folder: Path, message: str, **patterns: Any) -> bool:
        try:
            self.api.upload_folder(repo_id=self.name, folder_path=folder, commit_message=message, **patterns)
        except Exception as error:  # no failure of the hub is worth a run
            logger.warning("%s: the upload to %s failed: %s", message, self.name, _describe(error))
            return False
        logger.info("%s: uploaded to %s/%s.", message, self.api.endpoint, self.name)
        return True

    def finish(self) -> None:
        """Wait for the running upload, then upload the result; if that fails, log the command that does it."""
        if not sys.stderr.isatty():  # transformers turns the bars on again after training
            disable_progress_bars()
        started = time.monotonic()
        while self._running is not None and not self._running.done():
            logger.info("Waiting for the upload of step %d (%.0f s).", self._saved, time.monotonic() - started)
            wait([self._running], PROGRESS_SECONDS)
        if self.whole and self._uploaded != self._saved and (self.output_dir / f"checkpoint-{self._saved}").is_dir():
            self._stage(self._saved)
            self._upload_checkpoint(self._saved)
        if not self._upload(self.output_dir, "End of training", allow_patterns=[*MODEL_FILES, *RUN_FILES]):
            command = ["huggingface-cli", "upload", self.name, str(self.output_dir), ".", "--include"]
            logger.warning(
                "%s is complete and not uploaded. To upload it: %s",
                *(self.output_dir, shlex.join([*command, *MODEL_FILES, *RUN_FILES])),
            )
        shutil.rmtree(self.output_dir / STAGING, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it on file systems without hard links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error, 300)}"
