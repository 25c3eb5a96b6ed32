"""MkDocs hooks: pages and images outside docs/ join the site, and links to them are rewritten."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT: Final = Path(__file__).resolve().parents[1]
PAGES: Final = {
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "LICENSE": "LICENSE",
    "SECURITY.md": "SECURITY.md",
    "benchmarks/README.md": "benchmarks.md",
    "images/README.md": "images.md",
}
FENCE: Final = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
LINK: Final = re.compile(r"""(\]\(|\b(?:src|href)=")([^)\s"#:]+)""")


def site_paths() -> dict[str, str]:
    """Path in the site of every file outside docs/ that belongs to it, by its path in the repository."""
    images = (path for path in (ROOT / "images").iterdir() if path.suffix in (".png", ".svg"))
    return {**PAGES, **{name: name for name in (path.relative_to(ROOT).as_posix() for path in sorted(images))}}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    for source, target in site_paths().items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    paths = site_paths()
    here = page.file.src_uri
    source = next((name for name, target in paths.items() if target == here), f"docs/{here}")

    def rewrite(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        target = paths.get(target, target.removeprefix("docs/"))
        return match[1] + posixpath.relpath(target, posixpath.dirname(here) or ".")

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(rewrite, part) for part in parts)
