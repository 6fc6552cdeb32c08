"""The table that a fit ends with."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from clip_callbacks import ClipRule, GradientClipping, GradientNormMonitor, NonFiniteGuard, QuantileLimit
from tests.helpers.training import SAFELY, GradientTape, Poisoned, Regression, TwoNetworks, data


def cells(text):
    """The table's rows, by the names of their columns, as they lie under the rule."""
    title, header, rule, *rows = text.splitlines()
    assert title == "Gradients of the run:"
    ends, place = [], 0
    for dashes in rule.split("  "):
        ends.append((place, place + len(dashes)))
        place += len(dashes) + 2
    names = [header[a:b].strip() for a, b in ends]
    return [{name: row[a:b].strip() for name, (a, b) in zip(names, ends, strict=True)} for row in rows]


NORMS = ("total_norm p50", "p90", "p99")
FEED = torch.tensor([0.1, 2.0, 3.0, math.nan, 5.0])[:, None]


@pytest.mark.filterwarnings("ignore:Non-finite gradients")
def test_a_row_for_the_optimizer_and_one_for_each_rule_and_shadow(trainer, said):
    rules = [ClipRule(2.5), ClipRule(0.05, "layer", name="local")]
    trainer(GradientClipping(rules=rules, shadow=[4.0, QuantileLimit(0.5)])).fit(GradientTape(FEED))
    (text,) = said
    (optimizer, *limits) = cells(text)
    assert [optimizer.pop(key) for key in NORMS] == ["2.48", "4.39", "4.94"], "within 1 % of 2.5, 4.4, 4.94"
    assert optimizer == {"": "SGD", "steps": "5", "skipped": "1", "clipped": "100.0%", "max_norm": "2.5"}
    assert [[row[key] for key in ("", "clipped", "max_norm")] for row in limits] == [
        ["- rule_1", "50.0%", "2.5"],
        ["- local", "100.0%", "0.05"],
        ["- would clip: FixedLimit-4", "25.0%", "4"],
        ["- would clip: QuantileLimit-quantile_0.5", "75.0%", "2"],
    ]
    assert all(row[key] == "" for row in limits for key in ("steps", "skipped", *NORMS))


def test_percentiles_are_those_of_the_run_within_one_percent(trainer, said):
    norms = torch.rand(300, 1).exp()
    trainer(GradientClipping(1.5), max_epochs=2, limit_train_batches=200).fit(GradientTape(norms))
    (row,) = cells(said[0])
    true = torch.quantile(torch.cat([norms[:200], norms[:200]]), torch.tensor([0.5, 0.9, 0.99]))
    found = [float(row[key]) for key in NORMS]
    torch.testing.assert_close(torch.tensor(found), true, rtol=0.016, atol=0)  # 1 % of the sketch, 0.5 % of three digits
    assert row["clipped"] == f"{(norms[:200] > 1.5).double().mean():.1%}"
    assert row["steps"] == "400"


def test_columns_that_nobody_fills_are_left_out(trainer, said):
    trainer(GradientNormMonitor()).fit(GradientTape(torch.ones(3, 1)))
    table, suggestion = said
    assert [list(row) for row in cells(table)] == [["", "steps", "total_norm p50", "p90", "p99"]]
    assert "max_norm=1 for the norm of all gradients would have clipped" in suggestion


def test_several_optimizers_share_one_table(trainer, said):
    trainer(GradientClipping(1.0, shadow=[0.5]), NonFiniteGuard()).fit(TwoNetworks(), data())
    (table,) = said
    rows = cells(table)
    assert [row[""] for row in rows] == ["SGD", "- would clip: FixedLimit-0.5", "SGD-1", "- would clip: FixedLimit-0.5"]
    assert rows[0]["steps"] == rows[2]["steps"] == "12"
    assert rows[0]["clipped"] != rows[2]["clipped"] == "100.0%"


def test_no_table_of_nothing(trainer, said):
    module = Regression()
    module.automatic_optimization = False
    trainer(GradientClipping(1.0)).fit(module, data(3))
    assert said == []


@pytest.mark.filterwarnings("ignore:Non-finite gradients")
def test_a_run_of_bad_steps_only_has_no_norms(trainer, said):
    trainer(GradientClipping(1.0)).fit(Poisoned(dict.fromkeys(range(4), math.nan)), data(4))
    assert cells(said[0]) == [{"": "SGD", "steps": "4", "skipped": "4"}]


class Numbered(GradientTape):
    """Gradients by the number of the batch in the run: in mid-epoch Lightning resumes with the first batches of the data."""

    def training_step(self, batch, batch_idx):
        return (self.weight * self.feed[self.trainer.fit_loop.epoch_loop.total_batch_idx]).sum()


@pytest.mark.filterwarnings("ignore:Non-finite gradients")
@pytest.mark.parametrize("stop", [3, 8])
def test_a_resumed_run_ends_with_the_table_of_the_whole(trainer, tmp_path, said, stop):
    """From the middle of an epoch, and from its end."""

    def fit(**options):
        saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=stop, save_top_k=-1)
        made = trainer(GradientClipping(5.0, shadow=[8.0]), saving, max_epochs=2, enable_checkpointing=True)
        made.fit(Numbered(feed), data(8), **options)

    feed = torch.rand(16, 1) * 10
    feed[[1, 6]] = math.nan
    fit()
    fit(ckpt_path=tmp_path / f"step={stop}.ckpt", **SAFELY)
    whole, after = map(cells, said)
    assert whole[0]["steps"] == "16"
    assert after == whole


def test_what_it_needs_does_not_grow_with_the_run(trainer, tmp_path):
    def size(steps):
        feed = torch.linspace(1.0, 2.0, 50).repeat(steps // 50)[:, None]
        made = trainer(GradientClipping(1.0), max_epochs=2)
        made.fit(GradientTape(feed))
        made.save_checkpoint(tmp_path / "a.ckpt")
        saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["GradientClipping"]["history"][0]
        return sum(value.numel() for value in saved["run_norms"].values())

    assert size(100) == size(50)
