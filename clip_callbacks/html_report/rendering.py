"""A picture of the report: drawn by matplotlib once for each use, with the colors of the page or on white."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

INK, FAINT, PAPER = "#010102", "#010203", "#010304"
"""Stand for the page's own colors, light or dark, in the SVG."""
VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)", PAPER: "var(--paper)"}
PRINTED = {INK: "#1c2430", FAINT: "#d5dae1", PAPER: "#ffffff"}
PRINTED_DPI = 150
SVG_DPI = FigureCanvasSVG.fixed_dpi
"""A point is a unit of an SVG."""
HEAT_MAP_DPI = 100
"""Of the heat maps in an SVG, which are pictures of pixels."""


@dataclass(frozen=True)
class Theme:
    """How a picture is to look.

    Args:
        narrow: Whether it is for a phone.
        ink: Color of text.
        faint: Color of grids.
        paper: Color of the background.
    """

    narrow: bool = False
    ink: str = INK
    faint: str = FAINT
    paper: str = PAPER

    @property
    def style(self) -> dict[Any, Any]:
        """For matplotlib."""
        return {
            "svg.fonttype": "none",
            "text.parse_math": False,
            "path.simplify": False,
            "svg.hashsalt": "clip_callbacks",
            "font.family": "sans-serif",
            "font.size": 9.0,
            "axes.titlesize": 9.5,
            "axes.titlelocation": "left",
            "axes.edgecolor": self.faint,
            "axes.facecolor": "none",
            "axes.labelcolor": self.ink,
            "axes.titlecolor": self.ink,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "figure.facecolor": "none",
            "grid.color": self.faint,
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "legend.labelcolor": self.ink,
            "text.color": self.ink,
            "xtick.color": self.ink,
            "ytick.color": self.ink,
            "lines.linewidth": 1.1,
        }


@dataclass(frozen=True)
class Chart:
    """One picture.

    Args:
        key: Its name, also that of its file.
        title: What it shows.
        caption: How to read it.
        summary: The same in words and numbers, for those who do not see it.
        draw: Draws it.
        heights: In inches, wide and narrow.
    """

    key: str
    title: str
    caption: str
    summary: str
    draw: Callable[[Figure, Theme], None]
    heights: tuple[float, float] = (3.4, 3.2)

    def svg(self, *, narrow: bool) -> str:
        """As an SVG element whose colors are the page's."""
        theme, buffer = Theme(narrow=narrow), io.StringIO()
        with self._layout(theme, FigureCanvasSVG, SVG_DPI) as figure:
            metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
            figure.savefig(buffer, format="svg", dpi=HEAT_MAP_DPI, metadata=metadata)
        return _inline(buffer.getvalue(), f"{self.key}-{'narrow' if narrow else 'wide'}")

    def write_png(self, folder: Path) -> Path:
        """Write it as a file, dark on white."""
        theme = Theme(ink=PRINTED[INK], faint=PRINTED[FAINT], paper=PRINTED[PAPER])
        path = folder / f"{self.key}.png"
        with self._layout(theme, FigureCanvasAgg, PRINTED_DPI) as figure:
            figure.savefig(path, dpi=PRINTED_DPI, facecolor=theme.paper)
        return path

    @contextmanager
    def _layout(self, theme: Theme, canvas: type[FigureCanvasBase], dpi: float) -> Iterator[Figure]:
        """Draw it, to be saved, and lay it out as the canvas measures text.

        With a layout engine ``savefig`` would draw all of it once more, for nothing but the layout.
        """
        size = (4.3, self.heights[1]) if theme.narrow else (9.4, self.heights[0])
        with mpl.rc_context(theme.style), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of letters that the font has not
            figure = Figure(figsize=size, dpi=dpi)
            canvas(figure)
            figure.set_layout_engine(layout := ConstrainedLayoutEngine())  # before: color bars are placed for it
            self.draw(figure, theme)
            layout.execute(figure)
            figure.set_layout_engine(None)
            yield figure


def _inline(text: str, prefix: str) -> str:
    """The SVG element of a file, its names made the page's only ones, its colors the page's."""
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    for stand_in, variable in VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
