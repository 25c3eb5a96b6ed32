"""`llava doctor --self-test` passes on the CPU, and each injected fault fails the expected checks."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llava.engine.engine
from llava import doctor
from llava.engine import attention, layers, sampling
from llava.engine.native import decoder
from llava.engine.native.build import library
from llava.engine.sequence import SamplingParams, hash_image
from llava.model import checkpoint
from llava.model.language_model import causal_lm, packed
from llava.model.multimodal_encoder.tower import ENVIRONMENT
from llava.self_test import CheckFailed, CheckSkipped, checkpoints, checks, hardware, runner, within
from llava.self_test.checkpoints import KINDS
from llava.self_test.runner import Report, isolated
from tests import devices
from tests.test_package import ROOT

CPU = torch.device("cpu")
EXACT = checks.Role(CPU, torch.float32)
HALF = checks.Role(CPU, torch.bfloat16)
EVERY = ("loader", "logits float32", "greedy tokens", "batch, shared image", "logits bfloat16")
NATIVE = ("C++ kernel float32", "C++ kernel bfloat16")
PACKED = ("C++ kernel 8-bit", "C++ kernel 4-bit")
TRAINING = ("training float32", "training bfloat16")
SAMPLING = ("sampling, same seed", "sampling, top_p")
LINES = {
    "llama": {*EVERY, *NATIVE, *TRAINING, *SAMPLING, "8-bit", "4-bit", *PACKED},
    "clip": {*EVERY, *NATIVE},
    "mpt": {*EVERY, *TRAINING},
    "projector": set(EVERY),
    "adapter": set(EVERY),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small models run faster on one thread on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def parse(output: str) -> dict[str, dict[str, tuple[str, str]]]:
    """Status and result by subject and check."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for line in output.splitlines():
        if match := re.match(r"(ok|skip|FAIL) +(\S.*?)  +(\S.*?)  +(\S.*)$", line):
            found.setdefault(match[2], {})[match[3]] = (match[1], match[4])
    return found


def flags() -> list[Any]:
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.get_num_threads(),
        os.environ.get(ENVIRONMENT),
    ]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run the command for one kind of checkpoint; returns exit status and lines. Opening a connection fails."""

    needs_native()

    def refuse(*args: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(hardware, "SECONDS", 0.0)
    monkeypatch.setattr(checks, "require_package", skip_quantization)

    def command(kind: str) -> tuple[int, dict[str, dict[str, tuple[str, str]]]]:
        monkeypatch.setattr(runner, "KINDS", {kind: KINDS[kind]})
        before = flags()
        status = doctor.main(["--self-test", "--device", "cpu"])
        assert flags() == before
        output = capsys.readouterr().out
        lines = parse(output)
        failed = [name for subject in lines.values() for name, (word, _) in subject.items() if word == "FAIL"]
        assert f"checks, {len(failed)} failed" in output.splitlines()[-1]
        assert status == bool(failed)
        return status, lines

    return command


def needs_native() -> None:
    if library() is None:
        pytest.skip("the C++ kernel cannot be built here")


def skip_quantization(name: str, extra: str) -> None:
    if name == "bitsandbytes":
        raise CheckSkipped("left out of this test")


def failed(lines: dict[str, dict[str, tuple[str, str]]], kind: str, *, native: bool = True) -> set[str]:
    assert lines[kind].keys() == (LINES[kind] if native else LINES[kind] - {*NATIVE, *PACKED})
    rest = {word for subject, checks in lines.items() if subject != kind for word, _ in checks.values()}
    assert rest == ({"ok"} if native else {"ok", "skip"})
    return {name for name, (word, _) in lines[kind].items() if word == "FAIL"}


@pytest.mark.slow
def test_the_whole_command_passes_here(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llava", "doctor", "--self-test", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = parse(done.stdout)
    assert {kind: checks.keys() for kind, checks in lines.items() if kind in LINES} == LINES
    assert {word for checks in lines.values() for word, _ in checks.values()} == {"ok"}
    assert lines["rate"].keys() == {"copy", "matmul bfloat16", "matmul float32"}
    assert lines["attention"].keys() == {"float32", "bfloat16"}
    count = sum(map(len, lines.values()))
    assert re.fullmatch(rf"{count} checks, 0 failed \(\d+ s\)", done.stdout.splitlines()[-1])
    assert list(tmp_path.glob("llava-*")) == []


def test_without_the_device_there_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.main(["--self-test", "--device", "cuda"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: Device 'cuda' is not available: no CUDA GPU is visible;")
    assert captured.err.count("\n") == 1


def test_a_device_alone_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--device", "cpu"]) == 2
    assert "--self-test" in capsys.readouterr().err


# --- faults -----------------------------------------------------------------------------------------------------------


def test_two_weights_in_each_others_place(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read = checkpoint.iter_tensors
    swap = {f"model.layers.0.self_attn.{a}_proj.weight": b for a, b in (("k", "v"), ("v", "k"))}

    def swapped(*args: Any) -> Iterator[tuple[str, Any]]:
        for name, tensor in read(*args):
            other = swap.get(name)
            yield (f"model.layers.0.self_attn.{other}_proj.weight" if other else name), tensor

    monkeypatch.setattr(checkpoint, "iter_tensors", swapped)
    status, lines = run("clip")
    assert status == 1
    assert failed(lines, "clip") == {"loader"}
    assert "model.layers.0.self_attn.k_proj.weight differs from the checkpoint" in lines["clip"]["loader"][1]


def test_a_checkpoint_that_cannot_be_loaded(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise OSError("disk\nfull")

    monkeypatch.setattr(checks, "load_pretrained_model", broken)
    status, lines = run("clip")
    assert status == 1
    assert lines["clip"] == {"loader": ("FAIL", "OSError: disk full")}
    assert lines["rate"].keys() == {"copy", "matmul bfloat16", "matmul float32"}


def test_another_epsilon_in_the_engines_norm(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make = layers.RMSNorm.__init__

    def wrong(norm: Any, module: Any) -> None:
        make(norm, module)
        norm.eps = 1e-3

    monkeypatch.setattr(layers.RMSNorm, "__init__", wrong)
    _, lines = run("llama")
    assert {"logits float32", "C++ kernel float32"} <= failed(lines, "llama")
    assert not {"loader", *TRAINING, *SAMPLING, *NATIVE[1:]} & failed(lines, "llama")


def test_logits_of_the_native_kernel_that_are_a_percent_off(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step = decoder.NativeDecoder.step
    monkeypatch.setattr(decoder.NativeDecoder, "step", lambda *args: step(*args) * 1.01)
    _, lines = run("clip")
    assert failed(lines, "clip") == {"logits float32", "C++ kernel float32"}
    assert lines["clip"]["C++ kernel float32"][1] == "relative error 1.0e-02, limit 1e-04"


def test_a_native_kernel_that_writes_nan(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def nan(self: Any, embeds: Tensor, *args: Any) -> Tensor:
        return torch.full((len(embeds), checkpoints.VOCABULARY), torch.nan)

    monkeypatch.setattr(decoder.NativeDecoder, "step", nan)
    _, lines = run("clip")
    assert failed(lines, "clip") == {*EVERY[1:], *NATIVE}
    assert "NaN" in lines["clip"]["batch, shared image"][1]


def test_a_native_kernel_that_is_not_reached(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "native_decode_rows", lambda dtype, tiles: 0)
    _, lines = run("clip")
    assert failed(lines, "clip") == set(NATIVE)


def test_one_image_taken_for_another(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def same(image: Any) -> Any:
        return dataclasses.replace(hash_image(image), digest=b"0" * 32)

    monkeypatch.setattr(llava.engine.engine, "hash_image", same)
    _, lines = run("clip")
    assert {"batch, shared image", "logits float32"} <= failed(lines, "clip")
    assert not {"loader", "greedy tokens"} & failed(lines, "clip")


def test_a_sampler_that_forgets_top_p(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = sampling.top_p_candidates
    monkeypatch.setattr(sampling, "top_p_candidates", lambda logits, heat, top_p: candidates(logits, heat, 1.0))
    _, lines = run("llama")
    assert failed(lines, "llama") == {"sampling, top_p"}
    assert "top_p is 0.6" in lines["llama"]["sampling, top_p"][1]


def test_a_sampler_that_forgets_the_seed(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unseeded(params: SamplingParams) -> torch.Generator | None:
        generator = torch.Generator()
        generator.seed()
        return generator if params.temperature else None

    monkeypatch.setattr(llava.engine.engine, "make_generator", unseeded)
    _, lines = run("llama")
    assert failed(lines, "llama") == {"sampling, same seed"}


def test_a_gradient_that_is_not_rotated_back(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed.Rotate, "backward", staticmethod(lambda ctx, *grads: (grads[0], None, None)))
    _, lines = run("llama")
    assert failed(lines, "llama") == set(TRAINING)


def test_gradients_twice_as_large(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW's first step does not depend on the scale of gradients, so the losses are equal."""
    compute = causal_lm.supervised_loss

    def doubled(head: Any, tokens: Any, row_weights: Any, function: Any, logits: Tensor | None = None) -> Tensor:
        loss = compute(head, tokens, row_weights, function, logits)
        return loss + (loss - loss.detach()) if logits is None else loss  # in training only

    monkeypatch.setattr(causal_lm, "supervised_loss", doubled)
    _, lines = run("mpt")
    assert failed(lines, "mpt") == set(TRAINING)


# --- a simulated GPU --------------------------------------------------------------------------------------------------


@pytest.fixture
def run_on_cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, dict[str, tuple[str, str]]]]:
    """Run the checks of one kind of checkpoint on a simulated GPU, which supports neither autocast nor bitsandbytes."""
    monkeypatch.setattr(runner, "check_rates", lambda *args: None)
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda kind: False)
    monkeypatch.setattr(checks, "require_package", skip_quantization)

    def command(kind: str) -> dict[str, dict[str, tuple[str, str]]]:
        monkeypatch.setattr(runner, "KINDS", {kind: KINDS[kind]})
        lines: list[str] = []
        with devices.simulated_cuda():
            runner.self_test(torch.device("cuda"), lines.append)
        return parse("\n".join(lines))

    return command


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_passes(kind: str, run_on_cuda: Any) -> None:
    lines = run_on_cuda(kind)
    assert lines[kind].keys() == LINES[kind] - {*NATIVE, *PACKED}
    left_out = {"training bfloat16", "8-bit", "4-bit"}
    assert {word for name, (word, _) in lines[kind].items() if name not in left_out} == {"ok"}
    assert lines["device"]["cuda"][1].startswith("Simulated H200, 139 GiB, compute capability 9.0, torch ")
    assert lines["C++ kernel"]["decoding"] == ("skip", "only used on the CPU")


def test_an_attention_kernel_with_a_wrong_log_sum_exp(run_on_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = torch.ops.aten._scaled_dot_product_efficient_attention.default
    kernel = devices.KERNELS[name]

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out, lse, *rest = kernel(*args, **kwargs)
        return out, lse * 0.5, *rest

    monkeypatch.setitem(devices.KERNELS, name, wrong)
    assert failed(run_on_cuda("clip"), "clip", native=False) == {EVERY[1], *EVERY[3:]}


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> checks.Case:
    """LLaMA with InternViT, loaded in every role."""
    made = checks.Case("llama", tmp_path_factory.mktemp("self-test"))
    with isolated():
        checks.check_loader(made, [checks.REFERENCE, EXACT, HALF])
    return made


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_layers_with_a_wrong_scale(bits: int, case: checks.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    assert "limit" in checks.check_quantized(case, HALF, bits)
    load, name = case.load, "model.layers.0.mlp.down_proj"

    def scaled(role: checks.Role, *, bits: int = 0) -> checks.Loaded:
        loaded = load(role, bits=bits)
        layer = loaded.model.get_submodule(name)
        layer.register_forward_hook(lambda module, args, output: output * (1.5 if bits == 8 else 3.0))
        return loaded

    monkeypatch.setattr(case, "load", scaled)
    with pytest.raises(CheckFailed, match="relative error"):
        checks.check_quantized(case, HALF, bits)
    monkeypatch.setattr(case, "load", lambda role, bits: load(role))
    with pytest.raises(CheckFailed, match="no layer was quantized"):
        checks.check_quantized(case, HALF, bits)


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_weights_with_a_wrong_scale(bits: int, case: checks.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    needs_native()
    assert "limit" in hardware.check_native_logits(case, torch.bfloat16, 1, bits)
    pack = layers.pack_linear

    def scaled(layer: torch.nn.Module) -> Any:
        linear: Any = pack(layer)
        scales = linear.part.tensors["scales"] * 1.5
        linear.part.tensors["scales"], linear.part.record.scales = scales, scales.data_ptr()
        return linear

    monkeypatch.setattr(layers, "pack_linear", scaled)
    with pytest.raises(CheckFailed, match="relative error"):
        hardware.check_native_logits(case, torch.bfloat16, 1, bits)


def test_products_in_tf32_are_beyond_the_limit_of_float32(case: checks.Case) -> None:
    """Weights rounded to the ten mantissa bits of TF32 emulate a TF32 matmul."""
    loaded, reference = case.load(EXACT), case.models[checks.REFERENCE]
    requests, tokens = checks.make_requests(2), case.answers[:2]
    assert checks.forward_error(loaded, reference, requests, tokens) < checks.LIMITS[torch.float32] / 10
    for parameter in loaded.model.parameters():
        bits = parameter.data.view(torch.int32)
        bits.add_(0x1000).bitwise_and_(~0x1FFF)
    assert checks.forward_error(loaded, reference, requests, tokens) > checks.LIMITS[torch.float32]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_decided_by_a_margin(kind: str, tmp_path: Path) -> None:
    """Rounding on another device does not change them, and each prompt and image has a distinct answer."""
    made = checks.Case(kind, tmp_path)
    made.models[checks.REFERENCE] = made.load(checks.REFERENCE)
    assert len(set(made.answers)) == len(made.answers)
    for request, tokens in zip(checks.make_requests(), made.answers, strict=True):
        assert len(tokens) == checks.NEW_TOKENS
        logits = checks.forward_logits(made.models[checks.REFERENCE], request, tokens)
        best = logits.topk(2, dim=1).values
        assert ((best[:, 0] - best[:, 1]) / logits.norm(dim=1)).min() > 1e-4


def test_errors_within_and_beyond_a_limit() -> None:
    assert within([1e-7, 2e-6], 1e-4) == "relative error 2.0e-06, limit 1e-04"
    for errors in ([1e-7, 2e-4], [1e-7, float("nan"), 1e-8], [float("inf")]):
        with pytest.raises(CheckFailed, match="limit 1e-04"):
            within(errors, 1e-4)


# --- report and hardware ----------------------------------------------------------------------------------------------


def test_a_check_that_raises_is_a_line_and_the_rest_runs() -> None:
    lines: list[str] = []
    report = Report(lines.append)

    def broken() -> str:
        raise RuntimeError("CUDA error:\n  an illegal memory access")

    def skipped() -> str:
        raise CheckSkipped("not here")

    report.run("a", "first", broken)
    report.run("a", "second", skipped)
    report.run("a", "third", lambda: "fine")
    assert [" ".join(line.split()) for line in lines] == [
        "FAIL a first RuntimeError: CUDA error: an illegal memory access",
        "skip a second not here",
        "ok a third fine",
    ]
    assert report.summary().startswith("2 checks, 1 failed, 1 skipped (")


def test_global_state_is_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "some/tower")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("high")
    torch.set_default_dtype(torch.float64)
    before = flags()

    def fail_inside() -> None:
        with torch.no_grad(), isolated():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
            assert torch.is_grad_enabled()
            assert ENVIRONMENT not in os.environ
            assert torch.rand(()).dtype is torch.float32
            raise KeyError

    try:
        with pytest.raises(KeyError):
            fail_inside()
        assert flags() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_card_and_its_attention_kernels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    card = type("Card", (), {"name": "T4", "total_memory": 15 * 2**30, "major": 7, "minor": 5})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(attention, "is_ampere", lambda device: False)
    device = torch.device("cuda")
    assert hardware.describe_device(device, 1).startswith("T4, 15 GiB, compute capability 7.5, torch ")
    assert hardware.check_attention(device, torch.float16) == "engine memory-efficient; model sdpa"
    monkeypatch.setattr(attention, "is_ampere", lambda device: True)
    assert hardware.check_attention(device, torch.float16).startswith("engine flash, masked memory-efficient; model ")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({}, None, "in use for up to 32 rows"),
        ({"library": lambda: None}, CheckFailed, "could not build it"),
        ({"find_compiler": lambda: None}, CheckSkipped, "no C\\+\\+ compiler"),
    ],
)
def test_the_native_kernel_or_why_not(
    change: dict[str, Any], error: type[Exception] | None, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_native()
    for name, value in change.items():
        monkeypatch.setattr(hardware, name, value)
    if error is None:
        assert text in hardware.check_native(CPU)
    else:
        with pytest.raises(error, match=text):
            hardware.check_native(CPU)
    monkeypatch.setenv("LLAVA_NATIVE", "0")
    with pytest.raises(CheckSkipped, match="LLAVA_NATIVE=0"):
        hardware.check_native(CPU)


def test_a_rate_that_cannot_be_measured_is_no_failure() -> None:
    def broken() -> str:
        raise torch.OutOfMemoryError("64 GiB")

    lines: list[str] = []
    report = Report(lines.append)
    report.run("rate", "copy", broken, required=False)
    report.run("rate", "matmul", lambda: "3 GB/s", required=False)
    assert [" ".join(line.split()) for line in lines] == [
        "skip rate copy not measured: OutOfMemoryError: 64 GiB",
        "ok rate matmul 3 GB/s",
    ]
    assert report.summary().startswith("1 checks, 0 failed, 1 skipped (")
