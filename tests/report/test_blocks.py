"""Blocks in the report: heat maps of their statistics, and blocks that do not learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from clip_callbacks.html_report.charts import make_charts
from clip_callbacks.html_report.downsampling import column_extremes
from clip_callbacks.html_report.heat_map import BLOCK_METRICS, heat_map
from clip_callbacks.html_report.page import make_sections
from clip_callbacks.html_report.rendering import Theme
from clip_callbacks.html_report.runs import Run
from clip_callbacks.html_report.series import Series
from clip_callbacks.html_report.vanished import vanished_blocks, vanished_chart
from clip_callbacks.stats.vanished_block import VanishedBlock, describe
from tests.helpers.logs import read, said, table, write, write_guarded

MEANS, ZEROS = (next(metric for metric in BLOCK_METRICS if metric.key == key) for key in ("means", "zeros"))


def image(chart):
    figure = Figure()
    chart.draw(figure, Theme())
    (drawn,) = figure.axes[0].images
    return drawn


def series(values):
    return Series.of(np.arange(len(values)), values)


def test_each_metric_of_blocks_has_its_heat_map(tmp_path):
    (section,) = make_sections([read(write_guarded(tmp_path))], ())
    keys = [chart.key for chart in make_charts([section.plotted])]
    blocks = ["blocks-1", "updates-1", "weights-1", "means-1", "deviations-1", "zeros-1", "vanished-1"]
    assert keys == ["norm", "loss", "loss_limit", "coefficient", "histogram", "what_if", *blocks]


def test_means_of_either_sign_have_colors_centered_on_0():
    drawn = image(heat_map({"a": series([-1e-3, 2e-3, 0.0]), "b": series([0.0, -4e-3, 1e-5])}, MEANS, 1, "run"))
    middle = drawn.norm(0.0)
    assert middle == pytest.approx(0.5)
    assert drawn.norm(-4e-3) == pytest.approx(0.0)
    assert drawn.norm(2e-3) - middle == pytest.approx(middle - drawn.norm(-2e-3))
    np.testing.assert_array_equal(drawn.get_array(), [[-1e-3, 2e-3, 0.0], [0.0, -4e-3, 1e-5]])
    assert drawn.norm(1e-5) > middle + 0.001, "what is small beside the largest can still be told from 0"


def test_a_spike_leaves_the_other_means_their_colors():
    values = np.where(np.arange(100) % 2, 1e-3, -1e-3)
    values[50] = 1.0
    norm = image(heat_map({"a": series(values)}, MEANS, 1, "run")).norm
    assert norm(1e-3) - norm(-1e-3) > 0.2


def test_means_that_are_all_0_can_be_drawn():
    assert image(heat_map({"a": series([0.0, 0.0])}, MEANS, 1, "run")).norm(0.0) == pytest.approx(0.5)


class CountedMetrics(dict):
    """Metrics that count how often all of them are gone through."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def test_the_work_for_silent_blocks_grows_with_their_number_only():
    passes = []
    for count in (10, 40):
        blocks = {f"grad_norm/{number}": series(np.zeros(20)) for number in range(count)}
        metrics = CountedMetrics({"grad/total_norm": series(np.ones(20))} | blocks)
        (log,) = Run("run", "", metrics).optimizer_logs
        assert len(vanished_blocks(log)) == count
        passes.append(metrics.passes)
    assert passes[0] == passes[1]


@pytest.mark.parametrize(("one", "two"), [(5e-324, 1e-310), (1e-308, 1e-308), (0.0, 1e308), (1.7e308, 1e308), (5e-324, 1.7e308)])
def test_values_at_the_ends_of_float64_can_be_drawn(tmp_path, one, two):
    prefixes = dict.fromkeys(("grad_norm/", "weight_norm/", "update_ratio/", "grad_std/"), 1.0) | {"grad_mean/": -1.0}
    values = np.where(np.arange(50) % 2, one, two)
    columns = {prefix + block: sign * values for prefix, sign in prefixes.items() for block in "ab"}
    (section,) = make_sections([read(write(tmp_path, table(50, **columns)))], ())
    charts = [chart for chart in make_charts([section.plotted]) if chart.key.endswith("-1")]
    assert len(charts) >= len(prefixes)
    for chart in charts:
        assert np.isfinite(image(chart).get_array()).any()
        chart.svg(narrow=False)
        assert "inf" not in chart.summary
        assert "nan" not in chart.summary


def test_shares_of_zeros_have_a_fixed_scale_and_keep_0():
    drawn = image(heat_map({"a": series([0.0, 0.25])}, ZEROS, 1, "run"))
    assert (drawn.norm.vmin, drawn.norm.vmax) == (0.0, 1.0)
    np.testing.assert_array_equal(drawn.get_array(), [[0.0, 0.25]])


def test_a_column_shows_the_value_furthest_from_0():
    values = np.array([1.0, -3.0, 2.0, 0.5, -0.25, 0.0])
    np.testing.assert_array_equal(column_extremes(series(values), 0, 5, 3), [-3.0, 2.0, -0.25])
    assert np.isnan(column_extremes(series([1.0]), 0, 9, 2)[1])


# ---- blocks without learning -----------------------------------------------------------------------------------------------------


def vanishing(**metrics):
    """A run of 60 steps in three epochs, with the norms and shares of some blocks."""
    norms = {"grad/total_norm": series(np.ones(60)), "grad_norm/fine": series(np.ones(60))}
    epochs = {"grad/total_norm_p50": Series.of([19, 39, 59], [1.0] * 3)}
    (log,) = Run("run", "", norms | epochs | {key.replace("__", "/"): value for key, value in metrics.items()}).optimizer_logs
    return log


def test_epochs_in_which_a_block_was_named_are_stretches():
    log = vanishing(grad_vanished__late=Series.of([39, 59], [0.6, 0.9]), grad_vanished__early=Series.of([19], [1.0]))
    found = vanished_blocks(log)
    assert list(found) == ["early", "late"]
    assert (found["early"].spans, found["early"].share, found["early"].epochs) == (((0, 19),), 1.0, 1)
    assert (found["late"].spans, found["late"].share, found["late"].epochs) == (((20, 39), (40, 59)), 0.9, 2)


def test_the_strip_says_what_the_monitor_has_judged():
    log = vanishing(grad_vanished__late=Series.of([39, 59], [0.6, 0.9]))
    caption = vanished_chart(log, 1).caption
    assert "more than half of its entries" in caption
    assert "for at least 100 steps. In a long epoch these may be 1,000 of its steps" in caption
    assert "of epochs that were judged together, with fewer than 100 steps each, only the last one is red" in caption


def test_the_page_and_the_warning_give_the_same_causes(tmp_path):
    page = said(read(write(tmp_path, frame_of())))
    blocks = [VanishedBlock("zero", 1.0, True, torch.float32, 0.1, 1.0)]
    blocks += [VanishedBlock(str(dtype), 1.0, False, dtype, 0.1, 1.0) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    causes = [line for line in describe(blocks, 100, 100).splitlines() if line.startswith(("Likely", "In "))]
    assert len(causes) == 3
    assert " ".join(causes) in page


def test_norms_of_exactly_0_are_told_of_with_what_they_leave_open():
    log = vanishing(
        grad_norm__silent=series(np.zeros(60)), grad_norm__once=series([0.0] * 59 + [1e-30]), grad_norm__new=series([0.0] * 9)
    )
    found = vanished_blocks(log)
    assert list(found) == ["silent"]
    assert (found["silent"].spans, found["silent"].epochs) == (((0, 59),), 0)
    chart = vanished_chart(log, 1)
    assert "The log does not tell whether its gradient was zero or whether it had none" in chart.caption
    assert "steps 0 to 59" in chart.summary


def test_a_healthy_run_has_no_strip():
    assert vanished_chart(vanishing(), 1) is None
    everything_zero = {"grad/total_norm": series(np.zeros(60)), "grad_norm/a": series(np.zeros(60))}
    assert vanished_chart(Run("run", "", everything_zero).optimizer_logs[0], 1) is None, "then it is no block that stands out"


def frame_of(**columns):
    named = {key.replace("__", "/"): value for key, value in columns.items()}
    ends = np.where(np.arange(100) % 50 == 49, 1.0, math.nan)
    return table(100, **{"grad_norm/fine": 0.5, "grad_norm/lost": 0.1, "grad_vanished/lost": ends} | named)


@pytest.mark.parametrize(
    ("columns", "cause"),
    [
        (
            {"grad_zeros__lost": 1.0},
            "The gradient was exactly zero. Likely causes of gradients that are exactly 0: a ReLU that is 0 for every input",
        ),
        ({"grad_norm__lost": 0.0}, "The gradient was exactly zero. Likely causes"),
        ({"grad_zeros__lost": 0.0}, "The gradient was not zero, but the updates were too small to change the weights."),
        ({}, "Either the gradient was exactly zero"),
    ],
)
def test_findings_give_the_causes_that_the_log_admits(columns, cause, tmp_path):
    text = said(read(write(tmp_path, frame_of(**columns))))
    assert f"Did not learn for 100 steps or more: lost (100% of its entries, at the end of 2 epochs). {cause}" in text
    for dtype, lost in (("bfloat16", "0.002"), ("float16", "0.0002"), ("float32", "3e-08")):
        assert (dtype in text and f"smaller than {lost}" in text) == ("too small" in text)
    assert ('"bf16-mixed" instead of "bf16-true"' in text) == ("too small" in text)


def test_a_norm_of_0_alone_is_a_note(tmp_path):
    frame = table(100, **{"grad_norm/fine": 0.5, "grad_norm/frozen": 0.0, "update_ratio/frozen": 0.0, "grad_zeros/frozen": 1.0})
    (section,) = make_sections([read(write(tmp_path, frame))], ())
    (finding,) = [finding for finding in section.findings if "frozen" in finding.text]
    assert finding.severity == "note"
    assert "frozen and unused parameters have none, and then nothing is wrong" in finding.text


def test_many_zeros_are_a_note_that_names_the_usual_reasons(tmp_path):
    frame = table(100, **{"grad_zeros/embedding": 0.97, "grad_zeros/head": 0.1})
    (section,) = make_sections([read(write(tmp_path, frame))], ())
    (finding,) = [finding for finding in section.findings if "exactly zero" in finding.text]
    assert finding.severity == "note"
    assert "At least half of the gradient of embedding (97%) is exactly zero in the median step." in finding.text


@pytest.mark.parametrize(("ratio", "severity"), [(1e-3, None), (1e-6, "note"), (1e-9, "note"), (0.0, "warn")])
def test_only_updates_of_exactly_0_change_nothing(ratio, severity, tmp_path):
    (section,) = make_sections([read(write(tmp_path, table(100, **{"update_ratio/slow": ratio})))], ())
    found = [finding for finding in section.findings if "slow" in finding.text]
    assert [finding.severity for finding in found] == ([severity] if severity else [])
    for claim in ("the updates change nothing", "In bfloat16, updates smaller than 0.002 of a weight are rounded away"):
        assert any(claim in finding.text for finding in found) == (ratio == 0)


def test_a_block_that_the_monitor_has_named_is_explained_once(tmp_path):
    vanished = np.where(np.arange(200) % 100 == 99, 1.0, math.nan)
    frame = table(200, **{"update_ratio/lost": 0.0, "grad_vanished/lost": vanished})
    (section,) = make_sections([read(write(tmp_path, frame))], ())
    assert [finding.text.split(":")[0] for finding in section.findings if "lost" in finding.text] == [
        "Did not learn for 100 steps or more"
    ]


@pytest.mark.parametrize("ratio", [{}, {"update_ratio/bias": 1e-3}])
def test_a_small_norm_does_not_tell_how_fast_a_block_learns(ratio, tmp_path):
    norms = table(100)["grad/total_norm"]
    frame = table(100, **{"grad_norm/whole": 0.5 * norms, "grad_norm/bias": 1e-6 * norms}, **ratio)
    (section,) = make_sections([read(write(tmp_path, frame))], ())
    found = [finding for finding in section.findings if "bias" in finding.text]
    assert [finding.severity for finding in found] == ([] if ratio else ["note"])
    assert all("The norm of bias is less than 0.0001 of total_norm in the median step." in finding.text for finding in found)
