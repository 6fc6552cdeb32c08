"""The tree of modules, drawn and printed."""

from __future__ import annotations

import math

import pytest
import torch

from clip_callbacks.cli import main
from clip_callbacks.replay.module_recorder import Call
from clip_callbacks.replay.ranges import Range
from clip_callbacks.replay.suspects import Culprit, find_culprits
from clip_callbacks.replay.tree import SMALL, make_tree, plain_text, rich_tree
from tests.helpers.replaying import Net, config

pytestmark = [
    pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Spike at:RuntimeWarning"),
]


# ---- pictures and trees --------------------------------------------------------------------------------------------------------


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
        assert 'id="max |activation|: not finite"' in text
        assert "net.3" in text
    assert f"Picture: {path}" in capsys.readouterr().out


def span(value):
    return Range.of(torch.tensor([value]))


def test_of_calls_within_each_other_that_break_a_gradient_the_innermost_is_blamed():
    outer = Call("net", "Sequential", gradient=span(1.0), first_bad=3, done=1)
    inner = Call("net.0", "Root", parent=outer, gradient=span(1.0), first_bad=3, done=0)
    assert [culprit.call for culprit in find_culprits([outer, inner], 1e3)] == [inner]


def test_nobody_is_blamed_for_parameters_that_were_not_finite_before():
    outer = Call("net", "Sequential", inputs=span(1.0), outputs=span(math.nan), done=1)
    inner = Call("net.0", "Linear", 1, outer, span(1.0), ("weight",), span(math.nan), done=0)
    assert find_culprits([outer, inner], 1e3) == []
    inner.parameters = ()
    assert [culprit.call for culprit in find_culprits([outer, inner], 1e3)] == [inner]


def test_trees_fold_what_is_healthy_and_what_is_infected():
    calls = [Call("net", "Sequential", inputs=span(1.0), outputs=span(math.nan), done=1)]
    for number in range(40):
        healthy = number < 20
        layer = Call(
            f"net.{number}", "Block", 1, calls[0], span(1.0 if healthy else math.nan), (), span(1.0 if healthy else math.nan)
        )
        layer.done = number
        inner = Call(f"net.{number}.0", "Linear", 1, layer, layer.inputs, (), layer.outputs)
        inner.done = number
        calls += [layer, inner]
    assert len(calls) > SMALL
    culprit = Culprit("output", calls[41], "made it")
    text = plain_text(make_tree("root", calls, [culprit]))
    assert "… 18 more, healthy" in text
    assert "… 17 more, not finite either" in text
    assert "… 1 healthy child\n" in text
    assert "… 1 child, not finite either\n" in text
    assert "net.20 (Block): [1, 1] → all NaN  ◀ first non-finite output" in text.replace("all NaN → all NaN", "[1, 1] → all NaN")
    assert len(text.splitlines()) < 20
    assert plain_text(make_tree("root", calls, [culprit]), "ascii").isascii()


def test_a_terminal_gets_the_tree_in_colors(bad, tmp_path, capsys, monkeypatch):
    rich = pytest.importorskip("rich.console")
    console = rich.Console(force_terminal=True, width=100, record=True)
    calls = [Call("net", "Log", inputs=span(0.0), outputs=span(-math.inf), done=0)]
    console.print(rich_tree(make_tree("root", calls, [])))
    assert "net (Log)" in console.export_text()
