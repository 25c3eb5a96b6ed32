"""Directories by name from the Hugging Face cache and hub, heeding offline mode."""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from llava.placement import offline

logger = logging.getLogger(__name__)


def snapshot(name: str, patterns: list[str] | None = None) -> tuple[Path | None, list[str]]:
    """The local snapshot of hub repository `name`, and the places that were asked when there is none.

    The cache is asked first; the hub only when the network is allowed (`HF_HUB_OFFLINE` opens no socket).
    """
    tried = []
    for place, local_only in (("the Hugging Face cache", True), ("the Hugging Face hub", False)):
        if not local_only and offline():
            tried.append(f"{place} (not asked: offline mode)")
            continue
        try:
            return Path(snapshot_download(name, local_files_only=local_only, allow_patterns=patterns)), tried
        except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError, ValueError) as error:
            logger.debug("%s: %s: %s", name, place, error)
            tried.append(place)
    return None, tried
