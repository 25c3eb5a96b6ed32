"""Upgrade of the configuration of old checkpoints."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from llava.files import write_text
from llava.model.checkpoint import read_json

logger = logging.getLogger(__name__)


def auto_upgrade(config: str | os.PathLike[str]) -> None:
    """Rewrite the `config.json` of a LLaVA checkpoint saved as `llama` or `llava`, so that `AutoModel` finds the class.

    `config` is the checkpoint's directory. Other directories are left unchanged.
    """
    file = Path(config) / "config.json"
    settings = read_json(file)
    if "mm_vision_tower" not in settings or settings.get("model_type") not in ("llama", "llava"):
        return
    logger.warning("%s: model_type %r becomes 'llava_llama'", file, settings["model_type"])
    settings.update(model_type="llava_llama", architectures=["LlavaLlamaForCausalLM"])
    write_text(file, json.dumps(settings, indent=2) + "\n")
