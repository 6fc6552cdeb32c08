"""Parameters and buffers that are made after a fit has begun: by lazy modules, by configure_model, in a batch."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.nn.parameter import is_lazy

from clip_callbacks import (
    AccumulationRescaling,
    BatchSize,
    Bundles,
    ClipRule,
    GradientClipping,
    GradientNormMonitor,
    NonFiniteGuard,
    RatioLimit,
    Rollback,
    ZScoreLimit,
)
from tests.helpers.records import record_of
from tests.helpers.training import Poisoned, assert_same_bits, data, weights

SCOPES = ["global", "group", "layer", "parameter", "unit"]
RULES = [ClipRule(0.1, "unit", include=r"net\.4"), ClipRule(ZScoreLimit(), exclude="bias")]
FAMILIES = {
    **{scope: lambda scope=scope: [GradientClipping(0.1, scope=scope)] for scope in SCOPES},
    "limits of units": lambda: [GradientClipping(RatioLimit(0.01), scope="unit", shadow=[1.0, ZScoreLimit()])],
    "rules": lambda: [GradientClipping(rules=RULES)],
    "metrics": lambda: [
        GradientClipping(0.1),
        AccumulationRescaling(),
        GradientNormMonitor("layer", log_update_ratio=True, log_contributions=True, log_statistics=True),
        GradientNormMonitor("global", log_weight_norm=True),
        GradientNormMonitor("parameter", log_histograms=True),
    ],
    "rollback": lambda: [NonFiniteGuard(rollback=Rollback(every_n_steps=1)), GradientClipping(0.1)],
    "micro-batches": lambda: [NonFiniteGuard(level="microbatch"), GradientClipping(0.1)],
    "deferred": lambda: [NonFiniteGuard(deferred=True), GradientClipping(0.1)],
    "weights of micro-batches": lambda: [AccumulationRescaling(BatchSize()), GradientClipping(0.1)],
    "bundles": lambda: [NonFiniteGuard(bundles=Bundles("bundles", weights="full"), trace_forward=True), GradientClipping(0.1)],
}


class Drawn(Poisoned):
    """A network whose lazy layers draw the same weights, whenever they do."""

    def training_step(self, batch, batch_idx):
        if any(map(is_lazy, self.net.parameters())):
            torch.manual_seed(5)
        return super().training_step(batch, batch_idx)


class ByHand(Drawn):
    """Two lazy networks, each with an optimizer of its own, in manual optimization."""

    def __init__(self, factors, **options):
        super().__init__(factors, **options)
        self.automatic_optimization = False
        self.other = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.LazyLinear(1))

    def training_step(self, batch, batch_idx):
        if batch_idx == 0:
            torch.manual_seed(5)
        for net, optimizer in zip((self.net, self.other), self.optimizers(), strict=True):
            optimizer.zero_grad()
            factor = self.factors.get(batch_idx, 1.0)
            self.manual_backward(nn.functional.mse_loss(net(batch[0]), batch[1]) * factor)
            optimizer.step()

    def configure_optimizers(self):
        return [self.make_optimizer(net.parameters(), **self.options) for net in (self.net, self.other)]


def lazy_network():
    images = [nn.Unflatten(1, (2, 4)), nn.LazyConv1d(3, 2), nn.Flatten()]
    return nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), *images, nn.LazyLinear(1))


def made_before(module):
    """Give all lazy layers their shapes, without a trace in batch statistics."""
    inputs = next(iter(data()))[0]
    torch.manual_seed(5)
    for child in module.eval().children():
        child(inputs)
    module.train()
    return module


def options_for(family, tmp_path):
    fit, network = {}, {}
    if family in {"micro-batches", "weights of micro-batches"}:
        fit["accumulate_grad_batches"] = 2
    if family == "metrics":
        fit["logger"] = TensorBoardLogger(tmp_path)
    if family == "deferred":
        network = {"optimizer": torch.optim.Adam, "fused": True}
    return fit, network


def state_after(module, run, batches=4):
    run.fit(module, data(batches))
    return [*weights(module), *(buffer.clone() for buffer in module.buffers())]


@pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning")
@pytest.mark.parametrize(("family", "bad"), [*((family, (0,)) for family in FAMILIES), *((scope, ()) for scope in SCOPES)])
def test_lazy_modules_train_as_others(trainer, tmp_path, monkeypatch, family, bad):
    monkeypatch.chdir(tmp_path)
    factors = dict.fromkeys(bad, math.nan)
    fit, network = options_for(family, tmp_path)
    states = [
        state_after(made(Drawn(factors, net=lazy_network(), **network)), trainer(*FAMILIES[family](), **fit))
        for made in (made_before, lambda module: module)
    ]
    assert_same_bits(*states)
    assert all(tensor.isfinite().all() for tensor in states[0])


@pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning")
@pytest.mark.parametrize("bad", [(), (0,)], ids=["no bad batch", "a bad one first"])
def test_lazy_modules_of_several_optimizers_train_as_others(trainer, bad):
    factors = dict.fromkeys(bad, math.nan)
    states = []
    for made in (made_before, lambda module: module):
        module = made(ByHand(factors, net=lazy_network()))
        guard = NonFiniteGuard()
        states.append(state_after(module, trainer(guard, GradientClipping(0.1, scope="unit"))))
        assert guard.skipped_steps == 2 * len(bad)
    assert_same_bits(*states)
    assert all(tensor.isfinite().all() for tensor in states[1])


@pytest.mark.parametrize("family", ["unit", "limits of units", "metrics", "rollback"])
@pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning")
def test_lazy_modules_that_never_run_or_run_late_are_no_obstacle(trainer, tmp_path, family):
    class Unused(Drawn):
        def __init__(self):
            super().__init__({1: math.nan, 4: math.nan}, net=lazy_network())
            self.never, self.late = nn.LazyLinear(3), nn.LazyLinear(1)

        def loss(self, batch, batch_idx):
            loss = super().loss(batch, batch_idx)
            return loss + self.late(batch[0]).square().mean() if batch_idx >= 3 else loss

    fit, _ = options_for(family, tmp_path)
    module = Unused()
    trainer(*FAMILIES[family](), **fit).fit(module, data(6))
    made = {name: tensor for name, tensor in module.named_parameters() if not is_lazy(tensor)}
    assert {name for name, _ in module.named_parameters()} - made.keys() == {"never.weight", "never.bias"}
    assert "late.weight" in made
    assert all(tensor.isfinite().all() for tensor in made.values())


@pytest.mark.parametrize("scope", SCOPES)
def test_parameters_that_get_their_entries_in_mid_fit_are_clipped(trainer, scope):
    """As those of a lazy layer, but by other data for a parameter that has had a shape, and no entries."""

    class Grown(Drawn):
        def __init__(self, *, before):
            super().__init__({}, net=nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1)))
            self.late, self.drawn = nn.Linear(4, 1), torch.ones(1, 4)
            self.late.weight.data = self.drawn.clone() if before else torch.empty(0, 4)

        def loss(self, batch, batch_idx):
            loss = super().loss(batch, batch_idx)
            if batch_idx < 2:
                return loss
            if not self.late.weight.numel():
                self.late.weight.data = self.drawn.clone()
            return loss + self.late(batch[0]).square().mean()

    states = []
    for before in (True, False):
        torch.manual_seed(0)
        module = Grown(before=before)
        states.append(state_after(module, trainer(GradientClipping(0.01, scope=scope), NonFiniteGuard()), batches=5))
    assert_same_bits(*states)


def test_no_copy_to_go_back_to_is_made_of_what_lazy_modules_have_just_become(trainer):
    """It would lack the batch statistics of before: the first is made of the second good step."""
    guard = NonFiniteGuard(rollback=Rollback(), max_consecutive=1)
    module = Drawn({3: math.nan}, net=lazy_network())
    seen = []

    def note(batch, batch_idx):
        seen.append([tensor.clone() for tensor in module.buffers() if not is_lazy(tensor)])

    module.on_train_batch_start = note
    with pytest.warns(RuntimeWarning, match="returns to its state before step 1"):
        trainer(guard, GradientClipping(0.1)).fit(module, data(4))
    assert_same_bits(list(module.buffers()), seen[1])


def test_a_network_made_by_configure_model_is_met_by_rules(trainer):
    class Late(Poisoned):
        def __init__(self):
            super().__init__({})
            del self.net

        def configure_model(self):
            if not hasattr(self, "net"):
                self.net = nn.Sequential(nn.LazyLinear(3), nn.LazyLinear(1))

    clipping = GradientClipping(rules=[ClipRule(0.1, "unit", include=r"^net\.0", name="first")])
    trainer(clipping).fit(Late(), data(3))
    assert list(clipping.last_report.names) == ["net.0.weight[0]", "net.0.weight[1]", "net.0.weight[2]", "net.0.bias"]


class Growing(Poisoned):
    """A network to which a second one is added before a batch, or in it.

    Args:
        factors: Factors on losses, by batch.
        where: The hook in which it is added.
    """

    def __init__(self, factors, where, **options):
        normalized = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)]
        super().__init__(factors, net=nn.Sequential(nn.Embedding(3, 4, max_norm=0.5), *normalized), **options)
        self.where = where
        self.before = {}

    def grow(self, where, batch_idx):
        if batch_idx == 2 and where == self.where:
            self.late = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))
            self.trainer.optimizers[0].add_param_group({"params": list(self.late.parameters())})

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 2:
            self.before = {name: value.clone() for name, value in self.state_dict().items()}
            with torch.no_grad():
                self.net[0].weight.mul_(1.0)
        self.grow("on_train_batch_start", batch_idx)

    def loss(self, batch, batch_idx):
        self.grow("training_step", batch_idx)
        inputs = self.net[0](batch[0][:, 0].gt(0).long()) + batch[0]
        outputs = self.net[1:](inputs)
        if hasattr(self, "late"):
            outputs = outputs + self.late(inputs)
        return nn.functional.mse_loss(outputs, batch[1]) * self.factors.get(batch_idx, 1.0)


class GrowingByHand(Growing):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch, batch_idx))
        optimizer.step()


@pytest.mark.parametrize("where", ["on_train_batch_start", "training_step"])
@pytest.mark.parametrize("kind", [Growing, GrowingByHand])
def test_a_bad_batch_in_which_parameters_appear_never_happened(trainer, kind, where):
    guard = NonFiniteGuard()
    module = kind({2: math.nan}, where)
    with pytest.warns(RuntimeWarning, match="Non-finite gradients"):
        trainer(guard, GradientClipping(0.1, scope="unit")).fit(module, data(3))
    after = module.state_dict()
    assert guard.skipped_steps == 1
    assert_same_bits(list(module.before.values()), [after[name] for name in module.before])


def test_batch_statistics_that_appear_in_a_bad_batch_begin_anew(trainer):
    class NotANumber(Growing):
        def loss(self, batch, batch_idx):
            return super().loss([batch[0] * self.factors.get(batch_idx, 1.0), batch[1]], batch_idx)

    module = NotANumber({2: math.nan}, "training_step")
    with (
        pytest.warns(RuntimeWarning, match="Non-finite gradients"),
        pytest.warns(RuntimeWarning, match=r"late\.1\.running_mean, late\.1\.running_var are not finite and were made in a batch"),
    ):
        trainer(NonFiniteGuard(), GradientClipping(0.1)).fit(module, data(3))
    assert module.late[1].running_mean.tolist() == [0.0] * 6
    assert module.late[1].num_batches_tracked == 0


@pytest.mark.parametrize("family", [*SCOPES, "metrics", "rollback", "weights of micro-batches"])
def test_parameters_that_appear_are_clipped(trainer, tmp_path, family):
    fit, _ = options_for(family, tmp_path)
    callbacks = FAMILIES[family]()
    module = Growing({}, "training_step")
    trainer(*callbacks, **fit).fit(module, data(6))
    clipping = next(callback for callback in callbacks if isinstance(callback, GradientClipping))
    report = record_of(clipping.last_report)
    assert len(report.parameter_norms) == len(list(module.parameters()))
    torch.testing.assert_close(float(report.parameter_norms.double().norm()), float(report.total_norm), rtol=1e-5, atol=0)


def test_a_bad_micro_batch_in_which_parameters_appear_is_dropped(trainer):
    guard = NonFiniteGuard(level="microbatch")
    module = Growing({2: math.nan}, "training_step")
    with pytest.warns(RuntimeWarning, match="the micro-batch is dropped"):
        trainer(guard, GradientClipping(0.1), accumulate_grad_batches=2).fit(module, data(4))
    assert (guard.dropped_micro_batches, guard.skipped_steps) == (1, 0)
    assert all(tensor.isfinite().all() for tensor in module.parameters())
