"""The model of both sides: a chat checkpoint with random weights, and its exports for the peers."""

from __future__ import annotations

from pathlib import Path

from benchmarks.synthetic import make_answers_differ
from llava.model.export import export
from tests.tiny import make_chat, make_clip_tower


def make_model(root: Path, quick: bool, answers: bool = False) -> tuple[Path, Path]:
    """A chat checkpoint of LLaMA and a CLIP tower, and its export; `answers` makes answers depend on the prompt."""
    if quick:
        chat = make_chat(root / "chat", make_clip_tower(root / "tower"), mm_vision_select_layer=-2, vocab_size=2000,
                         hidden_size=128, num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    else:
        tower = make_clip_tower(root / "tower", hidden_size=512, intermediate_size=2048, num_hidden_layers=12,
                                num_attention_heads=8, image_size=336)  # fmt: skip
        chat = make_chat(root / "chat", tower, vocab_size=32000, hidden_size=768, intermediate_size=2048,
                         num_hidden_layers=8, num_attention_heads=12, num_key_value_heads=12, mm_hidden_size=512,
                         mm_vision_image_size=336, mm_vision_select_layer=-2)  # fmt: skip
    if answers:
        make_answers_differ(chat)
    export(chat, root / "export")
    return chat, root / "export"
