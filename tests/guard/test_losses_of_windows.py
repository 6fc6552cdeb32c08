"""The loss of a window is that of its gradient: of any length, whatever the module does with its losses, or its parameters."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.utils.data import DataLoader

from clip_callbacks import AccumulationRescaling, Limit, NonFiniteGuard, RobustZScoreLimit, TightestLimit
from clip_callbacks.accumulation.optimizer_window import OptimizerWindow
from tests.helpers.training import SAFELY, Regression, data

pytestmark = pytest.mark.filterwarnings("ignore:Spike:RuntimeWarning", "ignore:Non-finite gradients:RuntimeWarning")


class Given(LightningModule):
    """Losses are what the batches say; gradients are 0."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def training_step(self, batch, batch_idx):
        return (self.weight * 0).sum() + batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Half(Given):
    """Losses are float16."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx).half()


def loss_of(trainer, losses, *callbacks, module=Given, **options):
    """The logged loss of one window of these losses, and the number of spikes above 5."""
    guard = NonFiniteGuard("warn", loss_above=5.0)
    fit = trainer(guard, *callbacks, accumulate_grad_batches=len(losses), **options)
    fit.fit(module(), DataLoader(losses, batch_size=None))
    return float(fit.callback_metrics["grad/loss"]), guard.spikes


@pytest.mark.parametrize("callbacks", [(), (AccumulationRescaling(),)], ids=["plain", "rescaled"])
@pytest.mark.parametrize("count", [7, 8, 9, 16, 29])
def test_a_window_of_any_length_has_a_mean(trainer, monkeypatch, count, callbacks):
    monkeypatch.setattr(OptimizerWindow, "max_length", 8)
    losses = [torch.tensor(100.0 if place < 3 else 1.0) for place in range(count)]
    loss, spikes = loss_of(trainer, losses, *callbacks)
    assert loss == pytest.approx((300.0 + count - 3) / count)
    assert spikes == 1


def test_a_bad_loss_at_the_beginning_of_a_long_window_is_found(trainer, monkeypatch):
    monkeypatch.setattr(OptimizerWindow, "max_length", 8)
    guard, losses = NonFiniteGuard(), [torch.tensor(math.nan if place == 1 else 1.0) for place in range(29)]
    trainer(guard, accumulate_grad_batches=29).fit(Given(), DataLoader(losses, batch_size=None))
    assert guard.skipped_steps == 1


def test_a_second_long_window_has_a_mean_of_its_own(trainer, monkeypatch):
    monkeypatch.setattr(OptimizerWindow, "max_length", 8)
    losses = [torch.tensor(100.0)] * 29 + [torch.tensor(7.0)] * 29
    guard = NonFiniteGuard("warn", loss_above=50.0)
    fit = trainer(guard, accumulate_grad_batches=29)
    fit.fit(Given(), DataLoader(losses, batch_size=None))
    assert float(fit.callback_metrics["grad/loss"]) == pytest.approx(7.0)
    assert guard.spikes == 1


def test_an_infinite_float16_loss_of_a_long_window_is_not_bad(trainer, monkeypatch):
    """It may be an effect of the loss scale, as in a short window."""
    monkeypatch.setattr(OptimizerWindow, "max_length", 8)
    guard, losses = NonFiniteGuard(), [torch.tensor(math.inf if place == 1 else 1.0) for place in range(29)]
    trainer(guard, accumulate_grad_batches=29).fit(Half(), DataLoader(losses, batch_size=None))
    assert guard.skipped_steps == 0


@pytest.mark.parametrize("callbacks", [(), (AccumulationRescaling(),)], ids=["plain", "rescaled"])
def test_a_long_window_of_float16_losses_has_a_mean(trainer, monkeypatch, callbacks):
    monkeypatch.setattr(OptimizerWindow, "max_length", 8)
    loss, _ = loss_of(trainer, [torch.tensor(float(place)) for place in range(29)], *callbacks, module=Half)
    assert loss == pytest.approx(14.0, rel=1e-3)  # Lightning divides each loss, in float16


class Annotated(torch.Tensor):
    """A tensor that carries more than its entries, as those of imaging packages do."""


class LastLoss(Limit):
    """Remembers a loss as it is given."""

    takes_losses = True

    def init(self, blocks):
        return {"last": torch.full((blocks,), math.inf)}

    def step(self, blocks, state):
        return 3.0 * state["last"], {"last": blocks.norms}


@pytest.mark.parametrize("limit", [LastLoss(), TightestLimit(LastLoss(), 1e6)], ids=["alone", "tightest"])
@pytest.mark.parametrize("windows", [1, 2])
def test_a_loss_of_another_class_leaves_plain_tensors(trainer, tmp_path, limit, windows):
    class Module(Regression):
        def loss(self, batch, batch_idx):
            return super().loss(batch, batch_idx).as_subclass(Annotated)

    guard = NonFiniteGuard("warn", loss_above=limit)
    trainer(guard, accumulate_grad_batches=windows).fit(Module(), data(4))
    torch.save(guard.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(value.isfinite().all() for value in saved["loss_above"][0]["state"].values())


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_mean_of_losses_near_the_largest_number_is_finite(trainer, count):
    loss, spikes = loss_of(trainer, [torch.tensor(1.5e38)] * count)
    assert loss == pytest.approx(1.5e38)
    assert spikes == 1


class Manual(Regression):
    """One step a batch, in manual optimization; subclasses do more around it."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.losses = []

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch, batch_idx)
        self.losses.append(loss.item())
        self.manual_backward(loss)
        self.after_backward(loss)
        optimizer.step()

    def after_backward(self, loss):
        pass


class Overwritten(Manual):
    """The module writes to its loss once the backward pass is over."""

    def after_backward(self, loss):
        loss.detach().fill_(math.nan)


class BesideAnother(Manual):
    """Another loss is of a parameter that the optimizer does not hold."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.zeros(()))

    def after_backward(self, loss):
        self.manual_backward(self.temperature * math.nan)
        self.temperature.grad = None

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.01)


class Scaled(Manual):
    """The module scales its loss in its own hook, before the pass."""

    def on_before_backward(self, loss):
        loss.mul_(10.0)
        self.losses[-1] = loss.item()


class Unfrozen(BesideAnother):
    """The optimizer takes up what the loss is of from then on, in the batch itself."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            self.net[0].requires_grad_(True)
            self.net[2].requires_grad_(False)
            self.optimizers().add_param_group({"params": list(self.net[0].parameters())})
        super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        self.net[0].requires_grad_(False)
        return torch.optim.SGD(self.net[2].parameters(), lr=0.01)


@pytest.mark.parametrize("module", [Manual, Overwritten, BesideAnother, Scaled, Unfrozen])
@pytest.mark.parametrize("callbacks", [(), (AccumulationRescaling(divide=True),)], ids=["plain", "divided"])
def test_the_loss_of_a_manual_step_is_that_of_its_gradient(trainer, module, callbacks):
    torch.manual_seed(0)
    subject, guard = module(), NonFiniteGuard(loss_above=1e9)
    fit = trainer(guard, *callbacks)
    fit.fit(subject, data(4))
    assert float(fit.callback_metrics["grad/loss"]) == pytest.approx(subject.losses[-1])
    assert guard.skipped_steps == 0


class Renamed(Callback):
    """From the second epoch on the optimizer holds other parameters."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            trainer.strategy.optimizers = [torch.optim.SGD(pl_module.net[2].parameters(), lr=0.001)]


class OneLayer(Regression):
    """The optimizer holds one layer of two."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[0].parameters(), lr=0.001)


def test_the_state_of_the_losses_goes_on_with_other_parameters(trainer, tmp_path):
    limit = RobustZScoreLimit(6.0, window=64, warmup=3, scale="linear")
    guard = NonFiniteGuard(loss_above=limit)
    fit = trainer(Renamed(), guard, max_epochs=2)
    fit.fit(OneLayer(), data(12))
    assert int(guard.state_dict()["loss_above"][0]["state"]["count"]) == 24

    fit.save_checkpoint(tmp_path / "last.ckpt")

    class Wrapped(OneLayer):
        def __init__(self):
            super().__init__()
            self.wrapper = nn.ModuleDict({"net": self.net})
            del self.net

        def on_load_checkpoint(self, checkpoint):
            checkpoint["state_dict"] = {f"wrapper.{key}": value for key, value in checkpoint["state_dict"].items()}

        @property
        def _net(self):
            return self.wrapper["net"]

        def loss(self, batch, batch_idx):
            return nn.functional.mse_loss(self._net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self._net[2].parameters(), lr=0.001)

    resumed = NonFiniteGuard(loss_above=limit)
    trainer(resumed, max_epochs=3).fit(Wrapped(), data(12), ckpt_path=tmp_path / "last.ckpt", **SAFELY)
    assert int(resumed.state_dict()["loss_above"][0]["state"]["count"]) == 36


class OnePassByLightning(Manual):
    """Two optimizers: the pass of the first one goes through Lightning, that of the second one does not."""

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.net[0](batch[0]).square().mean())
        self.net[2](torch.ones(8)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[place].parameters(), lr=0.01) for place in (0, 2)]


@pytest.mark.filterwarnings(
    "ignore:The loss of an optimizer step is not known", "ignore:Every micro-batch of the window has weight 0"
)
def test_a_weight_of_0_is_of_the_optimizers_that_its_pass_reaches(trainer):
    callbacks = [NonFiniteGuard(loss_above=1e9), AccumulationRescaling(lambda batch: 0.0, divide=True)]
    fit = trainer(*callbacks)
    fit.fit(OnePassByLightning(), data(2))
    assert "grad/loss-SGD-1" not in fit.callback_metrics, "nobody knows it, and it is not 0"


class ForgetsBadBatches(Regression):
    """Sets gradients to zero after a batch whose loss is not finite, as a guard written by hand does."""

    def __init__(self):
        super().__init__(net=nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)))
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if not outputs["loss"].isfinite():
            self.optimizers().zero_grad()


def poisoned_at(place, batches=8):
    loader = data(batches)
    inputs, targets = (tensor.clone() for tensor in loader.dataset.tensors)
    inputs[place * loader.batch_size] = math.nan
    return DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=loader.batch_size)


@pytest.mark.filterwarnings("ignore:Non-finite buffers:RuntimeWarning")
@pytest.mark.parametrize("callbacks", [(), (AccumulationRescaling(),)], ids=["plain", "rescaled"])
def test_a_window_whose_gradients_other_code_sets_to_zero_leaves_no_trace(trainer, callbacks):
    guard, module = NonFiniteGuard(loss_above=1e6), ForgetsBadBatches()
    fit = trainer(guard, *callbacks, accumulate_grad_batches=4)
    fit.fit(module, poisoned_at(5))
    assert guard.skipped_steps == 0
    assert float(fit.callback_metrics["grad/loss"]) == pytest.approx(sum(module.losses[6:]) / 2)
    if callbacks:  # the mean over the two micro-batches since
        assert float(fit.callback_metrics["grad/accumulation_scale"]) == 2.0
    assert all(buffer.isfinite().all() for buffer in module.buffers())


def test_a_window_begins_where_lightning_sets_gradients_to_zero(trainer):
    class Longer(ForgetsBadBatches):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 4:  # in mid-window: Lightning sets gradients to zero in the next batch, whose number is divisible by 5
                self.trainer.accumulate_grad_batches = 5

    module = Longer()
    fit = trainer(NonFiniteGuard(loss_above=1e6), accumulate_grad_batches=4)
    fit.fit(module, data(10))
    assert float(fit.callback_metrics["grad/loss"]) == pytest.approx(sum(module.losses[5:]) / 5)


@pytest.mark.parametrize("policy", ["warn", "ignore"])
def test_a_guard_that_takes_bad_steps_restores_no_buffers(trainer, policy):
    """Nor after batches that lead to no step."""

    class NoStep(ForgetsBadBatches):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss if batch_idx < 5 else None

        def on_train_batch_end(self, outputs, batch, batch_idx):
            pass

    module = NoStep()
    trainer(NonFiniteGuard(policy)).fit(module, poisoned_at(5))
    assert not module.net[1].running_mean.isfinite().any()
