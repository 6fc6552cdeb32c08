"""Two real processes over gloo: gradients are identical on all ranks, so every rank decides the same."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from clip_callbacks import AccumulationRescaling, GradientClipping, GradientNormMonitor, NonFiniteGuard
from tests.helpers.training import Poisoned, assert_same_bits, data, make_trainer


class RankPoisoned(Poisoned):
    """Writes each rank's weights and count of skipped steps at the end; batch 4 is bad on rank 1 only."""

    def __init__(self, folder, bad):
        super().__init__({}, lr=0.01)
        self.folder, self.bad = str(folder), bad

    def loss(self, batch, batch_idx):
        loss = super().loss(batch, batch_idx)
        return loss * math.nan if self.bad and batch_idx == 4 and self.global_rank == 1 else loss

    def on_train_end(self):
        skipped = max((getattr(callback, "skipped_steps", 0) for callback in self.trainer.callbacks), default=0)
        torch.save({"weights": [p.detach() for p in self.parameters()], "skipped": skipped}, f"{self.folder}/{self.global_rank}.pt")


class Always(RankPoisoned):
    def loss(self, batch, batch_idx):
        loss = super().loss(batch, batch_idx)
        return loss * math.nan if self.global_rank == 0 else loss


def train(folder, *callbacks, bad=False, module=RankPoisoned, **options):
    folder.mkdir()
    torch.manual_seed(0)
    strategy = DDPStrategy(process_group_backend="gloo", start_method="spawn")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_trainer(folder, *callbacks, devices=2, strategy=strategy, **options).fit(module(folder, bad), data(16))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.timeout(120)
def test_two_ranks_have_the_bits_of_gradient_clip_val(tmp_path: Path):
    ours = train(tmp_path / "ours", GradientClipping(0.5), AccumulationRescaling(), GradientNormMonitor())
    theirs = train(tmp_path / "theirs", gradient_clip_val=0.5)
    assert_same_bits(ours[0]["weights"], ours[1]["weights"])
    assert_same_bits(ours[0]["weights"], theirs[0]["weights"])


@pytest.mark.timeout(120)
def test_a_nan_on_one_rank_is_skipped_by_both(tmp_path: Path):
    first, second = train(tmp_path / "bad", NonFiniteGuard(), GradientClipping(0.5), bad=True)
    assert first["skipped"] == second["skipped"] == 1
    assert_same_bits(first["weights"], second["weights"])
    assert all(torch.isfinite(weight).all() for weight in first["weights"])


@pytest.mark.timeout(120)
def test_a_streak_stops_all_ranks(tmp_path: Path):
    with pytest.raises(Exception, match="bad step 1 in a row"):
        train(tmp_path / "raised", NonFiniteGuard(max_consecutive=1), bad=True)


@pytest.mark.timeout(120)
def test_ranks_agree_on_what_is_an_overflow(tmp_path: Path):
    """At scales 4 and 2 it may be one; at 1 it is not, on either rank, though only one of them saw a bad loss."""
    from lightning.pytorch.plugins import MixedPrecision

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    with pytest.raises(Exception, match="bad step 2 in a row"):
        train(tmp_path / "scaled", NonFiniteGuard(max_consecutive=2), module=Always, plugins=[plugin])
