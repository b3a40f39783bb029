"""Figures: the same fonts, sizes and files everywhere."""

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it takes a second to import
    from matplotlib.figure import Figure

# fonts that have Chinese
CHINESE = re.compile("CJK|YaHei|SimHei|PingFang|Hiragino|WenQuanYi|Arial Unicode")


def figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple["Figure", Any]:
    """An empty figure of so many inches and its axes, an array of them for several.

    It needs no display. Chinese labels are drawn where a font has them; a label may hold `$`."""
    from matplotlib import font_manager, rcParams
    from matplotlib.figure import Figure

    installed = set(font_manager.get_font_names())
    chinese = sorted(filter(CHINESE.search, installed))
    rcParams["font.family"] = ["DejaVu Sans", *chinese]
    rcParams["text.parse_math"] = False
    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(rows, columns)


def save(fig: "Figure", file: Path) -> None:
    """Write it as a PNG."""
    # where no font has Chinese, matplotlib warns of each character
    with warnings.catch_warnings(action="ignore"):
        fig.savefig(file, dpi=150)
