"""Rules for parts of a network, their metrics, shadows, contributions and spill-over."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from clip_callbacks import (
    ClipRule,
    FixedLimit,
    GradientClipping,
    GradientNormMonitor,
    NonFiniteGuard,
    QuantileLimit,
    ZScoreLimit,
    clip_step,
)
from clip_callbacks.core.blocks import SCOPES
from clip_callbacks.core.limits import labels
from clip_callbacks.core.tensor_table import TensorTable
from clip_callbacks.stats.attribution import contributions, spill_over
from tests.helpers import reference
from tests.helpers.laws import gradients, with_gradients
from tests.helpers.records import record_of
from tests.helpers.training import SAFELY, Poisoned, Regression, assert_same_bits, data, weights


class Parts(Regression):
    """An encoder, a decoder and a head."""

    def __init__(self, **options):
        torch.manual_seed(0)
        parts = {"encoder": nn.Linear(4, 6), "decoder": nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)), "head": nn.Linear(4, 1)}
        super().__init__(net=nn.Identity(), **options)
        self.parts = nn.ModuleDict(parts)

    def loss(self, batch, batch_idx):
        hidden = batch[0]
        for part in self.parts.values():
            hidden = part(hidden)
        return nn.functional.mse_loss(hidden, batch[1])


class Logs:
    """A CSV logger that can be read back."""

    @staticmethod
    def of(tmp_path):
        from lightning.pytorch.loggers import CSVLogger

        return CSVLogger(tmp_path, flush_logs_every_n_steps=1)


def read(logger):
    import csv
    from pathlib import Path

    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


RULES = [
    ClipRule(1.2, include=r"^parts\.encoder"),
    ClipRule(0.5, "layer", include=r"^parts\.decoder", exclude=r"bias$|\.1\.", name="decoder"),
    ClipRule(FixedLimit(0.1), "parameter", include="head"),
]


def test_rules_for_parts_of_a_network_equal_clipping_each_part_by_itself(trainer):
    class ByHand(Parts):
        def on_before_optimizer_step(self, optimizer):
            parts = self.parts
            nn.utils.clip_grad_norm_(parts["encoder"].parameters(), 1.2)
            nn.utils.clip_grad_norm_([parts["decoder"][0].weight], 0.5)
            for parameter in parts["head"].parameters():
                nn.utils.clip_grad_norm_(parameter, 0.1)

    ours, theirs = Parts(), ByHand()
    trainer(GradientClipping(rules=RULES)).fit(ours, data())
    trainer().fit(theirs, data())
    for left, right in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(left, right)


def test_each_rule_logs_its_norm_limit_and_coefficient(trainer, tmp_path):
    logger = Logs.of(tmp_path)
    module = Parts()
    trainer(GradientClipping(rules=RULES), logger=logger).fit(module, data(12, size=2.0, batch_size=8))
    rows = [row for row in read(logger) if "grad/total_norm" in row]
    assert len(rows) == 12
    for row in rows:
        for name, limit in (("rule_1", 1.2), ("decoder", 0.5), ("rule_3", 0.1)):
            norm, coefficient = row[f"grad/{name}/total_norm"], row[f"grad/{name}/clip_coef"]
            assert row[f"grad/{name}/max_norm"] == pytest.approx(limit)
            assert row[f"grad/{name}/clip_fraction"] == (coefficient < 1.0)
            if name != "rule_3":
                assert coefficient == pytest.approx(reference.coefficient(norm, limit), rel=1e-5)
    assert {row["grad/rule_1/clip_fraction"] for row in rows} == {0.0, 1.0}
    assert "grad/rule_2/clip_coef" not in rows[0]


def test_a_rule_shows_its_arguments_only():
    assert [name for name in dir(ClipRule()) if not name.startswith("_")] == ["exclude", "include", "max_norm", "name", "scope"]


def test_one_rule_needs_no_metrics_of_its_own(trainer):
    fit = trainer(GradientClipping(1.0))
    fit.fit(Parts(), data(2))
    assert not any("rule" in name for name in fit.callback_metrics)


def test_mistakes_in_rules(trainer):
    def fit(*rules):
        trainer(GradientClipping(rules=list(rules))).fit(Parts(), data(2))

    with pytest.raises(ValueError, match=r"`exclude` must match the name of a parameter, got 'haed'.*Near names: parts.head"):
        fit(ClipRule(1.0, exclude="haed"))
    with pytest.raises(ValueError, match="`exclude` must leave a parameter over, got 'weight'"):
        fit(ClipRule(1.0, include="head.weight", exclude="weight"))
    with pytest.raises(ValueError, match="`name` must differ between rules, got a, a"):
        fit(ClipRule(1.0, name="a"), ClipRule(2.0, name="a"))
    with pytest.raises(ValueError, match="`exclude` must match the name of a parameter"):
        clip_step(with_gradients(0).named_parameters(), rules=[ClipRule(1.0, exclude="haed")])


def test_a_pattern_may_hold_for_one_of_several_optimizers(trainer):
    class Gan(Parts):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch, batch_idx))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.parts["encoder"], self.parts["head"])]

    rules = [ClipRule(0.5, "parameter", exclude=r"head\.bias"), ClipRule(0.2, include="head")]
    fit = trainer(GradientClipping(rules=rules, shadow=[0.01, ZScoreLimit()]))
    fit.fit(Gan(), data(4))
    names = set(fit.callback_metrics)
    assert {"grad/rule_1/clip_coef-SGD", "grad/rule_1/clip_coef-SGD-1", "grad/rule_2/clip_coef-SGD-1"} <= names
    assert "grad/rule_2/clip_coef-SGD" not in names
    assert fit.callback_metrics["grad/shadow_clip_fraction/FixedLimit-0.01-SGD-1"] == 1.0


# Shadows


SHADOWS = [0.05, 0.5, QuantileLimit(0.5, window=10), ZScoreLimit(1.0, warmup=3)]


def test_shadows_change_nothing_and_count_what_they_would_have_clipped(trainer, tmp_path):
    factors = {4: math.nan, 9: 1000.0}
    plain, shaded, logger = Poisoned(factors), Poisoned(factors), Logs.of(tmp_path)
    plain.load_state_dict(shaded.state_dict())
    clipping = GradientClipping(0.7, shadow=SHADOWS)
    with pytest.warns(RuntimeWarning, match="Non-finite"):
        trainer(GradientClipping(0.7)).fit(plain, data(20))
    with pytest.warns(RuntimeWarning, match="Non-finite"):
        trainer(clipping, logger=logger).fit(shaded, data(20))
    assert_same_bits(weights(plain), weights(shaded))

    rows = read(logger)
    steps = [row for row in rows if "grad/total_norm" in row]
    assert len(steps) == 19
    norms = [row["grad/total_norm"] for row in steps]
    for limit, name in zip(clipping.shadow, labels(clipping.shadow), strict=True):
        limits = [each[0] for each in reference.limits(limit, [[norm] for norm in norms], 2.0)]
        eps = 1e-6 if isinstance(limit, FixedLimit) else 0.0
        would = [norm + eps > bound for norm, bound in zip(norms, limits, strict=True)]
        logged = [row[f"grad/shadow_clip_fraction/{name}"] for row in steps]
        assert logged == would
        (epoch,) = [row[key] for row in rows if (key := f"grad/shadow_clip_fraction_epoch/{name}") in row]
        assert epoch == pytest.approx(sum(would) / len(would))


def test_shadows_may_change_between_runs_and_otherwise_go_on(trainer, tmp_path):
    def fit(shadow, **options):
        clipping = GradientClipping(1.0, shadow=shadow)
        made = trainer(clipping, **options)
        made.fit(module := Parts(), data(5), ckpt_path=options.get("default_root_dir") and None)
        return made, clipping, module

    first, clipping, _ = fit([ZScoreLimit(warmup=2)])
    first.save_checkpoint(tmp_path / "a.ckpt")
    same, other = GradientClipping(1.0, shadow=[ZScoreLimit(warmup=2)]), GradientClipping(1.0, shadow=[QuantileLimit(), 2.0])
    trainer(same, max_epochs=2).fit(Parts(), data(5), ckpt_path=tmp_path / "a.ckpt", **SAFELY)
    with pytest.warns(UserWarning, match="Reset: shadow QuantileLimit .* which was shadow ZScoreLimit-warmup_2"):
        trainer(other, max_epochs=2).fit(Parts(), data(5), ckpt_path=tmp_path / "a.ckpt", **SAFELY)
    (held,) = same.state_dict()["shadows"][0].values()
    assert held["state"]["count"].item() == 10
    assert other.state_dict()["shadows"][0]["QuantileLimit"]["state"]["count"].item() == 5
    assert clipping.state_dict()["shadows"][0]["ZScoreLimit-warmup_2"]["state"]["count"].item() == 5
    assert list(other.state_dict()["history"][0]["shadows"]) == ["QuantileLimit", "FixedLimit-2"]


def test_shadows_look_at_the_blocks_of_the_first_rule():
    module = with_gradients(0)
    report, _ = clip_step(module.named_parameters(), rules=[ClipRule(None)], shadow=[ClipRule(0.5, "parameter"), ClipRule(1e6)])
    assert [outcome.clips for outcome in report.shadows] == [True, False]
    clipping = GradientClipping(1.0, scope="layer", shadow=[0.5])
    assert clipping.shadow == [FixedLimit(0.5)]


def test_bad_shadows():
    with pytest.raises(ValueError, match="`shadow` must be a number above 0"):
        GradientClipping(1.0, shadow=[-1.0])


# Contributions and spill-over


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("scope", ["layer", "parameter", "group"])
def test_contributions_are_shares_that_add_up(p, scope):
    module = with_gradients(0)
    table = TensorTable.of_named(module.named_parameters())
    report, _ = clip_step(table, rules=[ClipRule(None, scope)], norm_type=p)
    shares = contributions(report.norms, record_of(report).total_norm, p)
    torch.testing.assert_close(shares.sum(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-6, atol=0)
    powers = [norm**p for norm in reference.clip(gradients(module), 1.0, scope, p)[0].values()]
    torch.testing.assert_close(
        shares, torch.tensor([power / sum(powers) for power in powers], dtype=torch.float64), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("scope", ["layer", "parameter"])
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@pytest.mark.parametrize(
    "rules",
    [
        [ClipRule(1.0)],
        [ClipRule(3.0), ClipRule(0.5, "parameter")],
        [ClipRule(0.7, s) for s in SCOPES],
        [ClipRule(0.5, include="weight")],
    ],
)
def test_spill_over_is_what_a_block_loses_because_of_others(scope, p, rules):
    """Against the definition: every block clipped once more with all other gradients set to 0."""
    sizes = [1.0, 0.01, 5.0, 0.3, 2.0, 0.7, 0.1]

    def made(only=None):
        module = with_gradients(3)
        for size, (name, parameter) in zip(sizes, module.named_parameters(), strict=True):
            label = reference.layer_of(name) if scope == "layer" else name
            parameter.grad *= size if only in {None, label} else 0.0
        return module

    table = TensorTable.of_named((module := made()).named_parameters())
    report = record_of(clip_step(table, rules=rules, norm_type=p)[0])
    by_unit = report.unit_norms is not None
    norms = report.unit_norms if by_unit else report.parameter_norms
    blocks = table.partition(scope, by_unit=by_unit)
    found = spill_over(report.outcomes, norms, report.factors, blocks, p)
    together = clip_step(module.named_parameters(), rules=[ClipRule(None, scope)], norm_type=p)[0].norms.tolist()
    for place, name in enumerate(blocks.names):
        alone = made(only=name)
        clip_step(alone.named_parameters(), rules=rules, norm_type=p)
        kept = clip_step(alone.named_parameters(), rules=[ClipRule(None, scope)], norm_type=p)[0].norms[place].item()
        assert found[place].item() == pytest.approx(max(0.0, 1 - together[place] / kept), abs=1e-5)
    assert found.max() > 0.1


def test_the_monitor_logs_both_on_request(trainer, tmp_path):
    logger = Logs.of(tmp_path)
    trainer(GradientNormMonitor("layer", log_contributions=True), GradientClipping(0.5), NonFiniteGuard(), logger=logger).fit(
        Parts(), data(6)
    )
    rows = [row for row in read(logger) if "grad/total_norm" in row]
    for row in rows:
        shares = [value for name, value in row.items() if name.startswith("grad_contribution/")]
        assert len(shares) == 4
        assert sum(shares) == pytest.approx(1.0, rel=1e-5)
        spills = [value for name, value in row.items() if name.startswith("grad_spill_over/")]
        assert len(spills) == 4
        assert all(0.0 <= value < 1.0 for value in spills)
        if row["grad/clip_coef"] < 0.5:
            assert max(spills) > 0.1
    assert not any("contribution" in name for name in Parts().state_dict())
    with pytest.raises(ValueError, match="`scope` must be one of global, group, layer, parameter, got 'unit'"):
        GradientNormMonitor("unit")
