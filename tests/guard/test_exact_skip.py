"""A skipped step never happened: optimizers x implementations x kinds of poison x places x loops x layers, bit for bit.

The same harness is run against guards that people write by hand, to show that it can fail.
"""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from clip_callbacks import NonFiniteGuard
from tests.helpers.exact_skip import PLACES, Cell, differences, every_cell, train

pytestmark = pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning", "ignore:.*lr_scheduler.step.*:UserWarning")


@every_cell
def test_a_skipped_step_never_happened(tmp_path, optimizer, implementation, kind, place, loop, layer):
    cell, bad = Cell(optimizer, implementation, kind, place, loop, layer), PLACES[place]
    guarded = train(tmp_path, cell, bad, set(), NonFiniteGuard())
    clean = train(tmp_path, cell, set(), bad, NonFiniteGuard())
    assert differences(guarded, clean) == []


class ZeroingGuard(Callback):
    """The common cure by hand: zero the gradients of a bad step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if not all(torch.isfinite(p.grad).all() for p in pl_module.parameters() if p.grad is not None):
            optimizer.zero_grad(set_to_none=False)


class NoneGuard(Callback):
    """A more careful cure by hand."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if not all(torch.isfinite(p.grad).all() for p in pl_module.parameters() if p.grad is not None):
            optimizer.zero_grad(set_to_none=True)


class PlainClip(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        nn.utils.clip_grad_norm_(pl_module.parameters(), 1.0)


@pytest.mark.parametrize("guard", [ZeroingGuard, NoneGuard, PlainClip])
@pytest.mark.parametrize("name", ["AdamW", "SGD momentum"])
@pytest.mark.parametrize("kind", ["nan", "inf", "loss"])
def test_the_harness_fails_for_guards_written_by_hand(tmp_path, guard, name, kind):
    cell = Cell(name, "foreach", kind, "later", "automatic")
    bad = PLACES[cell.place]
    guarded = train(tmp_path, cell, bad, set(), guard())
    clean = train(tmp_path, cell, set(), bad)
    broken = differences(guarded, clean)
    assert any(key.startswith("module.net.1.running") for key in broken), "batch statistics"
    assert any(key.startswith("schedule") for key in broken), "the learning-rate schedule"
    if guard is not NoneGuard:
        assert any("weight" in key for key in broken), "the weights"
