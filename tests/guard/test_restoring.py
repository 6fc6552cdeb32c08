"""State that a skipped step restores, and optimizers that move without gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from clip_callbacks import GradientClipping, GradientNormMonitor, NonFiniteGuard
from tests.helpers.exact_skip import Recorded
from tests.helpers.members import SCHEDULES, O
from tests.helpers.training import Regression, assert_same_bits, data

pytestmark = pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning", "ignore:.*lr_scheduler.step.*:UserWarning")


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
    from clip_callbacks.trainer.buffer_copies import BufferCopies
    from clip_callbacks.trainer.buffer_tracker import BufferTracker

    module = Regression(net=nn.Sequential(nn.Linear(4, 4096), nn.BatchNorm1d(4096), nn.Linear(4096, 1)))
    written = BufferTracker(module)
    statistics = BufferCopies(written)
    written.begin_window()
    statistics.keep()
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
