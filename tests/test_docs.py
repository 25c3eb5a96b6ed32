"""Documentation tests: commands and flags exist, links resolve, examples run, the site builds, images have a source."""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from llava import cli, errors
from llava.serve.main import SERVICES
from tests.test_package import ROOT

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
PAGES += [ROOT / name / "README.md" for name in ("benchmarks", "images", "playground", "playground/data", "pretrained")]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:llava|sh|python|python -m) [a-z_][^`]*)`")
PLAIN = {
    ".",
    "apt-get",
    "cd",
    "curl",
    "docker",
    "git",
    "huggingface-cli",
    "kubectl",
    "lmms-eval",
    "python3",
    "systemctl",
    "xcode-select",
}
MODEL = "pretrained/InternVL-Chat-ViT-6B-Vicuna-7B"
# They run until stopped: tests/serve starts and stops them.
SERVERS = {
    f"llava.serve.{name}"
    for name in ("controller", "gradio_web_server", "main", "model_worker", "openai_worker", "serve_all")
}


def blocks(page: Path, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def written(page: Path) -> list[str]:
    """The commands of a page's shell blocks, in order."""
    lines = "\n".join(blocks(page, "sh", "bash")).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and line[0] != "#"]


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line in a shell block, and of every inline command."""
    found = []
    for page in PAGES:
        inline = INLINE.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
        found += [(page.name, command.strip()) for command in [*written(page), *inline]]
    return sorted(set(found))


def words_of(command: str) -> list[str]:
    """The command's words, without variables set in front."""
    words = shlex.split(" ".join(command.split()))
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    return words


def module_of(words: list[str]) -> str | None:
    """The module of ours that a command runs."""
    if words[:2] == ["llava", "serve"] and len(words) > 2 and words[2] in SERVICES:
        return SERVICES[words[2]][0]
    if words[0] == "llava" and len(words) > 1 and words[1] in cli.COMMANDS:
        return cli.COMMANDS[words[1]].module
    return words[2] if words[:2] == ["python", "-m"] and words[2].startswith("llava.") else None


@functools.cache
def help_of(module: str) -> str:
    """What `--help` of a module prints."""
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_commands_to_check() -> None:
    found = [command for _, command in commands()]
    assert "sh scripts_internvl/quickstart.sh" in found
    assert "sh scripts/test.sh" in found
    assert len(found) > 30


@pytest.mark.parametrize(("page", "command"), commands())
def test_command_exists(page: str, command: str) -> None:
    words = words_of(command)
    program = words[0]
    if program in ("sh", "python") and words[1] != "-m":
        assert (ROOT / words[1]).is_file(), f"{page}: {words[1]} does not exist"
    elif program == "llava":
        assert len(words) == 1 or words[1] in {*cli.COMMANDS, "COMMAND", "--help", "--version"}, f"{page}: {command}"
    elif program == "python":
        assert words[2] == "llava" or importlib.util.find_spec(words[2]) is not None, f"{page}: {command}"
    elif program == "pip":
        extras = {name for word in words for group in re.findall(r"\[(.*)\]", word) for name in group.split(",")}
        text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        assert {name for name in extras if not re.search(rf"^{name} = \[", text, re.MULTILINE)} == set()
    else:
        assert program in PLAIN, f"{page}: {command}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "command"), [(page, command) for page, command in commands() if module_of(words_of(command))]
)
def test_flags_are_known(page: str, command: str) -> None:
    words = words_of(command)
    flags = {word.split("=")[0] for word in words if word.startswith("--") and word != "--help"}
    known = set(re.findall(r"--[\w-]+", help_of(module_of(words) or "")))
    assert flags - known == set(), f"{page}: {command}"


def test_recipes_named_in_the_readme_exist() -> None:
    named = set(re.findall(r"`((?:pretrain|finetune)_\w+\.sh)`", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert len(named) == 8
    assert {name for name in named if not (ROOT / "scripts_internvl" / name).is_file()} == set()


def test_recipes_find_the_weights_where_the_readme_puts_them() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    downloaded = set(re.findall(r"--local-dir (pretrained/\S+)", page))
    recipes = set(re.findall(r"`((?:pretrain|finetune)_\w+\.sh)`", page))
    printed = [
        subprocess.run(
            ["sh", f"scripts_internvl/{recipe}", "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for recipe in recipes
    ]
    wanted = set(re.findall(r"pretrained/[\w.-]+", " ".join(printed)))
    assert len(wanted) == 4
    assert wanted - downloaded == set()


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        if target.startswith("https://"):
            continue
        name, _, fragment = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.is_file(), f"{page.name}: {target}"
        if fragment:
            headings = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert fragment in map(anchor, headings), f"{page.name}: {target}"


def test_every_error_code_has_its_section() -> None:
    codes = {kind.code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "code")}
    page = (ROOT / "docs" / "Troubleshooting.md").read_text(encoding="utf-8")
    assert len(codes) > 5
    assert codes == {heading for heading in re.findall(r"^## (.*)", page, re.MULTILINE) if heading.isupper()}


def test_the_pages_name_no_place_of_their_writing() -> None:
    for page in PAGES:
        assert not re.search(r"/(work|home|root|tmp)/", page.read_text(encoding="utf-8")), page.name


def test_json_examples_are_records() -> None:
    for page in PAGES:
        for block in blocks(page, "json"):
            found = json.loads(block)
            for record in found if isinstance(found, list) else [found]:
                assert {turn["from"] for turn in record["conversations"]} == {"human", "gpt"}


@pytest.fixture
def photo_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that the examples speak of."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30), (200, 30, 30)).save("photo.jpg")
    Image.new("RGB", (40, 30), (30, 30, 200)).save("images/one.png")
    question = {"question_id": 1, "image": "one.png", "text": "What color is the shape?", "category": "default"}
    Path("questions.jsonl").write_text(json.dumps(question) + "\n", encoding="utf-8")
    return tmp_path


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 260
    (example,) = blocks(ROOT / "README.md", "python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 10


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/Inference.md"])
def test_the_python_examples_run(
    page: str, tiny_dirs: dict[str, Path], photo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = "\n".join(blocks(ROOT / page, "python"))
    assert MODEL in example
    program = example.replace(MODEL, str(tiny_dirs["chat"])).replace("max_new_tokens=64", "max_new_tokens=4")
    if "max_new_tokens" not in program:
        program = program.replace("SamplingParams(", "SamplingParams(max_new_tokens=4, ")
    exec(compile(program, page, "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", sorted({c for _, c in commands() if MODEL in c and module_of(words_of(c)) not in (None, *SERVERS)})
)
def test_model_command_runs(command: str, tiny_dirs: dict[str, Path], photo_folder: Path) -> None:
    """With the tiny model instead of the 7B one, nothing typed, and at most a few words of answer."""
    words = [str(tiny_dirs["chat"]) if word == MODEL else word for word in words_of(command)]
    start = [sys.executable, "-m", module_of(words) or "", *words[(words[0] == "llava" and 2) or 3 :]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*start, "--max-new-tokens", "4"], input="", capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    if "--answers-file" in words:
        (answer,) = Path("answers.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(answer)["question_id"] == 1


def missing_site_package() -> str | None:
    """The first package of the extra `docs` that is not installed."""
    names = ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers.python")
    for name in names:
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return name
    return None


@pytest.mark.slow
@pytest.mark.skipif(missing_site_package() is not None, reason="mkdocs is not installed; pip install 'llava[docs]'")
def test_the_site_builds_without_warnings_and_other_hosts(tmp_path: Path) -> None:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "ARCHITECTURE.html", "engine.html", "benchmarks.html"} <= set(pages)
    assert "SamplingParams" in pages["engine.html"] and "load_pretrained_model" in pages["model.html"]
    loaded = re.compile(r"""<(?:script|img|iframe|link(?! rel="canonical"))[^>]*(?:src|href)=["']?(?:https?:)?//""")
    assert [name for name, html in pages.items() if loaded.search(html)] == []
    styles = [path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.css")]
    assert not any(re.search(r"""(?:url\(|@import )["']?(?:https?:)?//""", style) for style in styles)


def test_every_image_has_a_source_and_a_use() -> None:
    listed = dict(re.findall(r"^\| `([\w.]+)` \|.*\| `([^`]+)`[^|]*\|$", text_of("images/README.md"), re.MULTILINE))
    images = {path.name for path in (ROOT / "images").iterdir() if path.suffix != ".md"}
    assert images == set(listed)
    for command in listed.values():
        name = next(word for word in command.split() if "scripts" in word)
        assert (ROOT / (name if "/" in name else name.replace(".", "/") + ".py")).is_file(), command
    used = "".join(page.read_text(encoding="utf-8") for page in PAGES if page.parent.name != "images")
    assert {name for name in images if f"images/{name})" not in used} == set()


def test_the_architecture_drawing_is_up_to_date(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/images/architecture.py", "--output", str(tmp_path / "drawing.svg")]
    subprocess.run(command, cwd=ROOT, check=True)
    assert (tmp_path / "drawing.svg").read_text(encoding="utf-8") == text_of("images/architecture.svg")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")
