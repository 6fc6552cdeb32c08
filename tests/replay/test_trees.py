"""The tree of module calls, and the plot."""

from __future__ import annotations

import math

import pytest
import torch

from clip_callbacks.cli import main
from clip_callbacks.replay.module_calls import ModuleCall
from clip_callbacks.replay.ranges import ValueRange
from clip_callbacks.replay.suspects import SuspectModule, find_suspects
from clip_callbacks.replay.tree import MAX_CALLS_IN_FULL, draw_tree
from tests.helpers.replaying import Net, config

pytestmark = [
    pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Spike at:RuntimeWarning"),
]


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_picture_is_drawn_in_the_format_of_its_suffix(bad, tmp_path, capsys, kind):
    path = tmp_path / f"picture.{kind}"
    assert main(["replay", str(bad), *config(tmp_path, Net, kind="log"), "-o", str(path)]) == 0
    content = path.read_bytes()
    if kind == "png":
        assert content.startswith(b"\x89PNG")
    else:
        text = content.decode()
        assert "First non-finite output:" in text
        assert 'id="max |activation|: non-finite"' in text
        assert "net.3" in text
    assert f"Picture: {path}" in capsys.readouterr().out


def span(value):
    return ValueRange.of(torch.tensor([value]))


def test_of_calls_within_each_other_that_break_a_gradient_the_innermost_is_the_suspect():
    outer = ModuleCall("net", "Sequential", grad_output=span(1.0), nonfinite_since=3, end_order=1)
    inner = ModuleCall("net.0", "Root", parent=outer, grad_output=span(1.0), nonfinite_since=3, end_order=0)
    assert [suspect.call for suspect in find_suspects([outer, inner], 1e3)] == [inner]


def test_no_module_is_a_suspect_for_parameters_that_were_non_finite_before():
    outer = ModuleCall("net", "Sequential", inputs=span(1.0), outputs=span(math.nan), end_order=1)
    inner = ModuleCall("net.0", "Linear", 1, outer, span(1.0), ("weight",), span(math.nan), end_order=0)
    assert find_suspects([outer, inner], 1e3) == []
    inner.nonfinite_tensors = ()
    assert [suspect.call for suspect in find_suspects([outer, inner], 1e3)] == [inner]


def test_trees_fold_calls_that_are_finite_and_calls_behind_a_suspect():
    calls = [ModuleCall("net", "Sequential", inputs=span(1.0), outputs=span(math.nan), end_order=1)]
    for number in range(40):
        healthy = number < 20
        layer = ModuleCall(
            f"net.{number}", "Block", 1, calls[0], span(1.0 if healthy else math.nan), (), span(1.0 if healthy else math.nan)
        )
        layer.end_order = number
        inner = ModuleCall(f"net.{number}.0", "Linear", 1, layer, layer.inputs, (), layer.outputs)
        inner.end_order = number
        calls += [layer, inner]
    assert len(calls) > MAX_CALLS_IN_FULL
    suspect = SuspectModule("output", calls[41], "made it")
    text = draw_tree("root", calls, [suspect])
    assert "… 18 more, all finite" in text
    assert "… 17 more, all non-finite" in text
    assert "… 1 finite call inside\n" in text
    assert "… 1 non-finite call inside\n" in text
    assert "net.20 (Block): [1, 1] → all NaN  ◀ first non-finite output" in text.replace("all NaN → all NaN", "[1, 1] → all NaN")
    assert len(text.splitlines()) < 20
    assert draw_tree("root", calls, [suspect], "ascii").isascii()
