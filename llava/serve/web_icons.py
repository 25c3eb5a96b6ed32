"""Icons of the page's buttons, drawn as SVG so that they look the same whatever fonts a machine has."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_HEAD: Final = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24" fill="none" stroke="#7c8594" stroke-width="2.2" '
    'stroke-linecap="round" stroke-linejoin="round">'
)
_THUMB: Final = '<path d="M3 11h4v9H3zM7 12l4-8c2 0 3 1 3 3l-1 3h6c1 0 2 1 2 2l-2 6c0 1-1 2-2 2H7"/>'
SHAPES: Final = {
    "upvote": _THUMB,
    "downvote": f'<g transform="rotate(180 12 12)">{_THUMB}</g>',
    "flag": '<path d="M5 21V4M5 4h13l-3 4 3 4H5"/>',
    "regenerate": '<path d="M20 12a8 8 0 1 1-3-6.2M20 3v4h-4"/>',
    "stop": '<rect x="6" y="6" width="12" height="12" rx="1" fill="#7c8594"/>',
    "clear": '<path d="M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13M10 11v5M14 11v5"/>',
    "save": '<path d="M12 4v11M7 10l5 5 5-5M4 20h16"/>',
    "leftvote": '<path d="M20 12H4M10 6l-6 6 6 6"/>',
    "rightvote": '<path d="M4 12h16M14 6l6 6-6 6"/>',
    "tievote": '<path d="M5 9h14M5 15h14"/>',
    "bothbad_vote": '<path d="M6 6l12 12M18 6L6 18"/>',
}


def write_icons(folder: Path) -> dict[str, str]:
    """Write all icons to `folder`; their paths by name."""
    paths = {}
    for name, shape in SHAPES.items():
        path = folder / f"{name}.svg"
        path.write_text(f"{_HEAD}{shape}</svg>\n", encoding="utf-8")
        paths[name] = str(path)
    return paths
