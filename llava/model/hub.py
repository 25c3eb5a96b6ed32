"""Downloads from and uploads to the Hugging Face hub."""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from llava.errors import CheckpointError
from llava.placement import offline

logger = logging.getLogger(__name__)


def snapshot(name: str, patterns: list[str] | None = None) -> tuple[Path | None, list[str]]:
    """The local snapshot of hub repository `name`, or None, and the places searched without success.

    Searches the cache first, then the hub unless the network is disabled (`HF_HUB_OFFLINE`).
    """
    tried = []
    for place, local_only in (("the Hugging Face cache", True), ("the Hugging Face hub", False)):
        if not local_only and offline():
            tried.append(f"{place} (skipped: offline mode)")
            continue
        try:
            return Path(snapshot_download(name, local_files_only=local_only, allow_patterns=patterns)), tried
        except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError, ValueError) as error:
            logger.debug("%s: %s: %s", name, place, error)
            tried.append(place)
    return None, tried


def push_to_hub(directory: str | Path, repo_id: str) -> None:
    """Upload `directory` to the hub repository `repo_id`, creating it if needed."""
    try:
        HfApi().create_repo(repo_id, exist_ok=True)
        HfApi().upload_folder(repo_id=repo_id, folder_path=str(directory))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{directory} is written, but cannot be pushed to {repo_id}: {error}") from error
