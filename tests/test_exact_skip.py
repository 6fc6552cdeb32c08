"""A skipped step never happened: optimizers x implementations x kinds of poison x places x loops, bit for bit.

The same harness is run against guards that people write by hand, to show that it can fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader

from clip_callbacks import GradientClipping, GradientNormMonitor, NonFiniteGuard
from tests.conftest import Regression, assert_same_bits, data, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning", "ignore:.*lr_scheduler.step.*:UserWarning")

O = torch.optim  # noqa: E741
FOREACH: dict[str, dict[str, Any]] = {"loop": {"foreach": False}, "foreach": {"foreach": True}}
FUSED = FOREACH | {"fused": {"fused": True}}
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any], dict[str, dict[str, Any]]]] = {
    "Adadelta": (O.Adadelta, {"weight_decay": 0.1}, FOREACH),
    "Adafactor": (O.Adafactor, {"weight_decay": 0.1}, FOREACH),
    "Adagrad": (O.Adagrad, {"lr_decay": 0.1}, FUSED),
    "Adam": (O.Adam, {"weight_decay": 0.1, "amsgrad": True}, FUSED),
    "AdamW": (O.AdamW, {"weight_decay": 0.1}, FUSED),
    "Adamax": (O.Adamax, {}, FOREACH),
    "ASGD": (O.ASGD, {"t0": 2.0}, FOREACH),
    "LBFGS": (O.LBFGS, {"max_iter": 4, "history_size": 3}, {"loop": {}, "wolfe": {"line_search_fn": "strong_wolfe"}}),
    "Muon": (O.Muon, {"weight_decay": 0.1}, {"loop": {}}),
    "NAdam": (O.NAdam, {"weight_decay": 0.1}, FOREACH),
    "RAdam": (O.RAdam, {"weight_decay": 0.1}, FOREACH),
    "RMSprop": (O.RMSprop, {"momentum": 0.5, "centered": True}, FOREACH),
    "Rprop": (O.Rprop, {}, FOREACH),
    "SGD": (O.SGD, {"weight_decay": 0.1}, FUSED),
    "SGD momentum": (O.SGD, {"momentum": 0.9, "weight_decay": 0.1}, FUSED),
    "SGD nesterov": (O.SGD, {"momentum": 0.9, "nesterov": True}, FUSED),
    "SparseAdam": (O.SparseAdam, {}, {"loop": {}}),
}
KINDS = ["nan", "inf", "-inf", "all", "loss"]
PLACES = {"first": {0}, "later": {4}, "two in a row": {2, 3}}
BATCHES = 8


@dataclass(frozen=True)
class Cell:
    optimizer: str
    implementation: str
    kind: str
    place: str
    loop: str

    def __str__(self) -> str:
        return "-".join((self.optimizer, self.implementation, self.kind, self.place, self.loop))


CELLS = [
    Cell(name, implementation, kind, place, loop)
    for name, (_, _, implementations) in OPTIMIZERS.items()
    for implementation in implementations
    for kind in KINDS
    for place in PLACES
    for loop in ("automatic", "manual")
]


class Subject(Regression):
    """A network with batch statistics, poisoned in one entry, in all, or in the loss; the batch says whether."""

    def __init__(self, cell: Cell) -> None:
        make, options, implementations = OPTIMIZERS[cell.optimizer]
        sparse = cell.optimizer == "SparseAdam"
        net = nn.EmbeddingBag(6, 1, sparse=True) if sparse else nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        super().__init__(make, net, lr=0.02, **options, **implementations[cell.implementation])
        self.cell, self.automatic_optimization = cell, cell.loop == "automatic"
        self.norm = nn.BatchNorm1d(4, affine=False) if sparse else nn.Identity()

    def forward_loss(self, batch: Any) -> torch.Tensor:
        inputs, targets, _ = batch
        if self.cell.optimizer == "SparseAdam":
            self.norm(inputs)
            inputs = (inputs.nan_to_num(1.0).abs() * 3).clamp(max=5).long()
        return nn.functional.mse_loss(self.net(inputs), targets)

    def loss(self, batch: Any, batch_idx: int) -> torch.Tensor:
        poisoned = bool(batch[2])
        if poisoned:  # what made the gradients bad has gone through the network: its batch statistics are bad too
            batch = (batch[0] * math.inf if self.cell.kind == "loss" else batch[0] * 1e3, *batch[1:])
        loss = self.forward_loss(batch)
        return loss * math.nan if poisoned and self.cell.kind == "loss" else loss

    def poison(self, batch: Any) -> None:
        if bool(batch[2]) and self.cell.kind != "loss":
            parameter = self.trainer.optimizers[0].param_groups[0]["params"][-1]
            gradient = parameter.grad.coalesce() if parameter.grad.is_sparse else parameter.grad
            values = gradient.values() if gradient.is_sparse else gradient
            bad = math.nan if self.cell.kind == "all" else float(self.cell.kind)
            values.fill_(bad) if self.cell.kind == "all" else values.view(-1)[0].fill_(bad)
            parameter.grad = gradient

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor | None:
        self.batch = batch
        if self.automatic_optimization:
            return self.loss(batch, batch_idx)
        optimizer = self.optimizers()

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch, batch_idx)
            self.manual_backward(loss)
            return loss

        if self.cell.optimizer == "LBFGS":
            optimizer.step(closure=closure)
        else:
            closure()
            optimizer.step()
        return None

    def on_after_backward(self) -> None:
        self.poison(self.batch)

    def configure_optimizers(self) -> Any:
        parameters = self.parameters()
        if self.cell.optimizer == "Muon":  # matrices only
            parameters = [p for p in parameters if p.ndim == 2]
        optimizer = self.make_optimizer(parameters, **self.options)
        if not self.automatic_optimization:
            return optimizer
        schedule = O.lr_scheduler.ExponentialLR(optimizer, 0.7)
        if any(key in optimizer.defaults for key in ("momentum", "betas")) and self.cell.optimizer not in {
            "LBFGS",
            "Rprop",
            "Muon",
        }:
            schedule = O.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 2}}


def everything(module: Subject, fit: Any) -> dict[str, Any]:
    """All that a batch may change, flat."""
    optimizer = fit.optimizers[0]
    flat: dict[str, Any] = {f"module.{key}": value for key, value in module.state_dict().items()}
    for number, state in enumerate(optimizer.state.values()):
        flat |= {f"state.{number}.{key}": value for key, value in state.items()}
    for number, group in enumerate(optimizer.param_groups):
        flat |= {f"group.{number}.{key}": value for key, value in group.items() if key != "params"}
    for config in fit.lr_scheduler_configs:
        flat |= {f"schedule.{key}": value for key, value in config.scheduler.state_dict().items() if not callable(value)}
    return flat


def train(tmp_path: Any, cell: Cell, poisoned: set[int], left_out: set[int], *callbacks: Callback) -> dict[str, Any]:
    batches = [(*batch, torch.tensor(number in poisoned)) for number, batch in enumerate(data(BATCHES, batch_size=6))]
    kept = [batch for number, batch in enumerate(batches) if number not in left_out]
    torch.manual_seed(0)
    module = Subject(cell)
    fit = make_trainer(tmp_path, *callbacks)
    fit.fit(module, DataLoader(kept, batch_size=None))
    return everything(module, fit)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    return sorted(left.keys() ^ right.keys()) + [key for key in left.keys() & right.keys() if not same(left[key], right[key])]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_skipped_step_never_happened(tmp_path, cell):
    bad = PLACES[cell.place]
    guarded = train(tmp_path, cell, bad, set(), NonFiniteGuard())
    clean = train(tmp_path, cell, set(), bad, NonFiniteGuard())
    assert differences(guarded, clean) == []


class ZeroingGuard(Callback):
    """What people write: zero the gradients of a bad step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if not all(torch.isfinite(p.grad).all() for p in pl_module.parameters() if p.grad is not None):
            optimizer.zero_grad(set_to_none=False)


class NoneGuard(Callback):
    """What more careful people write."""

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


class Recorded(Regression):
    """Keeps the learning rate and momentum after every batch."""

    def __init__(self, schedule, interval="step", frequency=1, poison=(), net=None, **options):
        super().__init__(O.SGD, net, momentum=0.9, lr=0.1, **options)
        self.schedule, self.interval, self.frequency, self.poison = schedule, interval, frequency, set(poison)
        self.rates = []

    def loss(self, batch, batch_idx):
        loss = super().loss(batch, batch_idx)
        return loss * math.nan if self.trainer.fit_loop.epoch_loop.total_batch_idx in self.poison else loss

    def on_train_batch_end(self, *_):
        if self.trainer.fit_loop.epoch_loop.total_batch_idx not in self.poison:
            group = self.trainer.optimizers[0].param_groups[0]
            self.rates.append((group["lr"], group.get("momentum")))

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        config = {"scheduler": self.schedule(optimizer), "interval": self.interval, "frequency": self.frequency}
        return {"optimizer": optimizer, "lr_scheduler": config | {"monitor": "train_loss"}}


SCHEDULES = {
    "OneCycle": lambda o: O.lr_scheduler.OneCycleLR(o, 0.5, total_steps=40),
    "Sequential": lambda o: O.lr_scheduler.SequentialLR(
        o, [O.lr_scheduler.LinearLR(o, 0.1, total_iters=3), O.lr_scheduler.CosineAnnealingLR(o, 20)], milestones=[3]
    ),
    "Step": lambda o: O.lr_scheduler.StepLR(o, 3, 0.5),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("frequency", [1, 2, 3])
@pytest.mark.parametrize("poison", [{0}, {3}, {2, 3, 7}])
def test_schedules_stand_still(trainer, name, frequency, poison):
    batches = list(data(12, size=0.1))
    poisoned = Recorded(SCHEDULES[name], frequency=frequency, poison=poison)
    trainer(GradientClipping(1.0)).fit(poisoned, DataLoader(batches, batch_size=None))
    clean = Recorded(SCHEDULES[name], frequency=frequency)
    kept = [batch for number, batch in enumerate(batches) if number not in poison]
    trainer(GradientClipping(1.0)).fit(clean, DataLoader(kept, batch_size=None))
    assert poisoned.rates == clean.rates


def test_schedules_are_held_for_skipped_windows(trainer):
    batches = list(data(12, size=0.1))
    poisoned = Recorded(SCHEDULES["OneCycle"], frequency=3, poison={4})
    trainer(GradientClipping(1.0), accumulate_grad_batches=3).fit(poisoned, DataLoader(batches, batch_size=None))
    clean = Recorded(SCHEDULES["OneCycle"], frequency=3)
    trainer(GradientClipping(1.0), accumulate_grad_batches=3).fit(clean, DataLoader(batches[:3] + batches[6:], batch_size=None))
    assert poisoned.rates[-1] == clean.rates[-1]


def test_schedules_of_epochs_and_plateaus_are_left_to_lightning(trainer):
    for interval, schedule in (("epoch", SCHEDULES["Step"]), ("epoch", O.lr_scheduler.ReduceLROnPlateau)):
        rates = []
        for poison in (set(), {1}):
            module = Recorded(schedule, interval, poison=poison)
            trainer(GradientClipping(1.0), max_epochs=4).fit(module, data(4, size=0.1))
            rates.append(module.rates[-1])
        assert rates[0] == rates[1]


def test_both_can_be_turned_off(trainer):
    guard = NonFiniteGuard(restore_buffers=False, hold_schedulers=False)
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    module = Recorded(SCHEDULES["Step"], poison={2}, net=net)
    trainer(guard).fit(module, data(6, size=0.1))
    assert net[1].num_batches_tracked == 6
    assert len({rate for rate, _ in module.rates}) == 3


def test_statistics_are_those_of_before_the_window_under_accumulation(trainer):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    batches = list(data(9, size=0.1))
    poisoned = Recorded(SCHEDULES["Step"], poison={4}, net=net())
    trainer(GradientClipping(1.0), accumulate_grad_batches=3).fit(poisoned, DataLoader(batches, batch_size=None))
    clean = Recorded(SCHEDULES["Step"], net=net())
    trainer(GradientClipping(1.0), accumulate_grad_batches=3).fit(clean, DataLoader(batches[:3] + batches[6:], batch_size=None))
    assert_same_bits(list(poisoned.state_dict().values()), list(clean.state_dict().values()))


def test_keeping_statistics_allocates_nothing_per_step(trainer):
    from clip_callbacks.callbacks._statistics import BatchStatistics

    module = Regression(net=nn.Sequential(nn.Linear(4, 4096), nn.BatchNorm1d(4096), nn.Linear(4096, 1)))
    statistics = BatchStatistics(module, is_on=True)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        statistics.keep()
        statistics.restore()
    assert max((abs(event.self_cpu_memory_usage) for event in profile.key_averages()), default=0) < 4096


def test_an_optimizer_that_moves_without_gradients_is_named(trainer):
    class Restless(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            loss = super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.99)
            return loss

    module = Recorded(SCHEDULES["Step"], poison={2})
    module.make_optimizer = Restless
    with pytest.raises(
        RuntimeError, match="leave parameters without a gradient alone, got Restless, which moved them in a skipped step"
    ):
        trainer(GradientClipping(1.0)).fit(module, data(6, size=0.1))


class Cliff(Regression):
    """Finite at the first closure call of every step, NaN at the third where the batch says so, and finite again after it."""

    calls = 0

    def training_step(self, batch, batch_idx):
        self.calls = self.calls + 1 if getattr(self, "last", -1) == batch_idx else 1
        self.last = batch_idx
        loss = self.loss(batch, batch_idx)
        return loss * math.nan if int(batch[2]) and self.calls == 3 else loss


@pytest.mark.parametrize(
    ("norm", "options"),
    [(nn.Identity, {"lr": 0.05}), (lambda: nn.BatchNorm1d(8), {"lr": 0.5, "line_search_fn": "strong_wolfe"})],
    ids=["plain", "strong_wolfe"],
)
def test_lbfgs_undoes_a_search_that_blows_up(trainer, norm, options):
    def run(kept):
        torch.manual_seed(0)
        module = Cliff(O.LBFGS, nn.Sequential(nn.Linear(4, 8), norm(), nn.Linear(8, 1)), max_iter=4, **options)
        batches = [(*batch, torch.tensor(number == 2)) for number, batch in enumerate(data(5, size=0.1))]
        guard, monitor = NonFiniteGuard(), GradientNormMonitor()
        trainer(guard, monitor).fit(module, DataLoader([batches[i] for i in kept], batch_size=None))
        return list(module.state_dict().values()), guard, monitor

    poisoned, guard, monitor = run([0, 1, 2, 3, 4])
    clean, _, _ = run([0, 1, 3, 4])
    assert guard.skipped_steps == 1
    assert monitor.state_dict()["norms"][0].shape == (5,), "where the step began it was healthy, and no closure call counts again"
    assert_same_bits(poisoned, clean)


class Momentous(torch.optim.SGD):
    """Goes on with its momentum where there is no gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None and "momentum_buffer" in self.state[parameter]:
                    parameter.add_(self.state[parameter]["momentum_buffer"], alpha=-group["lr"])
        return loss


class Sneaky(torch.optim.SGD):
    """Moves parameters behind the back of their version counters."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(0.5)
        return loss


@pytest.mark.parametrize(("optimizer", "poison"), [(Momentous, {0, 5}), (Sneaky, {3})])
def test_restless_optimizers_are_found_out_whenever_they_move(trainer, optimizer, poison):
    module = Recorded(SCHEDULES["Step"], poison=poison)
    module.make_optimizer = optimizer
    with pytest.raises(RuntimeError, match=f"got {optimizer.__name__}, which moved them in a skipped step"):
        trainer(GradientClipping(1.0)).fit(module, data(8, size=0.1))


class Adversaries(Regression):
    """A GAN with batch normalization on both sides; a bad batch goes through both."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.discriminator = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        del self.net

    def training_step(self, batch, batch_idx):
        noise, poisoned = batch[0], batch[2]
        noise = noise * math.nan if bool(poisoned) else noise
        first, second = self.optimizers()
        second.zero_grad()
        self.manual_backward(
            self.discriminator(self.generator(noise).detach()).square().mean() - self.discriminator(batch[0]).mean()
        )
        second.step()
        first.zero_grad()
        self.manual_backward(-self.discriminator(self.generator(noise)).mean())
        first.step()

    def configure_optimizers(self):
        return [O.AdamW(self.generator.parameters(), lr=0.01), O.AdamW(self.discriminator.parameters(), lr=0.01)]


@pytest.mark.parametrize("bad", [{0}, {3}, {2, 3}])
def test_a_gans_batch_statistics_are_those_of_the_clean_run(trainer, bad):
    results = []
    for poisoned, left_out in ((bad, set()), (set(), bad)):
        torch.manual_seed(0)
        module = Adversaries()
        batches = [(*batch, torch.tensor(number in poisoned)) for number, batch in enumerate(data(7, size=0.1))]
        kept = [batch for number, batch in enumerate(batches) if number not in left_out]
        trainer(GradientClipping(1.0)).fit(module, DataLoader(kept, batch_size=None))
        results.append(list(module.state_dict().values()))
    assert_same_bits(*results)


@pytest.mark.filterwarnings("ignore:The lr scheduler dict contains the key")
def test_statistics_reset_between_epochs_stay_reset(trainer):
    class Resetting(Recorded):
        def __init__(self):
            net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
            super().__init__(SCHEDULES["Step"], net=net, poison={6})
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch, batch_idx))
            optimizer.step()

        def on_train_epoch_start(self):
            self.net[1].reset_running_stats()

    module = Resetting()
    trainer(GradientClipping(1.0), max_epochs=2).fit(module, data(6, size=0.1))
    assert module.net[1].num_batches_tracked == 5


def test_hooks_leave_the_optimizer_when_training_breaks_off(trainer):
    class Breaking(Recorded):
        def on_train_batch_end(self, *_):
            if self.trainer.fit_loop.batch_idx == 3:
                raise KeyError("user")

    for make in (O.SGD, O.LBFGS):
        module = Breaking(SCHEDULES["Step"], poison={3})
        module.make_optimizer, module.options = make, {"lr": 0.1}
        fit = trainer(GradientClipping(1.0))
        with pytest.raises(KeyError, match="user"):
            fit.fit(module, data(6, size=0.1))
        assert not fit.optimizers[0]._optimizer_step_post_hooks


def test_one_warning_for_one_bad_step_of_lbfgs(trainer):
    module = Recorded(SCHEDULES["Step"], poison={2})
    module.make_optimizer, module.options = O.LBFGS, {"lr": 0.1, "max_iter": 4}
    with pytest.warns(RuntimeWarning) as caught:
        trainer(NonFiniteGuard("zero")).fit(module, data(4, size=0.1))
    assert len([w for w in caught if "Non-finite" in str(w.message)]) == 1


def test_a_skip_leaves_graphs_alone_that_another_optimizer_is_still_to_use(trainer):
    """By hand: one forward pass through batch statistics, two losses; the first optimizer's step is skipped between them."""

    class Two(Regression):
        def __init__(self) -> None:
            super().__init__(net=nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)))
            self.automatic_optimization, self.second = False, nn.Linear(1, 1)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            hidden = self.net(batch[0])
            first.zero_grad()
            second.zero_grad()
            self.manual_backward(hidden.mean() * math.nan, retain_graph=True, inputs=list(self.net.parameters()))
            first.step()
            self.manual_backward(self.second(hidden).square().mean(), inputs=[*self.second.parameters(), self.net[0].weight])
            second.step()

        def configure_optimizers(self) -> Any:
            return O.SGD(self.net.parameters(), lr=0.0), O.SGD(self.second.parameters(), lr=0.1)

    module = Two()
    trainer(guard := NonFiniteGuard()).fit(module, data(1))
    assert [guard.skipped_steps_of(index) for index in (0, 1)] == [1, 0]
    assert module.net[0].weight.grad.isfinite().all()
