"""The published FlashAttention patch, kept as a no-op: attention is chosen with `--attn_implementation`."""

from __future__ import annotations

import functools
import logging

logger = logging.getLogger(__name__)


@functools.cache
def replace_llama_attn_with_flash_attn() -> None:
    """Log a warning once; nothing is patched."""
    logger.warning(
        "replace_llama_attn_with_flash_attn has no effect: models use FlashAttention-2 where it is available "
        "(--attn_implementation auto)."
    )
