"""Shell scripts: every one is clean POSIX; `_env.sh` fails in one sentence, on machines made bad by fakes on PATH."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.test_package import ROOT

SHELL = shutil.which("dash") or "sh"
TOOLS = [
    "awk",
    "cat",
    "cksum",
    "df",
    "dirname",
    "echo",
    "env",
    "find",
    "grep",
    "ls",
    "mkdir",
    "mv",
    "rm",
    "sed",
    "sh",
    "tr",
]
HIDDEN = {".git", ".venv", "work_dirs", "node_modules"}
SCRIPTS = [p for p in sorted(ROOT.rglob("*.sh")) if not HIDDEN & set(p.relative_to(ROOT).parts)] + [
    ROOT / ".ci" / "run"
]
RELATIVE = [path.relative_to(ROOT).as_posix() for path in SCRIPTS]

GOOD_PYTHON = """#!/bin/sh
case "$*" in
*"-m venv"*)
    for last; do :; done
    mkdir -p "$last/bin"; echo fake >"$last/pyvenv.cfg"; cp "$0.inside" "$last/bin/python" ;;
--version) echo Python 3.11.7 ;;
esac
"""
INSIDE_PYTHON = """#!/bin/sh
echo "$*" >>"$CALLS"
case "$*" in
*"pip"*"install"*)
    log=$(echo "$*" | sed 's/.*--log \\([^ ]*\\).*/\\1/')
    echo "$PIP_SAYS" >"$log"
    exit "$PIP_EXIT" ;;
esac
"""


@pytest.mark.parametrize("name", RELATIVE)
def test_script_is_posix_and_clean(name: str) -> None:
    assert subprocess.run([SHELL, "-n", name], cwd=ROOT, check=False).returncode == 0
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck is not None, "shellcheck is part of the extra dev"
    done = subprocess.run([shellcheck, "-x", name], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_list_of_scripts_holds_what_the_readme_names() -> None:
    assert {"scripts/test.sh", "scripts/lint.sh", "scripts/_env.sh", ".ci/run"} <= set(RELATIVE)


@pytest.mark.parametrize("name", [name for name in RELATIVE if not Path(name).name.startswith("_")])
def test_script_says_what_it_does_and_stops_at_the_first_failure(name: str) -> None:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/bin/sh"
    assert lines[1].startswith("# ")
    assert "set -eu" in lines


def test_ci_run_can_be_executed_and_hides_nothing() -> None:
    path = ROOT / ".ci" / "run"
    assert os.access(path, os.X_OK)
    assert path.read_text(encoding="utf-8").splitlines()[-1] == "exec sh scripts/test.sh"


@dataclass
class Machine:
    """A project folder and a PATH that holds only what a test puts there."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.root / "bin").mkdir(parents=True)
        for tool in [*TOOLS, "cp"]:
            (self.root / "bin" / tool).symlink_to(shutil.which(tool) or "/missing")
        shutil.copytree(ROOT / "scripts", self.root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.root)
        self.environment = {"PATH": str(self.root / "bin"), "CALLS": str(self.root / "calls"), "PIP_EXIT": "0"}
        self.environment["PIP_SAYS"] = ""

    def put(self, name: str, body: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(body if body.startswith("#!") else f"#!/bin/sh\n{body}\n", encoding="utf-8")
        path.chmod(0o755)

    def put_python(self) -> None:
        self.put("bin/python3", GOOD_PYTHON)
        self.put("bin/python3.inside", INSIDE_PYTHON)

    def run(self, snippet: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [shutil.which(SHELL) or SHELL, "-c", f"set -eu; . scripts/_env.sh; {snippet}"]
        return self.start(command, **environment)

    def start(self, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        merged = {**self.environment, **environment}
        return subprocess.run(command, cwd=self.root, capture_output=True, text=True, env=merged, check=False)

    def installs(self) -> list[str]:
        calls = self.root / "calls"
        lines = calls.read_text(encoding="utf-8").splitlines() if calls.exists() else []
        return [line.split("--editable ")[-1] for line in lines if " install " in line]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "project")


def refused(done: subprocess.CompletedProcess[str], words: str) -> None:
    """One line on stderr with these words, exit status 1."""
    assert done.returncode == 1, done
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert words in done.stderr


def test_no_python(machine: Machine) -> None:
    refused(machine.run("llava_need_python"), "Python 3.10 or newer was not found on PATH")


def test_an_old_python_is_passed_over(machine: Machine) -> None:
    machine.put("bin/python3", "exit 1")
    refused(machine.run("llava_need_python"), "Python 3.10 or newer was not found")
    machine.put("bin/python3.12", GOOD_PYTHON)
    assert machine.run('llava_need_python; echo "$LLAVA_PYTHON"').stdout == "python3.12\n"


def test_a_named_python_is_not_replaced(machine: Machine) -> None:
    machine.put_python()
    refused(machine.run("llava_need_python", LLAVA_PYTHON="/nowhere/python"), "LLAVA_PYTHON=/nowhere/python is not")


def test_the_real_python_is_accepted(machine: Machine) -> None:
    done = machine.run('llava_need_python; echo "$LLAVA_PYTHON"', LLAVA_PYTHON=sys.executable)
    assert done.stdout == f"{sys.executable}\n"


@pytest.mark.parametrize("compiler", [None, "exit 1"])
def test_no_compiler(machine: Machine, compiler: str | None) -> None:
    for name in ("c++", "g++", "clang++"):
        if compiler is not None:
            machine.put(f"bin/{name}", compiler)
    refused(machine.run("llava_need_compiler"), "A working C++ compiler was not found; install one")
    machine.put("bin/clang++", "exit 0")
    assert machine.run("llava_need_compiler").returncode == 0


def test_a_full_disk(machine: Machine) -> None:
    machine.put("bin/df", "echo header; echo /dev/x 100 50 4194304 50% /")
    assert machine.run("llava_need_disk 4").returncode == 0
    refused(machine.run("llava_need_disk 10"), "found 4 GB; free space")
    machine.put_python()
    refused(machine.run("llava_venv dev"), "10 GB of free disk space are needed")


def test_no_venv_module(machine: Machine) -> None:
    machine.put("bin/python3", 'case "$*" in *ensurepip*) exit 1 ;; esac')
    refused(machine.run("llava_venv dev"), "The venv module of python3 is missing; install it")


def test_a_foreign_folder_is_never_cleared(machine: Machine) -> None:
    machine.put_python()
    machine.put("precious/thesis.txt", "years of work")
    refused(machine.run("llava_venv dev", LLAVA_VENV="precious"), "exists and is not a virtual environment")
    assert (machine.root / "precious" / "thesis.txt").exists()


def test_the_environment_is_made_once_and_grows(machine: Machine) -> None:
    machine.put_python()
    done = machine.run('llava_venv train dev; echo "$LLAVA_PYTHON"; command -v python')
    assert done.returncode == 0, done.stderr
    inside = machine.root / ".venv" / "bin" / "python"
    assert done.stdout.splitlines()[-2:] == [str(inside), str(inside)]
    assert machine.installs() == [".[train,dev]"]
    quiet = machine.run("llava_venv dev")
    assert quiet.stdout == ""
    assert machine.installs() == [".[train,dev]"]
    machine.run("llava_venv playground dev")
    assert machine.installs()[1:] == [".[train,dev,playground]"]
    with (machine.root / "constraints.txt").open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    machine.run("llava_venv dev")
    assert machine.installs()[2:] == [".[dev]"]


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("OSError: [Errno 28] No space left on device", "The disk is full; free space and run the same command again"),
        ("NewConnectionError: failed to establish", "The package index cannot be reached; check the network"),
        ("ERROR: ResolutionImpossible", "pip failed; fix the cause given in"),
    ],
)
def test_a_failed_install_is_explained_and_taken_up_again(machine: Machine, log: str, words: str) -> None:
    machine.put_python()
    refused(machine.run("llava_venv dev", PIP_EXIT="1", PIP_SAYS=log), words)
    assert machine.run("llava_venv dev").returncode == 0
    assert machine.installs() == [".[dev]", ".[dev]"]


def test_an_interrupted_environment_is_made_again(machine: Machine) -> None:
    """A kill between making the folder and copying the interpreter leaves only pyvenv.cfg."""
    machine.put_python()
    machine.put(".venv/pyvenv.cfg", "half made")
    assert machine.run("llava_venv dev").returncode == 0
    assert machine.installs() == [".[dev]"]


def test_no_install_takes_the_environment_as_it_is(machine: Machine) -> None:
    refused(machine.run("llava_venv dev", LLAVA_NO_INSTALL="1"), "is not a virtual environment; unset it")
    machine.put(".venv/bin/python", INSIDE_PYTHON)
    assert machine.run("llava_venv dev", LLAVA_NO_INSTALL="1").returncode == 0
    assert machine.installs() == []


@pytest.fixture
def checked(machine: Machine) -> Machine:
    """A machine whose environment holds fakes of every tool; each notes its name and arguments."""
    for tool in ("python", "ruff", "mypy", "shellcheck"):
        machine.put(f".venv/bin/{tool}", f'echo "{tool} $*" >>"$CALLS"; case "{tool} $*" in $FAILS*) exit 3 ;; esac')
    machine.put("bin/c++", "exit 0")
    machine.environment |= {"LLAVA_NO_INSTALL": "1", "FAILS": "none"}
    return machine


@pytest.mark.parametrize("tool", ["ruff", "mypy", "shellcheck", "python"])
def test_lint_fails_when_a_tool_does(checked: Machine, tool: str) -> None:
    lint = ["sh", "scripts/lint.sh"]
    assert checked.start(lint).returncode == 0
    assert checked.start(lint, FAILS=tool).returncode != 0


def test_lint_looks_at_every_script(checked: Machine) -> None:
    checked.put(".ci/run", "exit 0")
    checked.put("scripts_internvl/eval/mme.sh", "exit 0")
    assert checked.start(["sh", "scripts/lint.sh", "--fix"]).returncode == 0
    calls = (checked.root / "calls").read_text(encoding="utf-8")
    for name in ("./.ci/run", "./scripts/_env.sh", "./scripts_internvl/eval/mme.sh"):
        assert f"shellcheck --external-sources {name}\n" in calls
    assert ".venv" not in calls
    assert "ruff check --fix" in calls


def test_the_test_command_measures_coverage(checked: Machine) -> None:
    assert checked.start(["sh", "scripts/test.sh", "--coverage"]).returncode == 0
    calls = (checked.root / "calls").read_text(encoding="utf-8").splitlines()
    assert [call.split()[3] for call in calls if "-m coverage" in call] == ["run", "combine", "report"]
    assert calls.index("mypy ") < next(k for k, call in enumerate(calls) if "coverage run" in call)


def test_the_fast_test_command_leaves_out_slow_tests(checked: Machine) -> None:
    assert checked.start(["sh", "scripts/test.sh", "--fast"]).returncode == 0
    calls = (checked.root / "calls").read_text(encoding="utf-8")
    assert "not slow" in calls
    assert "coverage" not in calls


@pytest.mark.parametrize(
    ("flag", "step"),
    [
        ("", "mypy"),
        ("", "python -m pytest -n"),
        ("--coverage", "python -m coverage run"),
        ("--coverage", "python -m coverage combine"),
        ("--coverage", "python -m coverage rep"),
    ],
)
def test_the_test_command_fails_with_each_of_its_steps(checked: Machine, flag: str, step: str) -> None:
    command = ["sh", "scripts/test.sh", *flag.split()]
    assert checked.start(command, FAILS=step.replace(" ", "?")).returncode != 0
    refused(checked.start(["sh", "scripts/test.sh", "--wrong"]), "Unknown argument --wrong")
