"""Building a model without allocating it, and putting checkpoint tensors straight into place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import no_init_weights

from llava.errors import CheckpointError
from llava.model.transfer import PinnedUploader


@contextmanager
def empty_weights() -> Iterator[None]:
    """Inside, parameters of new modules take no memory (meta device); buffers are real, initialisation is skipped."""
    with no_init_weights(), init_empty_weights(include_buffers=False):
        yield


def load_weights(
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    device: torch.device | str | Callable[[str], torch.device],
    source: str,
    optional: tuple[str, ...] = (),
    ignored: tuple[str, ...] = (),
    weight_loader: Callable[[nn.Module, str, Tensor, torch.device], bool] | None = None,
) -> None:
    """Put `tensors` into a model built under `empty_weights`, each once, converted to `dtype` on `device` (or on
    the device that `device(name)` gives).

    Strict: a tensor the model lacks (unless its name contains one of `ignored`), one of another shape, or a parameter
    left without weights (unless its name starts with one of `optional`, then it is zeroed) is a `CheckpointError`.
    `weight_loader` may put a tensor in its own way (quantised) and then returns true.
    """
    where = device if callable(device) else lambda name: torch.device(device)
    wanted = dict(model.named_parameters())
    found: set[str] = set()
    unexpected, wrong = [], []
    uploader = PinnedUploader()
    for name, tensor in tensors:
        target = wanted.get(name)
        found.add(name)
        if target is None:
            if not any(part in name for part in ignored):
                unexpected.append(name)
        elif target.shape != tensor.shape:
            wrong.append(f"{name} is {tuple(tensor.shape)} instead of {tuple(target.shape)}")
        elif weight_loader is None or not weight_loader(model, name, tensor, where(name)):
            _set_tensor(model, name, where(name), tensor, dtype, uploader)
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    missing = []
    for name, parameter in model.named_parameters():
        if name not in found and name.startswith(optional):
            zeros = torch.zeros(parameter.shape, device=where(name))
            _set_tensor(model, name, where(name), zeros, dtype, uploader)
        elif name not in found:
            missing.append(name)
    _check_fit(source, {"missing": missing, "unexpected": unexpected, "of another shape": wrong})
    for buffer_name, buffer in model.named_buffers():
        if buffer.device != where(buffer_name):
            _set_tensor(model, buffer_name, where(buffer_name), buffer, buffer.dtype, uploader)
    uploader.finish()


def _check_fit(source: str, misfits: dict[str, list[str]]) -> None:
    """Raise a `CheckpointError` with the count and the first three names of each kind of `misfits`."""
    problems = [
        f"{len(names)} {label} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for label, names in misfits.items()
        if names
    ]
    if problems:
        raise CheckpointError(f"The weights in {source} do not fit the configuration: {'; '.join(problems)}.")


def _set_tensor(
    model: nn.Module, name: str, device: torch.device, value: Tensor, dtype: torch.dtype, uploader: PinnedUploader
) -> None:
    """Replace the parameter or buffer `name` by `value` on `device`, in `dtype` (integers and booleans keep theirs).

    On CUDA `uploader` copies it asynchronously. On the CPU a `value` that already has `dtype` is used without a copy,
    so a memory-mapped file is read only when the model runs.
    """
    if device.type != "cuda":
        set_module_tensor_to_device(model, name, device, value=value, dtype=dtype)
        return
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    kept = not (value.is_floating_point() or value.is_complex())
    copied = uploader.upload(value, device, value.dtype if kept else dtype)
    if attribute in module._buffers:
        module._buffers[attribute] = copied
        return
    old = module.get_parameter(attribute)
    module._parameters[attribute] = type(old)(copied, requires_grad=old.requires_grad)
