"""Greedy tokens of llama.cpp on a GGUF export and ours: `python -m benchmarks.gguf_tokens CHECKPOINT --peer PYTHON`.

PYTHON is the interpreter of an environment with llama-cpp-python (built from source: CMake and a C++ compiler). The
checkpoint is exported in float32. Both decode the prompts and, for a chat model, a question about a random image of the
tower's size; llama.cpp has a float32 cache. The exit status is 1 if ids of a prompt or tokens of an answer differ.

Since May 2025 llama.cpp puts CLIP's class token behind the patches, but adds positions and drops a token as if it came
first. The image is therefore also compared with our model with that order.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

PROMPTS: Final = (
    "The capital of France is",
    "USER: What color is the shape?  Is it red\u2014or not?\n\n ASSISTANT:",
    "<|im_start|>user\nName 3 birds, 12 trees & «漢字» 🎈.<|im_end|>\n<|im_start|>assistant\n",
)
QUESTION: Final = "USER: {image}\nWhat color is the shape? ASSISTANT:"
TOKENS: Final = 32
F32: Final = 0  # GGML_TYPE_F32


class Peer:
    """llama.cpp through the low-level API of llama-cpp-python."""

    def __init__(self, model: str) -> None:
        import llama_cpp

        self.api = llama_cpp
        self.llama = llama_cpp.Llama(model, n_ctx=2048, type_k=F32, type_v=F32, n_threads=2, verbose=False)

    def decode(self, ids: list[int]) -> None:
        array = (ctypes.c_int32 * len(ids))(*ids)  # the batch points to it
        assert self.api.llama_decode(self.llama.ctx, self.api.llama_batch_get_one(array, len(ids))) == 0

    def tokens(self) -> list[int]:
        """Greedy continuation of what was evaluated."""
        found: list[int] = []
        for _ in range(TOKENS):
            logits = self.api.llama_get_logits_ith(self.llama.ctx, -1)[: self.llama.n_vocab()]
            found.append(max(range(len(logits)), key=logits.__getitem__))
            self.decode(found[-1:])
        return found

    def clear(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.llama.ctx), True)

    def answer(self, prompt: str) -> dict[str, Any]:
        self.clear()
        ids = self.llama.tokenize(prompt.encode(), add_bos=True, special=True)
        self.decode(ids)
        return {"ids": ids, "tokens": self.tokens()}

    def describe(self, projector: str, pixels: bytes, size: int) -> dict[str, Any]:
        """The image embeddings, and the answer to the question about a square RGB image."""
        from llama_cpp import mtmd_cpp as mtmd

        self.clear()
        settings = mtmd.mtmd_context_params_default()
        settings.use_gpu = settings.warmup = False
        context = mtmd.mtmd_init_from_file(projector.encode(), self.llama.model, settings)
        assert context, f"{projector} cannot be loaded"
        bitmap = mtmd.mtmd_bitmap_init(size, size, (ctypes.c_uint8 * len(pixels)).from_buffer_copy(pixels))
        text = QUESTION.format(image=mtmd.mtmd_default_marker().decode()).encode()
        chunks = mtmd.mtmd_input_chunks_init()
        given = mtmd.mtmd_input_text(text, len(text), True, True)
        bitmaps = (ctypes.c_void_p * 1)(bitmap)
        assert mtmd.mtmd_tokenize(context, chunks, ctypes.byref(given), bitmaps, 1) == 0
        image = mtmd.mtmd_input_chunks_get(chunks, 1)
        count = mtmd.mtmd_input_chunk_get_n_tokens(image)
        assert mtmd.mtmd_encode_chunk(context, image) == 0
        width = self.llama.n_embd()
        features = list(mtmd.mtmd_get_output_embd(context)[: count * width])
        past = self.api.llama_pos(0)
        done = mtmd.mtmd_helper_eval_chunks(context, self.llama.ctx, chunks, 0, 0, 512, True, ctypes.byref(past))
        assert done == 0
        return {"features": [features[k : k + width] for k in range(0, len(features), width)], "tokens": self.tokens()}


def serve(request: dict[str, Any]) -> None:
    """Answer in the environment of the peer; the reply is one line of JSON."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    peer = Peer(request["model"])
    reply: dict[str, Any] = {"answers": [peer.answer(prompt) for prompt in request["prompts"]]}
    if "projector" in request:
        reply["image"] = peer.describe(request["projector"], bytes(request["pixels"]), request["size"])
    print(json.dumps(reply), file=replies, flush=True)


def ours(checkpoint: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Our answers, and the request of the image with our answer to it (empty for a language model)."""
    import torch

    from llava.mm_utils import tokenizer_image_token
    from llava.model.builder import load_pretrained_model
    from llava.model.checkpoint import Kind, inspect

    text_only = inspect(checkpoint).kind is Kind.LANGUAGE_MODEL
    tokenizer, model, processor, _ = load_pretrained_model(
        checkpoint, device="cpu", dtype="float32", text_only=text_only
    )
    model.generation_config.update(eos_token_id=None, pad_token_id=0, do_sample=False)

    @torch.inference_mode()
    def answer(ids: list[int], **inputs: Any) -> list[int]:
        batch = torch.tensor([ids])
        out = model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            do_sample=False,
            max_new_tokens=TOKENS,
            pad_token_id=0,
            **inputs,
        )
        return list(map(int, out[0, -TOKENS:]))

    encoded = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    answers = [{"ids": ids, "tokens": answer(ids)} for ids in encoded]
    if processor is None:
        return answers, {}
    size = processor.crop_size["height"]
    image = torch.randint(0, 256, (size, size, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    pixels = processor(image.numpy(), return_tensors="pt").pixel_values
    ids = tokenizer_image_token(QUESTION.format(image="<image>"), tokenizer)
    found = {"request": {"pixels": image.flatten().tolist(), "size": size}}
    with torch.inference_mode():
        orders = {"": model.encode_images(pixels), " with the class token last": class_token_last(model, pixels)}
    for order, features in orders.items():
        model.encode_images = lambda images, features=features: features
        found[order] = {"features": features[0].tolist(), "tokens": answer(ids, images=pixels)}
    return answers, found


def class_token_last(model: Any, pixels: Any) -> Any:
    """The image embeddings that llama.cpp computes, see above."""
    import torch

    tower = model.get_vision_tower()
    vision = tower.vision_tower.vision_model
    patches = vision.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    tokens = torch.cat([patches, vision.embeddings.class_embedding.expand(1, 1, -1)], dim=1)
    x = vision.pre_layrnorm(tokens + vision.embeddings.position_embedding.weight)
    return model.get_model().mm_projector(vision.encoder(x)[:, 1:])


def equal_start(a: Sequence[object], b: Sequence[object]) -> int:
    """The number of leading elements that are equal."""
    return next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--peer", required=True, help="Python with llama-cpp-python")
    args = parser.parse_args(argv)
    from llava.model.gguf_export import export

    answers, image = ours(args.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        files, _ = export(args.checkpoint, Path(folder) / "gguf", outtype="f32")
        request = {"model": str(files[0]), "prompts": PROMPTS}
        if image:
            request |= {"projector": str(files[1]), **image.pop("request")}
        command = [args.peer, __file__, "--serve"]
        done = subprocess.run(command, input=json.dumps(request), stdout=subprocess.PIPE, text=True, check=True)
    reply = json.loads(done.stdout)
    failed = False
    for prompt, mine, theirs in zip(PROMPTS, answers, reply["answers"]):
        ids, count = mine["ids"] == theirs["ids"], equal_start(mine["tokens"], theirs["tokens"])
        failed |= not ids or count < TOKENS
        print(f"{prompt[:40]!r}: prompt ids {'equal' if ids else 'differ'}, {count} of {TOKENS} tokens equal")
    counts = []
    for order, mine in image.items():
        theirs = reply["image"]
        counts.append(equal_start(mine["tokens"], theirs["tokens"]))
        error = max(abs(x - y) for rows in zip(mine["features"], theirs["features"]) for x, y in zip(*rows))
        print(f"image{order}: {counts[-1]} of {TOKENS} tokens equal, embeddings differ by at most {error:.1e}")
    return int(failed or (bool(counts) and max(counts) < TOKENS))


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve(json.loads(sys.stdin.read()))
    else:
        sys.exit(main())
