"""Figures: the same fonts, sizes and files everywhere."""

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it takes a second to import
    from matplotlib.figure import Figure

CHINESE = re.compile(
    "CJK|YaHei|SimHei|PingFang|Hiragino|WenQuanYi|Arial Unicode"
)  # fonts that have it


def figure(width: float, height: float, columns: int = 1) -> tuple["Figure", Any]:
    """An empty figure of so many inches and its axes. Needs no display; Chinese labels are drawn where a font has them,
    and a label may hold `$`."""
    from matplotlib import font_manager, rcParams
    from matplotlib.figure import Figure

    rcParams["font.family"] = [
        "DejaVu Sans",
        *sorted(set(filter(CHINESE.search, font_manager.get_font_names()))),
    ]
    rcParams["text.parse_math"] = False
    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(1, columns)


def save(fig: "Figure", file: Path) -> None:
    """Write it as a PNG."""
    with warnings.catch_warnings(
        action="ignore"
    ):  # Chinese where no font has it: a warning for each character
        fig.savefig(file, dpi=150)
