"""Golden values of small checkpoints, computed on the device in float32 without TF32."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.runner import Skip
from llava.model.builder import load_pretrained_model

NO_GOLDEN: Final = "no golden data: pass its directory with --golden"
ATOL: Final = 5e-4  # of features and logits, absolute and relative
LOSS_TOL: Final = 2e-4
WEIGHT_TOL: Final = 1e-6


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Disable TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


class Mismatch(Exception):
    """A value that differs from the stored one."""


class Comparison:
    """Compare with stored values and record the largest difference as a fraction of its tolerance."""

    def __init__(self) -> None:
        self.worst = 0.0

    def close(self, found: Any, stored: Any, atol: float, rtol: float) -> None:
        found, stored = (torch.as_tensor(x).detach().double().cpu() for x in (found, stored))
        if found.shape != stored.shape:
            raise Mismatch(f"shape {tuple(found.shape)} instead of {tuple(stored.shape)}")
        if not found.isfinite().all():
            raise Mismatch("not finite")
        share = ((found - stored).abs() / (atol + rtol * stored.abs())).max().item() if found.numel() else 0.0
        self.worst = max(self.worst, share)
        if share > 1:
            raise Mismatch(f"differs by up to {share:.2f} times the tolerance")

    def summary(self, found: Tensor, stored: dict[str, Any], atol: float, rtol: float) -> None:
        """Compare a tensor with its stored shape, mean, standard deviation and some of its values."""
        if list(found.shape) != stored["shape"]:
            raise Mismatch(f"shape {list(found.shape)} instead of {stored['shape']}")
        flat = found.detach().double().flatten().cpu()
        self.close(flat[torch.tensor(stored["index"])], stored["value"], atol, rtol)
        self.close([flat.mean().item(), flat.std(unbiased=False).item()], [stored["mean"], stored["std"]], atol, rtol)


def copy_models(bench: Bench) -> Path:
    """A copy of the golden `models/` whose checkpoints name their towers by absolute paths."""
    if bench.golden is None:
        raise Skip(NO_GOLDEN)
    root = bench.work / "models"
    if root.is_dir():
        return root
    shutil.copytree(bench.golden / "models", root, copy_function=shutil.copyfile)
    for file in root.glob("*/config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        if str(config.get("mm_vision_tower", "")).startswith("."):
            config["mm_vision_tower"] = str(root / Path(config["mm_vision_tower"]).name)
            file.write_text(json.dumps(config), encoding="utf-8")
    return root


def image(height: int, width: int, seed: int) -> Tensor:
    """The formula of the golden images: (3, height, width)."""
    y = torch.arange(height).view(-1, 1)
    x = torch.arange(width).view(1, -1)
    waves = (7 + seed) * y + (3 + 2 * seed) * x + (x * y) // (5 + seed)
    return torch.stack([((waves + 11 * c * (seed + 1)) % 256).double() / 127.5 - 1.0 for c in range(3)]).float()


def load(root: Path, settings: dict[str, Any], device: torch.device) -> Any:
    base = settings["model_base"]
    _, model, _, _ = load_pretrained_model(
        root / settings["model_path"],
        base and root / base,
        settings["model_name"],
        device=str(device),
        dtype=torch.float32,
    )
    return model


def compare(case: dict[str, Any], model: Any, stored: dict[str, Tensor], by: Comparison) -> None:
    """Compute one case; raises `Mismatch` if it differs from the stored values."""
    images = None
    if case.get("images"):
        images = torch.stack([image(*spec) for spec in case["images"]]).to(model.device)
    if case["kind"] == "weight":
        by.summary(model.state_dict()[case["key"]].float(), case["weight"], WEIGHT_TOL, WEIGHT_TOL)
    elif case["kind"] == "features":
        features = model.get_vision_tower()(images)
        by.summary(features, case["features"], ATOL, ATOL)
        if case.get("full"):
            by.close(features, stored[f"{case['id']}.features"], ATOL, ATOL)
        by.summary(model.encode_images(images), case["projector"], ATOL, ATOL)
    else:
        rows = case["input_ids"]
        ids = _padded(rows, 0).to(model.device)
        if case["layout"] == "5d" and images is not None:
            images = images.reshape(len(rows), -1, *images.shape[1:])
        if case["kind"] == "generate":
            _compare_generated(case, model, ids, images)
        else:
            _compare_logits(case, model, ids, images, stored, by)


def _padded(rows: list[list[int]], value: int) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def _compare_generated(case: dict[str, Any], model: Any, ids: Tensor, images: Tensor | None) -> None:
    limit = case["max_new_tokens"]
    out = model.generate(ids, images=images, do_sample=False, max_new_tokens=limit, use_cache=True)
    new = out[0, ids.shape[1] :].tolist()
    if new != case["new_ids"]:
        raise Mismatch(f"generated {new} instead of {case['new_ids']}")


def _compare_logits(
    case: dict[str, Any], model: Any, ids: Tensor, images: Tensor | None, stored: dict[str, Tensor], by: Comparison
) -> None:
    rows, mask, labels = case["input_ids"], None, None
    if case.get("attention_mask"):
        mask = _padded([[1] * len(row) for row in rows], 0).bool().to(model.device)
    if case.get("labels"):
        labels = _padded(case["labels"], -100).to(model.device)
    out = model(input_ids=ids, attention_mask=mask, labels=labels, images=images, return_dict=True)
    logits = out.logits.double()
    sums = torch.cat([logits[row, :length].logsumexp(-1) for row, length in enumerate(case["expanded"])])
    by.close(sums, stored[f"{case['id']}.lse"], ATOL, ATOL)
    chosen = torch.stack([logits[row, position] for row, position in case["positions"]])
    by.close(chosen, stored[f"{case['id']}.logits"], ATOL, ATOL)
    if labels is not None:
        by.close(out.loss.item(), case["loss"], LOSS_TOL, LOSS_TOL)


@torch.no_grad()
def golden(bench: Bench) -> None:
    """Check all golden cases of all checkpoints."""
    from safetensors.torch import load_file

    root = copy_models(bench)
    cases = json.loads((root / "cases.json").read_text(encoding="utf-8"))
    stored = load_file(root / "expected.safetensors")
    with exact_float32():
        for name, settings in cases["checkpoints"].items():
            if bench.in_time(f"golden cases of {name}"):
                mine = [case for case in cases["cases"] if case["checkpoint"] == name]
                _checkpoint(bench, root, name, settings, mine, stored)


def _checkpoint(
    bench: Bench,
    root: Path,
    name: str,
    settings: dict[str, Any],
    cases: list[dict[str, Any]],
    stored: dict[str, Tensor],
) -> None:
    """Check all cases of one checkpoint. If a tower is stored twice, the checkpoint's own weights are used."""
    model, by, wrong = load(root, settings, bench.device), Comparison(), []
    cases = [case for case in cases if case.get("tower_from") != "path" and not case.get("reference_defect")]
    for case in cases:
        try:
            compare(case, model, stored, by)
        except Mismatch as error:
            wrong.append(f"{case['id']}: {error}")
    note = wrong[0] if wrong else f"largest difference {by.worst:.2g} of the tolerance"
    bench.check(f"golden cases of {name}", not wrong, f"{len(cases) - len(wrong)} of {len(cases)}", note)
