"""Pretrain a nano InternViT (1.1 M parameters) to classify shape and color of the easy-VQA training images.

    python -m playground.pretrain_nano_vit [--output pretrained/nano-internvit] [--epochs 30]

Labels are derived from the training questions (`labels.json` of `playground.prepare_easy_vqa`), not from test images.
The output has the format of a published InternViT: `config.json` and `model.safetensors`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from llava.errors import DataError
from llava.model.multimodal_encoder.intern_vit_6b import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    InternVisionConfig,
    InternVisionModel,
)
from llava.utils import guarded
from playground.assets import EASY_VQA, PRETRAINED, staged
from playground.prepare_easy_vqa import VALUES

SIZE = 64
HELD_OUT = 200
UNKNOWN = -100  # ignored by cross entropy
CLASSES = [len(values) for values in VALUES.values()]


def make_config() -> InternVisionConfig:
    """Configuration for 64 px and patch size 16, which give 16 image tokens."""
    return InternVisionConfig(
        image_size=SIZE,
        patch_size=16,
        hidden_size=128,
        num_attention_heads=2,
        intermediate_size=512,
        num_hidden_layers=5,
        qkv_bias=True,
        initializer_factor=1.0,
        use_flash_attn=False,
    )


def load_images(folder: Path) -> tuple[Tensor, Tensor]:
    """Training images (K, 3, 64, 64), normalized as by the tower's image processor, and labels (K, 2)."""
    try:
        labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"Cannot read {folder}/labels.json; run python -m playground.prepare_easy_vqa") from error
    pixels = []
    for name in labels:
        with Image.open(folder / "train" / f"{name}.png") as image:
            pixels.append(np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)))
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255  # (K, 3, S, S)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    targets = [
        [values.index(found[kind]) if kind in found else UNKNOWN for kind, values in VALUES.items()]
        for found in labels.values()
    ]
    return (images - mean) / std, torch.tensor(targets)


def augment(images: Tensor) -> Tensor:
    """Random mirroring, scaling by 0.74 to 1.35 and shifts by up to a quarter, with border padding."""
    count = len(images)
    scale = torch.exp((torch.rand(count) * 2 - 1) * 0.3)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = scale * torch.randint(2, (count,)).mul(2).sub(1)
    theta[:, 1, 1] = scale
    theta[:, :, 2] = (torch.rand(count, 2) - 0.5) * 0.5
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


class NanoClassifier(nn.Module):
    """The tower with a linear head on each of its patch tokens, which classifies both properties."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.tower = InternVisionModel(config)
        self.head = nn.Linear(config.hidden_size, sum(CLASSES))
        with torch.no_grad():
            self.tower.embeddings.position_embedding.mul_(0.2)
            self.tower.embeddings.class_embedding.mul_(0.02)

    def forward(self, images: Tensor) -> Sequence[Tensor]:
        """Logits of shape and color of each token, (B, 3, N) and (B, 8, N), in float32."""
        tokens = self.tower(images).last_hidden_state[:, 1:]  # (B, N, C)
        return self.head(tokens).float().transpose(1, 2).split(CLASSES, dim=1)


def batches(images: Tensor, targets: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for rows in torch.randperm(len(images)).split(size):
        if len(rows) == size:
            yield augment(images[rows]), targets[rows]


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        groups[parameter.dim() > 1].append(parameter)
    weights = [{"params": groups[True], "weight_decay": 0.05}, {"params": groups[False], "weight_decay": 0.0}]
    return torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.98), fused=True)


def token_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross entropy of `logits` (B, classes, N) with `wanted` (B), the class of all tokens."""
    return F.cross_entropy(logits, wanted[:, None].expand(-1, logits.shape[-1]))


def train(model: NanoClassifier, images: Tensor, targets: Tensor, epochs: int, batch_size: int, lr: float) -> None:
    """Train with AdamW, a one-cycle learning rate and bfloat16 autocast; the last `HELD_OUT` images are held out."""
    optimizer = make_optimizer(model, lr)
    trained, held_out = slice(0, -HELD_OUT), slice(-HELD_OUT, None)
    steps = epochs * (len(images[trained]) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(2, steps), pct_start=0.1)
    for epoch in range(1, epochs + 1):
        losses = []
        for inputs, wanted in batches(images[trained], targets[trained], batch_size):
            # the backward pass of the fused kernel is slow for 17 tokens
            with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                outputs = model(inputs)
            loss = torch.stack([token_loss(logits, wanted[:, k]) for k, logits in enumerate(outputs)]).sum()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        if epoch % 5 == 0 or epoch == epochs:
            accuracies = accuracy(model, images[held_out], targets[held_out])
            found = ", ".join(f"{kind} {value:.1%}" for kind, value in accuracies.items())
            print(f"  epoch {epoch:2}: loss {torch.stack(losses).mean():.3f}, held-out images: {found}", flush=True)


@torch.no_grad()
def accuracy(model: NanoClassifier, images: Tensor, targets: Tensor) -> dict[str, float]:
    """Accuracy of the mean logits of all tokens on images with a known label, by property."""
    right = [logits.mean(-1).argmax(-1) == targets[:, k] for k, logits in enumerate(model(images))]
    known = targets != UNKNOWN
    return {kind: right[k][known[:, k]].float().mean().item() for k, kind in enumerate(VALUES)}


@torch.no_grad()
def set_feature_scale(tower: InternVisionModel, images: Tensor) -> None:
    """Rescale the residual stream to features of standard deviation 1, which suit a newly initialized projector.

    Branches read the stream through RMSNorm, so scaling the embeddings and branch outputs scales the features only.
    """
    scale = 1.0 / tower(images).last_hidden_state[:, 1:].std()
    added = [*tower.embeddings.parameters()]
    added += [gain for layer in tower.encoder.layers for gain in (layer.ls1, layer.ls2)]
    for parameter in added:
        parameter.mul_(scale)


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=EASY_VQA)
    parser.add_argument("--output", type=Path, default=PRETRAINED / "nano-internvit")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    images, targets = load_images(args.data)
    model = NanoClassifier(make_config())
    train(model, images, targets, args.epochs, args.batch_size, args.learning_rate)
    set_feature_scale(model.tower, images[:256])
    with staged(args.output) as stage:
        model.tower.save_pretrained(stage)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
