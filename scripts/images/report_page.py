"""Take a screenshot of a part of a report's page: `llava report` writes report.html, with `--diff` diff.html.

python -m scripts.images.report_page report/report.html errors [--selector section] [--width 1280] [--dark]

Writes images/NAME.png. Needs the extra `dev` and Chromium.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[2]
MARGIN = 16  # pixels around the part


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("page", type=Path)
    add("name", help="of the image, without .png")
    add("--selector", default="body", help="CSS selector of the part (default: the page)")
    add("--width", type=int, default=1280, help="default: %(default)s")
    add("--height", type=int, help="crop to this height")
    add("--dark", action="store_true")
    add("--output", type=Path, default=ROOT / "images")
    args = parser.parse_args(argv)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--headless", "--no-sandbox", "--disable-gpu"])
        scheme = "dark" if args.dark else "light"
        page = browser.new_page(viewport={"width": args.width, "height": 900}, color_scheme=scheme)
        page.goto(args.page.resolve().as_uri())
        box = page.locator(args.selector).first.bounding_box()
        assert box is not None, f"{args.page} has nothing that matches {args.selector}"
        clip = {"x": max(0, box["x"] - MARGIN), "y": max(0, box["y"] - MARGIN)}
        height = min(box["height"], args.height or box["height"])
        size = {"width": min(args.width - clip["x"], box["width"] + 2 * MARGIN), "height": height + 2 * MARGIN}
        page.screenshot(path=args.output / f"{args.name}.png", clip={**clip, **size}, full_page=True)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
