"""Take screenshots of the web page with a real model: images/web_page.png, web_phone.png and web_compare.png.

python -m scripts.images.screenshots [--model CHECKPOINT] [--other CHECKPOINT]

The default checkpoint is that of the quickstart, with one of its test images, enlarged; `--other` is compared with it.
Needs the extras `serve` and `dev` and Chromium.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
TEST_IMAGES = ROOT / "playground" / "data" / "easy_vqa" / "test"
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
PATIENCE = 120_000  # milliseconds
SIDE = 160  # pixels of the enlarged image
QUESTIONS = ("What shape is in the image?", "What color is the shape?")


@contextmanager
def served(models: Sequence[str]) -> Iterator[str]:
    """The URL of a web page for these checkpoints."""
    flags = [word for model in models for word in ("--model", model)]
    command = [sys.executable, "-m", "llava.serve.main", "all", *flags, "--device", "cpu"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            found = next(filter(None, (re.search(r"http://[\w.:]+", line) for line in process.stdout)), None)
            if found is None:
                raise RuntimeError("llava serve all ended without a URL; see its log above.")
            yield found[0].rstrip(".")
        finally:
            process.terminate()


def attach(page: Page, box: str, image: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.locator(f"#{box} .upload-button").click()
    chooser.value.set_files(image)
    expect(page.locator(f"#{box} .thumbnail-item")).to_be_visible()


def ask(page: Page, box: str, text: str) -> None:
    page.fill(f"#{box} textarea", text)
    page.locator(f"#{box} textarea").press("Enter")
    expect(page.locator(f"#{box} .stop-button")).to_be_visible()
    expect(page.locator(f"#{box} .submit-button")).to_be_visible()


def chat(page: Page, image: Path) -> None:
    attach(page, "message", image)
    for question in QUESTIONS:
        ask(page, "message", question)


def compare(page: Page, image: Path) -> None:
    page.get_by_role("tab", name="Compare two models").click()
    attach(page, "compare_message", image)
    ask(page, "compare_message", "What is in the image?")


SHOTS = (
    ("web_page", chat, (1280, 940), "light"),
    ("web_phone", chat, (390, 844), "dark"),
    ("web_compare", compare, (1280, 800), "light"),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="work_dirs/finetune_quickstart", help="default: %(default)s")
    parser.add_argument("--other", help="second checkpoint, for images/web_compare.png")
    parser.add_argument("--image", type=Path, default=TEST_IMAGES / "0.png")
    parser.add_argument("--output", type=Path, default=ROOT / "images")
    args = parser.parse_args(argv)
    expect.set_options(timeout=PATIENCE)
    models = [args.model, *([args.other] if args.other else [])]
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with tempfile.TemporaryDirectory() as folder, served(models) as address, sync_playwright() as driver:
        enlarged = Path(folder) / "image.png"
        with Image.open(args.image) as image:
            image.convert("RGB").resize((SIDE, SIDE)).save(enlarged)
        browser = driver.chromium.launch(executable_path=chromium, args=list(FLAGS))
        for name, act, (width, height), scheme in SHOTS:
            if act is compare and not args.other:
                continue
            look = {"viewport": {"width": width, "height": height}, "device_scale_factor": 1.25, "color_scheme": scheme}
            page = browser.new_page(**look)
            page.set_default_timeout(PATIENCE)
            page.goto(address)
            expect(page.locator("#model_selector_row input")).to_have_value(re.compile(".+"))
            act(page, enlarged)
            page.mouse.move(0, 0)
            page.screenshot(path=args.output / f"{name}.png")
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
