"""Rendering of the plots with matplotlib: as SVG in the colors of the page, or as PNG on white."""

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
"""Placeholders in the SVG for the colors of the page, which depend on light or dark mode."""
CSS_VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)", PAPER: "var(--paper)"}
PRINTED = {INK: "#1c2430", FAINT: "#d5dae1", PAPER: "#ffffff"}
"""The colors of a PNG file."""
PRINTED_DPI = 150
SVG_DPI = FigureCanvasSVG.fixed_dpi
"""The resolution at which one point is one unit of the SVG."""
HEAT_MAP_DPI = 100
"""The resolution of the heat maps, which an SVG holds as images of pixels."""
WIDTHS = (9.4, 4.3)
"""Width in inches on a wide and on a narrow screen."""


@dataclass(frozen=True)
class Theme:
    """Size and colors of a plot.

    Args:
        narrow: If True, the plot is for the screen of a phone.
        ink: Color of the text.
        faint: Color of the grid.
        paper: Color of the background.
    """

    narrow: bool = False
    ink: str = INK
    faint: str = FAINT
    paper: str = PAPER

    @property
    def name_length(self) -> int:
        """The number of characters of a name beside a plot."""
        return 22 if self.narrow else 44

    @property
    def style(self) -> dict[Any, Any]:
        """Settings for matplotlib."""
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
    """One plot of the report.

    Args:
        key: Identifier on the page, and name of the PNG file without its suffix.
        title: Heading above the plot.
        caption: Sentences below the plot that explain how to read it.
        summary: Description of the plot in words and numbers, for readers who cannot see it.
        draw: Function that draws the plot into a figure.
        heights: Height in inches on a wide and on a narrow screen.
    """

    key: str
    title: str
    caption: str
    summary: str
    draw: Callable[[Figure, Theme], None]
    heights: tuple[float, float]

    def svg(self, *, narrow: bool) -> str:
        """Draw the plot as an SVG element in the colors of the page."""
        theme, buffer = Theme(narrow=narrow), io.StringIO()
        with self._layout(theme, FigureCanvasSVG, SVG_DPI) as figure:
            metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
            figure.savefig(buffer, format="svg", dpi=HEAT_MAP_DPI, metadata=metadata)
        return _inline(buffer.getvalue(), f"{self.key}-{'narrow' if narrow else 'wide'}")

    def write_png(self, folder: Path) -> Path:
        """Write the plot into a folder as a PNG file, dark on white."""
        theme = Theme(ink=PRINTED[INK], faint=PRINTED[FAINT], paper=PRINTED[PAPER])
        path = folder / f"{self.key}.png"
        with self._layout(theme, FigureCanvasAgg, PRINTED_DPI) as figure:
            figure.savefig(path, dpi=PRINTED_DPI, facecolor=theme.paper)
        return path

    @contextmanager
    def _layout(self, theme: Theme, canvas: type[FigureCanvasBase], dpi: float) -> Iterator[Figure]:
        """Draw the plot, and lay it out with the text sizes of the canvas that will save it.

        The layout is computed here once, because ``savefig`` with a layout engine would draw everything a second time for it.
        """
        size = WIDTHS[theme.narrow], self.heights[theme.narrow]
        with mpl.rc_context(theme.style), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # names may have letters that the font lacks
            figure = Figure(figsize=size, dpi=dpi)
            canvas(figure)
            figure.set_layout_engine(layout := ConstrainedLayoutEngine())  # before drawing: it decides how color bars are placed
            self.draw(figure, theme)
            layout.execute(figure)
            figure.set_layout_engine(None)
            yield figure


def _inline(text: str, prefix: str) -> str:
    """Turn an SVG file into an element of the page: with identifiers that are unique there, in the colors of the page."""
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    for stand_in, variable in CSS_VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
