"""Axes of the plots: labels that can be read."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from clip_callbacks.html_report.charts import make_charts
from clip_callbacks.html_report.page import make_sections
from clip_callbacks.html_report.rendering import SVG_DPI, Theme
from tests.helpers.logs import read, table, write


def labels(chart, *, narrow):
    """The boxes of the labels that stand side by side, for each axis of a chart."""
    with chart._layout(Theme(narrow=narrow), FigureCanvasAgg, SVG_DPI) as figure:
        figure.canvas.draw()
        for axes in figure.axes:
            low, high = sorted(axes.get_xlim())
            ticks = axes.xaxis.get_major_ticks()
            shown = [tick.label1 for tick in ticks if low <= tick.get_loc() <= high and tick.label1.get_text()]
            yield [label.get_window_extent() for label in shown if label.get_visible()]


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("decades", [0.5, 1.2, 1.4, 2, 2.4, 4, 7, 9, 15, 40, 290])
def test_labels_of_any_range_of_norms_have_room_side_by_side(decades, narrow, tmp_path):
    norms = 10 ** np.linspace(-decades, 0, 60)
    blocks = {"grad_norm/a": norms, "grad_norm/b": norms / 2}
    (section,) = make_sections([read(write(tmp_path, table(60, **{"grad/total_norm": norms}, **blocks)))], ())
    charts = {chart.key: chart for chart in make_charts([section.plotted])}
    for key in ("histogram", "what_if", "blocks-1"):
        for boxes in labels(charts[key], narrow=narrow):
            assert all(right.x0 - left.x1 > 2 for left, right in itertools.pairwise(boxes)), key
        *_, last = labels(charts[key], narrow=narrow)
        assert len(last) > 1 or not narrow
