"""Report versions, devices and available features: `llava doctor`; or test a device: `llava doctor --self-test`."""

from __future__ import annotations

import argparse
import importlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, NamedTuple

from packaging.specifiers import SpecifierSet

from llava import __version__
from llava.errors import ConfigError, DependencyError
from llava.provenance import installed_versions
from llava.utils import guarded


class Rule(NamedTuple):
    """The supported versions of a package, and why others fail."""

    package: str
    works: str
    reason: str


class Feature(NamedTuple):
    """A feature, the packages it requires, and the extra that installs them."""

    name: str
    packages: tuple[str, ...]
    extra: str = ""


RULES: Final = (
    Rule("python", ">=3.10", "older releases do not support the syntax of the code"),
    Rule("torch", ">=2.4", "older releases lack functions that training and loading call"),
    Rule("transformers", "==4.36.2", "the models and the Trainer are written against exactly this release"),
    Rule("tokenizers", ">=0.14,<0.19", "transformers 4.36.2 requires this range"),
    Rule("huggingface_hub", ">=0.19.3,<1.0", "transformers 4.36.2 rejects 1.0 and newer"),
    Rule("accelerate", ">=0.26,<1.0", "the Trainer of transformers 4.36.2 passes arguments that 1.0 removed"),
    Rule("peft", ">=0.10,<0.14", "0.14 imports EncoderDecoderCache, which is not in transformers 4.36.2"),
    Rule("deepspeed", ">=0.14", "older releases do not support this torch"),
    Rule("bitsandbytes", ">=0.50", "older releases have no 8-bit kernels for the CPU"),
    Rule("gradio", ">=6.0,<7.0", "the web page uses the 6.x API"),
)

SMI_TIMEOUT: Final = 20.0  # seconds; nvidia-smi hangs if a GPU has failed

FEATURES: Final = (
    Feature("inference", ("torch", "torchvision", "transformers", "tokenizers", "sentencepiece", "pillow")),
    Feature("C++ decoding", ()),
    Feature("training", ("torch", "transformers", "accelerate", "peft", "matplotlib"), "train"),
    Feature("DeepSpeed", ("deepspeed", "ninja"), "train"),
    Feature("quantization", ("bitsandbytes",), "quant"),
    Feature("flash attention", ("flash-attn",), "flash"),
    Feature("serving", ("fastapi", "uvicorn", "httpx", "prometheus-client", "gradio"), "serve"),
    Feature("structured output", ("llguidance",), "serve"),
)

PACKAGES: Final = tuple(
    dict.fromkeys([r.package for r in RULES if r.package != "python"] + [p for f in FEATURES for p in f.packages])
)


class Device(NamedTuple):
    """An accelerator: name, memory in GiB (0 if unknown), and CUDA compute capability, if any."""

    name: str
    memory: float
    capability: tuple[int, int] | None


@dataclass(frozen=True)
class Facts:
    """Packages (installed ones only), devices and tools of this machine."""

    versions: Mapping[str, str]
    devices: tuple[Device, ...] = ()
    cuda: str | None = None
    driver: str | None = None
    compiler: str | None = None
    broken: Mapping[str, str] = field(default_factory=dict)  # package -> import error


def gather() -> Facts:
    """Inspect this machine. Imports torch and, if installed, flash-attn, which often does not load."""
    versions = installed_versions(PACKAGES)
    broken = {}
    for package in {"torch", "flash-attn"} & versions.keys():
        try:
            importlib.import_module(package.replace("-", "_"))
        except Exception as error:  # a broken extension may raise anything
            broken[package] = f"{type(error).__name__}: {error}"
    devices: tuple[Device, ...] = ()
    cuda = None
    if "torch" in versions.keys() - broken.keys():
        devices, cuda = _devices()
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    return Facts(versions, devices, cuda, _driver(), compiler, broken)


def _devices() -> tuple[tuple[Device, ...], str | None]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        found.append(Device(card.name, card.total_memory / 2**30, (card.major, card.minor)))
    if torch.backends.mps.is_available():
        found.append(Device("Apple mps", 0, None))
    return tuple(found), torch.version.cuda


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            query, capture_output=True, text=True, errors="replace", timeout=SMI_TIMEOUT, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi does not answer ({type(error).__name__}): restart the machine, or reinstall the driver"
    lines = answer.stdout.split()
    return lines[0] if answer.returncode == 0 and lines else None


def known_bad(versions: Mapping[str, str]) -> list[str]:
    """A sentence for each package whose version is known not to work."""
    problems = []
    for package, works, reason in RULES:
        version = versions.get(package)
        if version is not None and not SpecifierSet(works).contains(version, prereleases=True):
            remedy = f"pip install '{package}{works}'" if package != "python" else f"use Python {works}"
            problems.append(f"{package} {version} does not work ({reason}): {remedy}")
    return problems


def check_versions() -> None:
    """Raise `DependencyError` for a version known not to work. Reads package metadata only."""
    problems = known_bad(installed_versions(PACKAGES))
    if problems:
        raise DependencyError(f"{problems[0]} (run llava doctor for the full report).")


def verdict(feature: Feature, facts: Facts) -> tuple[bool, str]:
    """Whether a feature can be used, and on which devices, or what is missing."""
    missing = [package for package in feature.packages if package not in facts.versions]
    if missing:
        target = f"llava[{feature.extra}]" if feature.extra else "llava"
        return False, f"needs {', '.join(missing)}: pip install '{target}'"
    for package in feature.packages:
        if package in facts.broken:
            return False, f"{package} cannot be imported: {facts.broken[package]}"
        bad = known_bad({package: facts.versions[package]})
        if bad:
            return False, bad[0]
    capabilities = [device.capability for device in facts.devices if device.capability is not None]
    if feature.name == "DeepSpeed" and facts.compiler is None:
        return False, "needs a C++ compiler for its operators: install g++ or clang"
    if feature.name == "C++ decoding" and facts.compiler is None:
        return False, "needs a C++ compiler: install g++ or clang; decoding on the CPU is slower without it"
    if feature.name == "C++ decoding":
        return True, "on the CPU: compiled at first use"
    if feature.name == "flash attention" and (not capabilities or min(capabilities) < (8, 0)):
        return False, "needs NVIDIA GPUs of compute capability 8.0 (Ampere) or newer; sdpa is used instead"
    if feature.name == "quantization" and not capabilities:
        return True, "on the CPU: slow"
    if feature.name in ("inference", "training"):
        return True, f"on {', '.join(device.name for device in facts.devices) or 'the CPU'}"
    return True, "available"


def report(facts: Facts) -> str:
    """Format the output of `llava doctor`."""
    names = ["python", *PACKAGES]
    width = max(map(len, names)) + 2
    lines = [f"llava {__version__} on {platform.platform()}", "", "versions"]
    lines += [f"  {name:<{width}}{facts.versions.get(name, '-')}" for name in names]
    lines += [
        f"  {'CUDA (of torch)':<{width}}{facts.cuda or '-'}",
        f"  {'NVIDIA driver':<{width}}{facts.driver or '-'}",
    ]
    lines += [f"  {'C++ compiler':<{width}}{facts.compiler or '-'}", "", "devices"]
    for device in facts.devices:
        memory = f", {device.memory:.0f} GiB" if device.memory else ""
        capability = ", compute capability {}.{}".format(*device.capability) if device.capability else ""
        lines.append(f"  {device.name}{memory}{capability}")
    lines += ["  CPU", "", "features"]
    for feature in FEATURES:
        usable, why = verdict(feature, facts)
        lines.append(f"  {'yes' if usable else 'no':<5}{feature.name:<17}{why}")
    problems = known_bad(facts.versions)
    lines += ["", *[f"problem: {problem}" for problem in problems]] if problems else []
    return "\n".join(lines)


def self_test(device: str | None) -> int:
    """Run the self-test and return the exit status: 1 if a check fails. Raises `ConfigError` without the device."""
    check_versions()
    from llava.placement import resolve_device
    from llava.self_test.runner import self_test as run

    return 1 if run(resolve_device(device), partial(print, flush=True)) else 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Report versions, devices and available features; exit status 1 if a version is known not to work. "
        "With --self-test, test a device; exit status 1 if a check fails."
    )
    parser.add_argument(
        "--self-test",
        action="store_true",
        help="compare logits, tokens, sampling, training and quantization of tiny models with float32 on the CPU; "
        "takes under a minute and downloads nothing",
    )
    parser.add_argument("--device", help="cuda, cuda:N, mps or cpu for --self-test (default: the best available)")
    return parser


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.self_test:
        return self_test(args.device)
    if args.device is not None:
        raise ConfigError("--device requires --self-test.")
    facts = gather()
    print(report(facts))
    return 1 if known_bad(facts.versions) or "torch" in facts.broken else 0


if __name__ == "__main__":
    sys.exit(main())
