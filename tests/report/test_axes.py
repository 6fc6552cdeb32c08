"""Axes of the plots: labels that can be read."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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


def drawn_axes(folder, frame, key):
    """The axes of a plot of a log, as they are when it is drawn."""
    (section,) = make_sections([read(write(folder, frame))], ())
    (chart,) = (chart for chart in make_charts([section.plotted]) if chart.key == key)
    figure = Figure()
    chart.draw(figure, Theme())
    figure.canvas.draw()
    return figure.axes[0]


def visible_labels(axis):
    low, high = axis.get_view_interval()
    return [axis.get_major_formatter()(place, 0) for place in axis.get_ticklocs() if low <= place <= high]


@pytest.mark.parametrize("key", ["norm", "coefficient", "loss_limit"])
def test_a_single_row_is_drawn_as_a_point(tmp_path, key):
    axes = drawn_axes(tmp_path, table(1, **{"grad/loss": 2.0}), key)
    (line,) = [line for line in axes.get_lines() if str(line.get_gid()).startswith(("total_norm", "clip_coef", "guarded_loss"))]
    assert line.get_marker() == "."
    labels = visible_labels(axes.xaxis)
    assert "0" in labels
    assert len(set(labels)) == len(labels), "steps are whole numbers"


@pytest.mark.parametrize("spread", [0.0, 1e-16, 1e-9, 1e-3, 0.1, 1.0, 3.0, 100.0])
def test_norms_of_any_spread_have_labels_that_differ(tmp_path, spread):
    norms = 2.1 * (1 + spread * np.linspace(0, 1, 50))
    labels = visible_labels(drawn_axes(tmp_path, table(50, **{"grad/total_norm": norms, "grad/max_norm": 2.1}), "norm").yaxis)
    assert len(labels) > 1
    assert len(set(labels)) == len(labels)
