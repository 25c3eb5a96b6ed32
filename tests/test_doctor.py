"""`llava doctor` on simulated machines."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from llava import doctor
from llava.errors import DependencyError
from tests.test_package import ROOT

GOOD = {
    "python": "3.11.7",
    "torch": "2.14.1",
    "torchvision": "0.29.1",
    "transformers": "4.36.2",
    "tokenizers": "0.15.2",
    "huggingface_hub": "0.36.2",
    "accelerate": "0.34.2",
    "peft": "0.13.2",
    "sentencepiece": "0.2.3",
    "pillow": "12.3.0",
    "matplotlib": "3.11.2",
    "deepspeed": "0.19.8",
    "ninja": "1.13.2",
    "bitsandbytes": "0.50.2",
    "flash-attn": "2.8.0",
    "fastapi": "0.165.0",
    "uvicorn": "0.54.0",
    "httpx": "0.28.1",
    "prometheus-client": "0.26.0",
    "gradio": "6.17.3",
    "llguidance": "1.9.1",
}
A100 = doctor.Device("A100", 79.3, (8, 0))
V100 = doctor.Device("V100", 31.7, (7, 0))
MACHINE = doctor.Facts(GOOD, (A100,), "13.0", "580.1", "/usr/bin/c++")


def features(facts: doctor.Facts) -> dict[str, tuple[bool, str]]:
    return {feature.name: doctor.verdict(feature, facts) for feature in doctor.FEATURES}


def test_a_good_machine_can_do_everything() -> None:
    assert doctor.known_bad(GOOD) == []
    assert all(usable for usable, _ in features(MACHINE).values())


@pytest.mark.parametrize(
    ("package", "version"),
    [
        ("accelerate", "1.0.0"),
        ("accelerate", "1.12.1"),
        ("peft", "0.14.0"),
        ("peft", "0.20.0"),
        ("huggingface_hub", "1.0.0"),
        ("huggingface_hub", "1.0.0rc1"),
        ("transformers", "4.36.1"),
        ("transformers", "4.37.2"),
        ("transformers", "5.0.0"),
        ("tokenizers", "0.19.1"),
        ("torch", "2.0.1"),
        ("python", "3.9.18"),
    ],
)
def test_known_bad_versions_are_named_with_the_remedy(package: str, version: str) -> None:
    (problem,) = doctor.known_bad({**GOOD, package: version})
    assert problem.startswith(f"{package} {version} does not work")
    assert ("pip install" in problem) or package == "python"
    page = doctor.report(dataclasses.replace(MACHINE, versions={**GOOD, package: version}))
    assert f"problem: {problem}" in page


@pytest.mark.parametrize("version", ["2.14.1+cpu", "2.4.0", "2.13.0+cu130", "2.15.0a0+git1234567"])
def test_local_builds_of_torch_are_fine(version: str) -> None:
    assert doctor.known_bad({"torch": version}) == []


def test_missing_packages_name_the_extra() -> None:
    bare = {name: GOOD[name] for name in ("python", *doctor.FEATURES[0].packages, "accelerate")}
    verdicts = features(doctor.Facts(bare))
    assert verdicts["inference"] == (True, "on the CPU")
    for name, extra in [("training", "train"), ("DeepSpeed", "train"), ("quantization", "quant"), ("serving", "serve")]:
        usable, why = verdicts[name]
        assert not usable
        assert f"pip install 'llava[{extra}]'" in why


def test_flash_attention_needs_ampere() -> None:
    assert not features(dataclasses.replace(MACHINE, devices=(A100, V100)))["flash attention"][0]
    assert not features(dataclasses.replace(MACHINE, devices=()))["flash attention"][0]


@pytest.mark.parametrize("feature", ["DeepSpeed", "C++ decoding"])
def test_what_is_built_needs_a_compiler(feature: str) -> None:
    usable, why = features(dataclasses.replace(MACHINE, compiler=None))[feature]
    assert not usable
    assert "compiler" in why


def test_a_broken_package_keeps_its_error() -> None:
    facts = dataclasses.replace(MACHINE, broken={"flash-attn": "ImportError: undefined symbol"})
    assert features(facts)["flash attention"] == (
        False,
        "flash-attn cannot be imported: ImportError: undefined symbol",
    )


def test_a_bad_version_takes_its_feature_away() -> None:
    usable, why = features(dataclasses.replace(MACHINE, versions={**GOOD, "peft": "0.15.0"}))["training"]
    assert not usable
    assert "EncoderDecoderCache" in why


def test_quantization_on_the_cpu_is_slow() -> None:
    assert features(dataclasses.replace(MACHINE, devices=()))["quantization"] == (True, "on the CPU: slow")


def test_the_page_shows_devices_and_absences() -> None:
    page = doctor.report(dataclasses.replace(MACHINE, devices=(A100, doctor.Device("Apple mps", 0, None))))
    assert "  A100, 79 GiB, compute capability 8.0" in page
    assert "  Apple mps\n" in page
    assert re.search(r"^  flash-attn +-$", doctor.report(doctor.Facts({"python": "3.11.7"})), re.MULTILINE)


@pytest.mark.parametrize(
    ("change", "status"),
    [({}, 0), ({"versions": {**GOOD, "accelerate": "1.0"}}, 1), ({"broken": {"torch": "OSError: no libcudart"}}, 1)],
)
def test_exit_status(change: dict[str, object], status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "gather", lambda: dataclasses.replace(MACHINE, **change))
    assert doctor.main([]) == status


def test_this_machine_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    page = capsys.readouterr().out
    assert re.search(rf"^  python +{sys.version_info[0]}\.{sys.version_info[1]}\.", page, re.MULTILINE)
    doctor.check_versions()


def test_the_fast_check_refuses_a_bad_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_versions", lambda packages: {"huggingface_hub": "1.2.0"})
    with pytest.raises(DependencyError, match="huggingface_hub 1.2.0 does not work.*llava doctor"):
        doctor.check_versions()


def test_a_flash_attn_that_cannot_load_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(doctor, "installed_versions", lambda packages: GOOD)
    assert doctor.gather().broken == {"flash-attn": "ImportError: undefined symbol: _ZN3c10"}


def test_cards_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    card = type("Card", (), {"name": "H100", "total_memory": 80 * 2**30, "major": 9, "minor": 0})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    devices, _ = doctor._devices()
    assert devices == (doctor.Device("H100", 80.0, (9, 0)), doctor.Device("Apple mps", 0, None))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("echo 580.65.06", "580.65.06"),
        ("exit 9", None),
        ("printf '\\377'", "\ufffd"),
        ("exec sleep 60", "nvidia-smi does not answer (TimeoutExpired): restart the machine, or reinstall the driver"),
    ],
)
def test_the_driver_version(body: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(doctor, "SMI_TIMEOUT", 0.5 if "sleep" in body else 20)
    assert doctor._driver() == expected
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert doctor._driver() is None


def test_it_runs_as_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "llava.doctor", "--help"], capture_output=True, text=True, check=True)
    assert "known not to work" in " ".join(done.stdout.split())


def test_the_three_tables_of_versions_agree() -> None:
    """The ranges of pyproject.toml, the pins of constraints.txt and the rules of the doctor agree."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = [Requirement(entry) for entry in re.findall(r'"([a-z][\w.-]*(?:\[\w+\])?[=<>][^"]*)"', text)]
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            name, _, version = line.partition(";")[0].partition("==")
            pins[canonicalize_name(name)] = version.strip()
    tested = {rule.package: pins.get(canonicalize_name(rule.package), "3.11") for rule in doctor.RULES}
    assert doctor.known_bad(tested) == []
    ranges = {canonicalize_name(requirement.name): requirement.specifier for requirement in declared}
    assert len(ranges) > 25
    assert [name for name in ranges if name in pins and pins[name] not in ranges[name]] == []
    assert {name for name in ranges if name not in pins} <= {"setuptools", "flash-attn"}
    for rule in doctor.RULES:
        for bound in re.findall(r"[<=]=?[\d.]+", rule.works.replace(">=", "~")):
            if rule.package != "python":
                assert bound in str(ranges[canonicalize_name(rule.package)]), rule
