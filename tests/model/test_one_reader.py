"""Property: chat, check, training, merge, export and conversion read a directory alike, whatever happened to its files.

Directories of every layout are changed at random (seeded). All programs must find the same tensors, or refuse with the
same sentence.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava.errors import LlavaError
from llava.model import export, merge
from llava.model.check import examine
from llava.model.export import hf_name
from tests import tiny
from tests.model import zoo
from tests.model.test_builder import edit_config, load
from tests.model.test_weight_files import POINTER, consolidated, train_base

State = dict[str, Tensor]
Reader = Callable[[Path], State | None]
SEEDS = range(48)
LAYOUTS = ({}, {"shards": 3}, {"bin_files": True}, {"bin_files": True, "shards": 2})
NORM = "model.layers.0.input_layernorm.weight"


@dataclass(frozen=True)
class Sources:
    base: Path
    chat: Path
    run: Path


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    root = tmp_path_factory.mktemp("sources")
    clip = tiny.make_clip_tower(root / "clip")
    base, chat = tiny.make_base(root / "base"), tiny.make_chat(root / "chat", clip, mm_vision_select_layer=-2)
    return Sources(base, chat, tiny.make_lora(root / "run", chat, base))


# --- what happens to files --------------------------------------------------------------------------------------------


def weight_files(directory: Path) -> list[Path]:
    stems = ("model", "pytorch_model", "adapter_model", "non_lora_trainables")
    return sorted(file for file in directory.iterdir() if file.name.startswith(stems) and file.suffix != ".json")


def any_file(directory: Path, chance: random.Random) -> Path:
    return chance.choice(weight_files(directory) or [directory / "config.json"])


def rewrite(file: Path, change: Callable[[State], object]) -> None:
    """Change the tensors of a file, keeping its format."""
    if not file.stat().st_size or file.suffix not in (".bin", ".safetensors"):
        return
    try:
        state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    except Exception:  # already damaged
        return
    change(state)
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)


def remove(directory: Path, chance: random.Random) -> None:
    files = weight_files(directory)
    if len(files) > 1:
        chance.choice(files).unlink()


def truncate(directory: Path, chance: random.Random) -> None:
    file = any_file(directory, chance)
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.truncate(chance.choice([0, 7, size // 2, max(0, size - 1)]))


def point(directory: Path, chance: random.Random) -> None:
    any_file(directory, chance).write_text(POINTER)


def garble(directory: Path, chance: random.Random) -> None:
    any_file(directory, chance).write_bytes(chance.randbytes(200))


def copy(directory: Path, chance: random.Random) -> None:
    """Another name for a file: not listed, or one that counts."""
    file = any_file(directory, chance)
    names = [f"model-00009-of-00009{file.suffix}", f"copy{file.suffix}", f"pytorch_model{file.suffix}"]
    shutil.copy(file, directory / chance.choice([name for name in names if name != file.name]))


def forget_index(directory: Path, chance: random.Random) -> None:
    for index in directory.glob("*.index.json"):
        values = json.loads(index.read_text())
        name = chance.choice(sorted(values["weight_map"]))
        values["weight_map"][name] = chance.choice(["model-00007-of-00007.safetensors", "../outside.bin", 3])
        index.write_text(json.dumps(values))


def later_save(directory: Path, chance: random.Random) -> None:
    """Save all weights again in another layout: equal ones, or after a step of training."""
    state: State = {}
    for file in weight_files(directory):
        if file.name.startswith(("model", "pytorch_model")):
            rewrite(file, state.update)
    if state:
        step = chance.choice([0.0, 0.0, 0.01])
        zoo.put(directory, {name: value + step for name, value in state.items()}, **chance.choice(LAYOUTS))


def in_both_formats(directory: Path, chance: random.Random) -> None:
    step = chance.choice([0.0, 0.01])
    for file in weight_files(directory):
        if file.name.startswith(("adapter_model", "non_lora")) and file.stat().st_size:
            state: State = {}
            rewrite(file, state.update)
            if state and file.suffix == ".bin":
                save_file({name: value + step for name, value in state.items()}, file.with_suffix(".safetensors"))
            elif state:
                torch.save({name: value + step for name, value in state.items()}, file.with_suffix(".bin"))


def retype(directory: Path, chance: random.Random) -> None:
    dtype = chance.choice([torch.float16, torch.float64, torch.bfloat16, torch.int8])

    def change(state: State) -> None:
        name = chance.choice(sorted(state))
        state[name] = state[name].to(dtype)

    rewrite(any_file(directory, chance), change)


def lose(directory: Path, chance: random.Random) -> None:
    rewrite(any_file(directory, chance), lambda state: state.pop(chance.choice(sorted(state))))


def add(directory: Path, chance: random.Random) -> None:
    name = chance.choice(["model.layers.0.mlp.extra.weight", NORM, "model.layers.0.self_attn.rotary_emb.inv_freq"])
    rewrite(any_file(directory, chance), lambda state: state.update({name: torch.ones(48)}))


def reshape(directory: Path, chance: random.Random) -> None:
    def change(state: State) -> None:
        name = chance.choice(sorted(state))
        value = state[name]
        state[name] = value.T.contiguous() if value.dim() == 2 else value[:-1].clone()

    rewrite(any_file(directory, chance), change)


def other_rank(directory: Path, chance: random.Random) -> None:
    file = directory / "adapter_config.json"
    if file.is_file():
        changes = chance.choice([{"r": 3}, {"target_modules": ["q_proj"]}, {"use_dora": True}, {"alpha_pattern": {}}])
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def lock(directory: Path, chance: random.Random) -> None:
    for file in directory.iterdir():
        file.chmod(0o444)


CHANGES = [remove, truncate, point, garble, copy, forget_index, later_save, in_both_formats, retype, lose, add, reshape]
CHANGES += [other_rank, lock]


def change_at_random(directory: Path, chance: random.Random) -> list[str]:
    changes = chance.sample(CHANGES, chance.choice([0, 1, 1, 1, 2]))
    for change in changes:
        change(directory, chance)
    return [change.__name__ for change in changes]


# --- programs ---------------------------------------------------------------------------------------------------------


def decoder(state: State) -> State:
    """Language model and projector, without rotary tables."""
    return {name: value for name, value in state.items() if "vision_tower" not in name and "rotary" not in name}


def checked(path: Path, base: Path | None = None) -> None:
    examine(path, base)


def exported(path: Path, base: Path | None, out: Path) -> State:
    """Exported weights by our names; the embedding and the head without the row of `<image>`."""
    export.export(path, out, base)
    written = load_file(out / "model.safetensors")
    names = [name for name in decoder(load(path, base).state_dict()) if name in written or hf_name(name) in written]
    state = {name: written[hf_name(name)] for name in names}
    return {name: value[:384] if len(value) == 385 else value for name, value in state.items()}


def merged(path: Path, base: Path | None, out: Path) -> State:
    merge.merge(path, base, out)
    return decoder(load_file(out / "model.safetensors"))


def read_by_all(readers: dict[str, Reader], directory: Path) -> dict[str, State | str | None]:
    found: dict[str, State | str | None] = {}
    for name, read in readers.items():
        try:
            state = read(directory)
        except LlavaError as error:
            found[name] = str(error)
        else:
            found[name] = state if state is None else decoder(state)
    return found


def assert_agreement(found: dict[str, State | str | None], story: object, atol: float) -> None:
    sentences = {name: value for name, value in found.items() if isinstance(value, str)}
    if sentences:
        assert len(sentences) == len(found) and len(set(sentences.values())) == 1, (story, sentences, set(found))
        return
    states = {name: value for name, value in found.items() if isinstance(value, dict)}
    first, *rest = states
    for name in rest:
        assert states[name].keys() == states[first].keys(), (story, name)
        for key, value in states[first].items():
            torch.testing.assert_close(
                states[name][key].float(), value.float(), atol=atol, rtol=0, msg=f"{story} {key}"
            )


@pytest.mark.parametrize("seed", SEEDS)
def test_a_chat_checkpoint(seed: int, sources: Sources, tmp_path: Path) -> None:
    chance = random.Random(seed)
    chat = shutil.copytree(sources.chat, tmp_path / "chat")
    zoo.put(chat, zoo.take_weights(chat), **LAYOUTS[seed % len(LAYOUTS)])
    story = change_at_random(chat, chance)
    readers: dict[str, Reader] = {
        "chat": lambda path: load(path).state_dict(),
        "check": checked,
        "training": train_base,
        "export": lambda path: exported(path, None, tmp_path / "export"),
        "consolidate": consolidated,
    }
    found = read_by_all(readers, chat)
    assert_agreement(found, (LAYOUTS[seed % len(LAYOUTS)], story), 0.0)


@pytest.mark.parametrize("seed", SEEDS[::2])
def test_a_base(seed: int, sources: Sources, tmp_path: Path) -> None:
    """The language model below an adapter."""
    chance = random.Random(seed)
    base = shutil.copytree(sources.base, tmp_path / "base")
    zoo.put(base, zoo.take_weights(base), **LAYOUTS[seed // 2 % len(LAYOUTS)])
    story = change_at_random(base, chance)
    readers: dict[str, Reader] = {
        "chat": lambda path: load(sources.run, path).state_dict(),
        "check": lambda path: checked(sources.run, path),
        "merge": lambda path: merged(sources.run, path, tmp_path / "merge"),
        "export": lambda path: exported(sources.run, path, tmp_path / "export"),
    }
    found = read_by_all(readers, base)
    assert_agreement(found, story, 1e-2)
    alone = read_by_all({"training": train_base, "check": checked}, base)
    refused = [value for value in (*found.values(), *alone.values()) if isinstance(value, str)]
    assert len(refused) in (0, len(found) + len(alone)) and len(set(refused)) <= 1, (story, refused)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_adapter(seed: int, sources: Sources, tmp_path: Path) -> None:
    chance = random.Random(seed)
    run = shutil.copytree(sources.run, tmp_path / "run")
    story = change_at_random(run, chance)
    readers: dict[str, Reader] = {
        "chat": lambda path: load(path).state_dict(),
        "check": checked,
        "merge": lambda path: merged(path, None, tmp_path / "merge"),
        "export": lambda path: exported(path, None, tmp_path / "export"),
    }
    assert_agreement(read_by_all(readers, run), story, 1e-5)


@pytest.mark.parametrize("changes", [{"vocab_size": 400}, {"num_hidden_layers": 3}, {"intermediate_size": 64}])
def test_a_configuration_of_another_model(changes: dict[str, int], sources: Sources, tmp_path: Path) -> None:
    chat = shutil.copytree(sources.chat, tmp_path / "chat")
    edit_config(chat, **changes)
    readers: dict[str, Reader] = {
        "chat": lambda path: load(path).state_dict(),
        "check": checked,
        "training": train_base,
        "export": lambda path: exported(path, None, tmp_path / "export"),
    }
    found = read_by_all(readers, chat)
    assert all(isinstance(value, str) for value in found.values())
    assert_agreement(found, changes, 0.0)
