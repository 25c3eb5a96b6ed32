"""Take screenshots of the web page with a real model: images/web_page.png and images/web_compare.png.

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


def chat(page: Page, image: Path) -> None:
    page.set_input_files("#image_box input[type=file]", image)
    expect(page.locator("#image_box img")).to_be_visible()
    for count, question in enumerate(QUESTIONS, 1):
        page.fill("#message textarea", question)
        page.locator("#message textarea").press("Enter")
        expect(page.locator("#chatbot .bot")).to_have_count(count)
        expect(page.locator("#regenerate")).to_be_enabled()


def compare(page: Page, image: Path) -> None:
    page.get_by_role("tab", name="Compare two models").click()
    page.set_input_files("#compare_images input[type=file]", image)
    expect(page.locator("#compare_images img")).to_be_visible()
    page.fill("#compare_message textarea", "What is in the image?")
    page.locator("#compare_message textarea").press("Enter")
    expect(page.locator("#leftvote")).to_be_enabled()


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
        for name, act in (("web_page", chat), ("web_compare", compare)):
            if act is compare and not args.other:
                continue
            page = browser.new_page(viewport={"width": 1280, "height": 900}, device_scale_factor=1.25)
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
