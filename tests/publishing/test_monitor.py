"""What the monitor says of blocks, against slow references that look at gradients and weights themselves."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from clip_callbacks import (
    AccumulationRescaling,
    ClipRule,
    EmaLimit,
    GradientClipping,
    GradientNormMonitor,
    NonFiniteGuard,
)
from tests.helpers.matrix import matrix
from tests.helpers.monitoring import Witness, blocks_of, norm
from tests.helpers.training import SAFELY, GradientTape, Poisoned, Regression, TwoNetworks, data, scaled

SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def metrics(fit, prefix):
    return {key.removeprefix(prefix): float(value) for key, value in fit.callback_metrics.items() if key.startswith(prefix)}


# Over an epoch


FEW, LONG = 24, 150
"""Batches: the second are more than wait at a time to be counted."""


@pytest.mark.filterwarnings("ignore:Non-finite gradients")
@matrix(
    lambda batches, scope, norm_type: batches == FEW or (scope, norm_type) == ("layer", 2.0),
    batches=[FEW, LONG],
    scope=["global", "group", "layer", "parameter"],
    norm_type=[1.0, 2.0, math.inf],
)
def test_percentiles_are_over_all_healthy_steps_of_the_epoch(trainer, batches, scope, norm_type):
    witness = Witness()
    monitor, guard = GradientNormMonitor(scope, norm_type=norm_type), NonFiniteGuard()
    fit = trainer(witness, monitor, guard, log_every_n_steps=50, max_epochs=2)
    module = Poisoned({3: math.nan, batches + 20: math.inf}, lr=0.001)
    fit.fit(module, data(batches))
    steps = [step for number, step in enumerate(witness.before) if number >= batches and number != batches + 20]
    for block, names in blocks_of(dict(module.named_parameters()), scope).items():
        norms = torch.tensor([norm([step[name] for name in names], norm_type) for step in steps])
        for key, share in SHARES.items():
            true = float(torch.quantile(norms, share))
            assert metrics(fit, f"grad_norm_{key}/")[block] == pytest.approx(true, rel=0.0101), (block, key)


RULES = {
    "layer": [ClipRule(0.5, "layer")],
    "parameter after global": [ClipRule(4.0), ClipRule(0.5, "parameter")],
    "unit": [ClipRule(0.3, "unit")],
    "unit of some": [ClipRule(0.3, "unit", include=r"0\.weight")],
    "some": [ClipRule(0.5, "global", include=r"net\.2")],
    "unit and a global limit": [ClipRule(1e3, "unit"), ClipRule(3.0)],
    "adaptive": [ClipRule(EmaLimit(warmup=2), "parameter")],
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("scope", ["layer", "parameter", "global"])
def test_clip_fraction_of_a_block_is_the_share_of_steps_that_made_an_entry_smaller(trainer, rules, scope):
    witness = Witness()
    fit = trainer(witness, GradientClipping(rules=rules), GradientNormMonitor(scope))
    module = Regression(net=nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)))  # of ReLU some rows are 0
    fit.fit(module, data(LONG if (rules, scope) == (RULES["layer"], "layer") else 16))
    found = metrics(fit, "grad_clip_fraction/")
    expected = {}
    for block, names in blocks_of(dict(module.named_parameters()), scope).items():
        steps = zip(witness.before, witness.after, strict=True)
        smaller = [any((after[name].abs() < before[name].abs()).any() for name in names) for before, after in steps]
        expected[block] = sum(smaller) / len(smaller)
    assert found == pytest.approx(expected, rel=1e-6)
    assert len(found) == len(expected)


@pytest.mark.parametrize("callbacks", [[], [GradientClipping(1.0)], [GradientClipping(1.0, scope="layer", shadow=[2.0])]], ids=len)
def test_clip_fractions_of_blocks_are_for_local_norms(trainer, callbacks):
    fit = trainer(*callbacks, GradientNormMonitor())
    fit.fit(Regression(), data())
    is_local = bool(callbacks) and callbacks[0].rules[0].scope == "layer"
    assert bool(metrics(fit, "grad_clip_fraction/")) is is_local


def test_epoch_metrics_are_logged_at_the_epochs_end(trainer, tmp_path):
    csv = CSVLogger(tmp_path)
    clipping = GradientClipping(0.5, scope="parameter")
    trainer(clipping, GradientNormMonitor(), logger=csv, max_epochs=2, log_every_n_steps=50).fit(TwoNetworks(), data(5))
    frame = read(csv)
    for key in ("grad_norm_p50", "grad_norm_p90", "grad_norm_p99", "grad_clip_fraction"):
        for suffix in ("generator-SGD", "discriminator-SGD-1"):
            assert list(column(frame, f"{key}/{suffix}").index) == [4, 9]


def test_a_resume_in_mid_epoch_ends_with_the_same_percentiles(trainer, tmp_path):
    class Numbered(Regression):
        """Mid-epoch, Lightning resumes with the first batches of the data."""

        def loss(self, batch, batch_idx):
            number = self.trainer.fit_loop.epoch_loop.total_batch_idx
            return super().loss([feed[number], batch[1]], batch_idx)

    feed = torch.randn(20, 4, 4)
    loader = DataLoader(TensorDataset(torch.zeros(80, 4), torch.zeros(80, 1)), batch_size=4)

    def fit(**options):
        torch.manual_seed(0)
        saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=7, save_top_k=-1)
        clipping = GradientClipping(0.2, scope="layer")
        made = trainer(clipping, GradientNormMonitor("parameter", every_n_steps=3), saving, enable_checkpointing=True)
        made.fit(Numbered(), loader, **options)
        return made.callback_metrics

    whole = fit()
    resumed = fit(ckpt_path=tmp_path / "step=7.ckpt", **SAFELY)
    keys = {key for key in whole if key.startswith("grad_")}
    assert len(keys) == 4 * 5
    assert {key: float(resumed[key]) for key in keys} == {key: float(whole[key]) for key in keys}


class Thaw(BaseFinetuning):
    """From its fourth step on the first layer is trained too."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0])

    def finetune_function(self, *_):
        pass

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 4:
            self.unfreeze_and_add_param_group(pl_module.net[0], trainer.optimizers[0])


class Thawing(Regression):
    def configure_optimizers(self):
        return torch.optim.SGD([tensor for tensor in self.parameters() if tensor.requires_grad], lr=0.05)


def test_percentiles_follow_layers_that_are_unfrozen_in_mid_epoch(trainer):
    witness = Witness()
    monitor = GradientNormMonitor(include="weight", log_update_ratio=True)
    fit = trainer(Thaw(), witness, GradientClipping(0.5, scope="layer"), monitor)
    fit.fit(Thawing(), data(10))
    found, fractions = metrics(fit, "grad_norm_p50/"), metrics(fit, "grad_clip_fraction/")
    for layer, steps in (("net.0", witness.before[4:]), ("net.2", witness.before)):
        norms = torch.tensor([norm([step[f"{layer}.weight"]], 2.0) for step in steps])
        assert found[layer] == pytest.approx(float(norms.quantile(0.5)), rel=0.0101)
    both = zip(witness.before[4:], witness.after[4:], strict=True)
    smaller = [bool((after["net.0.weight"].abs() < before["net.0.weight"].abs()).any()) for before, after in both]
    assert fractions["net.0"] == pytest.approx(sum(smaller) / 6)
    assert set(metrics(fit, "update_ratio/")) == {"net.0", "net.2"}


def test_groups_of_equal_names_have_metrics_of_their_own(trainer):
    class Groups(Regression):
        def configure_optimizers(self):
            first, second = self.net[0], self.net[2]
            return torch.optim.SGD([{"params": first.parameters(), "name": "pg2"}, {"params": second.parameters()}], lr=0.05)

    witness = Witness()
    fit = trainer(witness, GradientNormMonitor("group"))
    fit.fit(Groups(), data(3))
    found, last = metrics(fit, "grad_norm/"), witness.before[-1]
    assert set(found) == {"pg2", "pg2-2"}
    for group, layer in (("pg2", "net.0"), ("pg2-2", "net.2")):
        assert found[group] == pytest.approx(norm([last[f"{layer}.weight"], last[f"{layer}.bias"]], 2.0), rel=1e-5)


def test_what_an_epoch_remembers_does_not_grow(trainer):
    def size(batches):
        monitor = GradientNormMonitor("parameter")
        seen = []
        module = GradientTape(torch.linspace(1.0, 2.0, 50).repeat(batches // 50)[:, None])
        module.on_train_batch_end = lambda *_: seen.append(monitor.state_dict()["blocks"][0]["norms"]["counts"].numel())
        trainer(monitor).fit(module)
        return seen[-1]

    assert size(100) == size(50) > 1


# Which blocks


def read(logger):
    return pd.read_csv(Path(logger.log_dir) / "metrics.csv")


def column(frame, key):
    return frame[frame[key].notna()].set_index("step")[key]


def keys_of(frame, prefix):
    return {key.removeprefix(prefix) for key in frame if key.startswith(prefix)}


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ({"include": "weight"}, {"net.0.weight", "net.2.weight"}),
        ({"exclude": "weight"}, {"net.0.bias", "net.2.bias"}),
        ({"include": r"net\.0", "exclude": "bias$"}, {"net.0.weight"}),
    ],
)
def test_patterns_choose_parameters(trainer, tmp_path, options, blocks):
    csv = CSVLogger(tmp_path)
    monitor = GradientNormMonitor("parameter", log_contributions=True, log_update_ratio=True, **options)
    trainer(GradientClipping(0.5, scope="unit"), monitor, logger=csv).fit(Regression(), data())
    frame = read(csv)
    for prefix in ("grad_norm", "grad_norm_p50", "grad_clip_fraction", "grad_contribution", "grad_spill_over", "update_ratio"):
        assert keys_of(frame, f"{prefix}/") == blocks, prefix


def test_a_layer_is_then_its_chosen_parameters(trainer):
    witness = Witness()
    fit = trainer(witness, GradientNormMonitor(include="weight"))
    fit.fit(Regression(), data(3))
    last = witness.before[-1]
    assert metrics(fit, "grad_norm/") == pytest.approx({f"net.{i}": norm([last[f"net.{i}.weight"]], 2.0) for i in (0, 2)})


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused_with_near_names(trainer, argument):
    with pytest.raises(ValueError, match=rf"`{argument}` must match the name of a parameter, got 'net.0.wieght'.*net\.0\.weight"):
        trainer(GradientNormMonitor(**{argument: "net.0.wieght"})).fit(Regression(), data(2))
    with pytest.raises(ValueError, match=rf"`{argument}` must be a regular expression"):
        GradientNormMonitor(**{argument: "("})


def test_a_pattern_may_choose_from_one_of_several_optimizers(trainer, tmp_path):
    csv = CSVLogger(tmp_path)
    options = {"log_update_ratio": True, "log_contributions": True, "top_k": 3}
    trainer(GradientNormMonitor("parameter", include="generator", exclude="bias", **options), logger=csv).fit(
        TwoNetworks(), data(3)
    )
    frame = read(csv)
    for prefix in ("grad_norm/", "grad_norm_p99/", "update_ratio/"):
        assert keys_of(frame, prefix) == {"generator.weight-SGD"}
    trainer(GradientNormMonitor("parameter", exclude="generator"), logger=csv).fit(TwoNetworks(), data(3))


@pytest.mark.parametrize("value", [0, -1, 1.5, "3"])
def test_top_k_is_a_whole_number(value):
    with pytest.raises(ValueError, match=f"`top_k` must be a whole number of at least 1, or None, got {value!r}"):
        GradientNormMonitor(top_k=value)


class Many(GradientTape):
    """A thousand layers of one weight; the gradient of each is its entry of the feed."""

    def __init__(self, feed):
        super().__init__(feed)
        del self.weight
        self.layers = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(feed.shape[1]))

    def training_step(self, batch, batch_idx):
        return torch.stack([layer.weight.sum() * entry for layer, entry in zip(self.layers, batch[0][0], strict=True)]).sum()


def test_a_thousand_layers_log_the_ten_largest(trainer, tmp_path):
    feed = torch.rand(5, 1000)
    csv = CSVLogger(tmp_path)
    fit = trainer(GradientNormMonitor(top_k=10), logger=csv)
    fit.fit(Many(feed))
    frame = read(csv)
    for step in range(5):
        row = frame[frame["grad/total_norm"].notna() & (frame["step"] == step)].iloc[0]
        logged = {key: row[key] for key in frame if key.startswith("grad_norm/") and not math.isnan(row[key])}
        values, places = feed[step].topk(10)
        expected = {f"grad_norm/layers.{place}": value for place, value in zip(places.tolist(), values.tolist(), strict=True)}
        assert logged == pytest.approx(expected, rel=1e-6)
    for key in ("grad_norm_p50/", "grad_norm_p90/", "grad_norm_p99/"):
        assert len(keys_of(frame, key)) == 10
    exact = feed.quantile(0.99, dim=0)
    chosen = [int(name.removeprefix("layers.")) for name in keys_of(frame, "grad_norm_p99/")]
    assert exact[chosen].min() > exact.sort().values[-11] * 0.98, "the largest, as far as 1 % can tell"


def test_of_a_bad_step_the_largest_finite_blocks_are_logged(trainer, tmp_path):
    feed = torch.arange(1.0, 7.0).repeat(2, 1)
    feed[1, 5] = math.inf
    csv = CSVLogger(tmp_path)
    trainer(GradientNormMonitor(top_k=2), logger=csv).fit(Many(feed))
    frame = read(csv)
    assert keys_of(frame, "grad_norm/") == {"layers.3", "layers.4", "layers.5"}
    assert column(frame, "grad_norm/layers.5").to_dict() == {0: 6.0}
    assert column(frame, "grad_norm/layers.3").to_dict() == {1: 4.0}


# How far a step moves the weights


class Scales(Callback):
    """Keeps the parameters before each optimizer step (at LBFGS's first closure call) and after each batch."""

    def __init__(self):
        self.before, self.after = [], []
        self._step = None

    @staticmethod
    def weights(module):
        return {name: tensor.detach().double().clone() for name, tensor in module.named_parameters()}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.before.append(self.weights(pl_module))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.after.append(self.weights(pl_module))


def expected_ratios(scales, number, scope, p=2.0):
    before, after = scales.before[number], scales.after[number]
    found = {}
    for block, names in blocks_of(before, scope).items():
        moved = norm([after[name] - before[name] for name in names], p)
        found[block] = moved / norm([before[name] for name in names], p)
    return found


WAYS = {
    "sgd": {},
    "momentum": {"momentum": 0.9},
    "adamw": {"optimizer": torch.optim.AdamW, "lr": 0.01},
    "fused": {"optimizer": torch.optim.AdamW, "fused": True},
    "lbfgs": {"optimizer": torch.optim.LBFGS, "lr": 0.5, "max_iter": 4},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("scope", "norm_type"), [("layer", 2.0), ("parameter", 1.0), ("global", math.inf)])
def test_update_ratios_are_those_of_the_whole_step(trainer, tmp_path, way, scope, norm_type):
    scales, csv = Scales(), CSVLogger(tmp_path)
    monitor = GradientNormMonitor(scope, norm_type=norm_type, log_update_ratio=True)
    clipping = GradientClipping(2.0, norm_type=norm_type)
    trainer(clipping, monitor, scales, logger=csv, log_every_n_steps=3).fit(Regression(**WAYS[way]), data(9))
    frame = read(csv)
    for block in expected_ratios(scales, 0, scope):
        expected = {step: expected_ratios(scales, step, scope, norm_type)[block] for step in (2, 5, 8)}
        # a difference of float32 weights is known to their rounding, 6e-8 of weights that are 1e2 to 1e4 times as large
        assert column(frame, f"update_ratio/{block}").to_dict() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("deferred", [False, True])
def test_a_skipped_step_has_no_update_ratio(trainer, tmp_path, deferred):
    scales, csv = Scales(), CSVLogger(tmp_path)
    monitor = GradientNormMonitor(log_update_ratio=True)
    module = Poisoned({1: math.nan, 4: math.inf}, optimizer=torch.optim.AdamW, lr=0.01, fused=True)
    with pytest.warns(RuntimeWarning, match="Non-finite gradients"):
        trainer(NonFiniteGuard(deferred=deferred), monitor, scales, logger=csv).fit(module, data(6))
    found = column(read(csv), "update_ratio/net.0").to_dict()
    assert found == pytest.approx({step: expected_ratios(scales, step, "layer")["net.0"] for step in (0, 2, 3, 5)}, rel=1e-3)


@pytest.mark.parametrize("family", [[], [NonFiniteGuard()]], ids=["alone", "guarded"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_leaves_out_has_no_update_ratio(trainer, tmp_path, family, fused):
    scales, csv = Scales(), CSVLogger(tmp_path)
    monitor = GradientNormMonitor(log_update_ratio=True)
    options = scaled(init_scale=2.0**30, growth_interval=1000)
    module = Regression(torch.optim.AdamW, lr=0.01, fused=fused)
    trainer(monitor, *family, scales, logger=csv, **options).fit(module, data(24, size=1.0))
    found = column(read(csv), "update_ratio/net.0").to_dict()
    moved = [step for step in range(24) if expected_ratios(scales, step, "layer")["net.0"] > 0]
    assert 0 < len(moved) < 24
    assert found == pytest.approx({step: expected_ratios(scales, step, "layer")["net.0"] for step in moved}, rel=1e-3)


def test_update_ratios_under_accumulation_are_of_the_step(trainer, tmp_path):
    scales, csv = Scales(), CSVLogger(tmp_path)
    monitor = GradientNormMonitor(log_update_ratio=True)
    trainer(AccumulationRescaling(), monitor, scales, logger=csv, accumulate_grad_batches=3).fit(Regression(), data(9))
    scales.after = scales.after[2::3]
    expected = {step: expected_ratios(scales, step, "layer")["net.2"] for step in range(3)}
    assert column(read(csv), "update_ratio/net.2").to_dict() == pytest.approx(expected, rel=1e-3)


def test_update_ratios_of_several_optimizers_and_of_batches_that_are_logged(trainer, tmp_path):
    """In manual optimization, where both step in one batch."""
    csv, after, before = CSVLogger(tmp_path), [], []
    module = TwoNetworks()
    module.on_train_batch_start = lambda *_: before.append(Scales.weights(module))
    module.on_train_batch_end = lambda *_: after.append(Scales.weights(module))
    trainer(GradientNormMonitor(log_update_ratio=True), logger=csv, log_every_n_steps=2).fit(module, data(6))
    frame = read(csv)
    for layer, suffix in (("generator", "-SGD"), ("discriminator", "-SGD-1")):
        names = [f"{layer}.weight", f"{layer}.bias"]
        expected = {
            step: norm([after[step][it] - before[step][it] for it in names], 2.0) / norm([before[step][it] for it in names], 2.0)
            for step in (1, 3, 5)
        }
        assert column(frame, f"update_ratio/{layer}{suffix}").to_dict() == pytest.approx(expected, rel=1e-3)


def test_a_first_step_before_the_batch_that_is_logged_has_no_update_ratio(trainer, tmp_path):
    from tests.helpers.accumulation import Manual

    csv = CSVLogger(tmp_path)
    module = Manual(torch.ones(12, 1), window=4)  # steps in batches 3, 7, 11; logs in 4 and 9
    nn.init.ones_(module.weight)
    module.lr = 0.1
    trainer(GradientNormMonitor(log_update_ratio=True), logger=csv, log_every_n_steps=5).fit(module)
    assert list(column(read(csv), "grad_norm/(root)").index) == [4, 9]
    # how often the optimizer steps is known from its second step on
    assert list(column(read(csv), "update_ratio/(root)").index) == [9]
    csv = CSVLogger(tmp_path)
    trainer(GradientNormMonitor(log_update_ratio=True), logger=csv, log_every_n_steps=4).fit(module)
    assert list(column(read(csv), "update_ratio/(root)").index) == [3, 7, 11]


def test_weights_of_zero_have_no_update_ratio(trainer, tmp_path):
    module, csv = Regression(), CSVLogger(tmp_path)
    nn.init.zeros_(module.net[2].bias)
    trainer(GradientNormMonitor("parameter", log_update_ratio=True), logger=csv).fit(module, data(3))
    frame = read(csv)
    assert list(column(frame, "update_ratio/net.2.bias").index) == [1, 2]
    assert list(column(frame, "update_ratio/net.0.bias").index) == [0, 1, 2]
    assert "inf" not in (Path(csv.log_dir) / "metrics.csv").read_text()


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_update_ratios_in_other_precisions(trainer, precision):
    scales, monitor = Scales(), GradientNormMonitor(log_update_ratio=True)
    fit = trainer(monitor, scales, precision=precision)
    fit.fit(Regression(), data(3))
    assert metrics(fit, "update_ratio/") == pytest.approx(expected_ratios(scales, -1, "layer"), rel=1e-6)


def test_nothing_is_copied_on_other_steps(trainer):
    looked = []

    class Looking(Callback):
        def on_train_start(self, *_):
            part = monitor._part
            look, self.kept = part.before_write, part._before

            def before_write(step):
                look(step)
                looked.append((step.optimizer.history.steps, len(self.kept)))

            part.before_write = before_write

        def on_train_batch_end(self, *_):
            looked.append(len(self.kept))

    monitor = GradientNormMonitor(log_update_ratio=True, every_n_steps=6)
    trainer(monitor, Looking(), log_every_n_steps=3).fit(Regression(), data(12))
    assert [entry for entry in looked if entry != 0] == [(2, 0), (5, 1), (8, 0), (11, 1)], "what is kept is let go in the batch"
