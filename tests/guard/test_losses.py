"""A non-finite loss makes a step bad as gradients do; one that no loss scale would change leaves the GradScaler as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from clip_callbacks import GradientClipping, GradientNormMonitor, NonFiniteGradientError, NonFiniteGuard
from tests.helpers.exact_skip import differences
from tests.helpers.matrix import matrix
from tests.helpers.records import record_of
from tests.helpers.training import TRUSTING, Poisoned, Regression, assert_same_bits, data, make_trainer, scaled, weights

pytestmark = pytest.mark.filterwarnings(
    "ignore:Non-finite gradients:RuntimeWarning",
    "ignore:Parameters are shared:RuntimeWarning",
    "ignore:.*lr_scheduler.step.*:UserWarning",
)

BATCHES = 10
ZERO_GRADIENTS = {
    "labels ignored": lambda net, batch: nn.functional.cross_entropy(net(batch), torch.full((len(batch),), -100)),
    "empty batch": lambda net, batch: nn.functional.mse_loss(net(batch[:0]), torch.zeros(0, 3)),
    "infinite constant": lambda net, batch: net(batch).square().mean() + math.inf,
    "chosen away": lambda net, batch: torch.where(torch.tensor(True), math.nan, net(batch).sum()),
}


class Labelled(LightningModule):
    """A classifier, some batches of which have a bad loss with finite gradients."""

    def __init__(self, kind: str, bad: set[int], *, is_manual: bool = False, fused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.kind, self.bad, self.fused, self.automatic_optimization = kind, bad, fused, not is_manual

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, labels, number = batch
        loss = nn.functional.cross_entropy(self.net(inputs), labels)
        if int(number) in self.bad:
            loss = ZERO_GRADIENTS[self.kind](self.net, inputs)
        if self.automatic_optimization:
            return loss
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()
        return None

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05, fused=self.fused)


def loader(left_out: set[int] = frozenset()) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    batches = [(torch.randn(6, 4, generator=generator), torch.randint(3, (6,), generator=generator), n) for n in range(BATCHES)]
    return DataLoader([batch for batch in batches if batch[2] not in left_out], batch_size=None)


def scaler_of(fit: Any) -> Any:
    return fit.precision_plugin.scaler


@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 1, 1)])
def test_a_loss_may_have_dimensions(trainer, shape):
    class Shaped(Poisoned):
        def loss(self, batch, batch_idx):
            return super().loss(batch, batch_idx).reshape(shape)

    guard = NonFiniteGuard()
    trainer(guard).fit(Shaped({2: math.nan}), data(5))
    assert guard.skipped_steps == 1
    assert bool(record_of(guard.last_report).finite)


WAYS: dict[str, dict[str, Any]] = {
    "automatic": {},
    "manual": {"is_manual": True},
    "on the device": {"fused": True, "deferred": True},
    "accumulated": {"accumulate_grad_batches": 2},
    "16-mixed": {"scaled": True},
    "16-mixed manual": {"scaled": True, "is_manual": True},
    "16-mixed fused": {"scaled": True, "fused": True, "deferred": False},
    "16-mixed on the device": {"scaled": True, "fused": True, "deferred": True},
}


def fitted(tmp_path: Any, kind: str, bad: set[int], left_out: set[int], way: str) -> tuple[dict[str, Any], NonFiniteGuard]:
    options = dict(WAYS[way])
    is_scaled, deferred = options.pop("scaled", False), options.pop("deferred", None)
    module = Labelled(kind, bad, is_manual=options.pop("is_manual", False), fused=options.pop("fused", False))
    guard = NonFiniteGuard(deferred=deferred)
    fit = make_trainer(tmp_path, guard, GradientClipping(1.0), **options, **(scaled(init_scale=64.0) if is_scaled else {}))
    fit.fit(module, loader(left_out))
    flat: dict[str, Any] = dict(module.state_dict())
    for number, state in enumerate(fit.optimizers[0].state.values()):
        flat |= {f"{number}.{key}": value for key, value in state.items()}
    if is_scaled:
        flat |= scaler_of(fit).state_dict()
    return flat, guard


@matrix(way=list(WAYS), kind=list(ZERO_GRADIENTS), place=["first", "two in a row"])
def test_a_bad_loss_is_a_bad_step_whatever_its_gradients_are(tmp_path, way, kind, place):
    bad = {0} if place == "first" else {4, 5}
    if way == "accumulated":
        bad = {min(bad) // 2 * 2, min(bad) // 2 * 2 + 1}  # a whole window, so that the clean run has none of it
    ours, guard = fitted(tmp_path, kind, bad, set(), way)
    clean, _ = fitted(tmp_path, kind, set(), bad, way)
    assert guard.skipped_steps == (1 if way == "accumulated" else len(bad))
    assert guard.overflowed_steps == 0
    assert differences(ours, clean) == []


def test_one_bad_loss_spoils_its_window(tmp_path):
    ours, guard = fitted(tmp_path, "labels ignored", {4}, set(), "accumulated")
    clean, _ = fitted(tmp_path, "labels ignored", set(), {4, 5}, "accumulated")
    assert guard.skipped_steps == 1
    assert differences(ours, clean) == []


@pytest.mark.parametrize("policy", ["raise", "zero", "ignore"])
def test_other_policies_and_a_bad_loss_with_finite_gradients(trainer, policy):
    module, guard = Labelled("labels ignored", {4}), NonFiniteGuard(policy)
    if policy == "raise":
        with pytest.raises(NonFiniteGradientError, match="Stage: the loss is non-finite"):
            trainer(guard).fit(module, loader())
    else:
        trainer(guard).fit(module, loader())
        assert guard.zeroed_steps == (policy == "zero")
        assert guard.skipped_steps == 0


def test_a_monitor_alone_judges_no_loss(trainer):
    monitor = GradientNormMonitor()
    fit = trainer(monitor)
    fit.fit(Labelled("labels ignored", {4}), loader())
    assert fit.callback_metrics["grad/total_norm"] > 0


# The loss scale


class Backwards(Regression):
    """Finite losses whose gradients are NaN for some batches, whatever the scale is."""

    bad: frozenset[int] = frozenset()

    def loss(self, batch, batch_idx):
        loss = super().loss(batch, batch_idx)
        if batch_idx in self.bad:
            return loss + torch.sqrt(self.net[0].weight.sum() * 0)
        return loss


@pytest.mark.parametrize(
    ("options", "deferred"),
    [({}, False), ({"fused": True}, False), ({"fused": True}, True)],
    ids=["plain", "fused", "on the device"],
)
def test_nan_losses_leave_the_scale_and_its_counter(tmp_path, options, deferred):
    results = []
    for bad in ({3, 6, 7}, set()):
        torch.manual_seed(0)
        module = Poisoned(dict.fromkeys(bad, math.nan), optimizer=torch.optim.AdamW, lr=0.01, **options)
        guard = NonFiniteGuard(deferred=deferred)
        fit = make_trainer(tmp_path, guard, **scaled(init_scale=64.0, growth_interval=4))
        batches = [batch for number, batch in enumerate(data(20)) if bad or number not in {3, 6, 7}]
        fit.fit(module, DataLoader(batches, batch_size=None))
        results.append((scaler_of(fit).state_dict(), *weights(module)))
        assert (guard.skipped_steps, guard.overflowed_steps) == (len(bad), 0)
    (ours, *our_weights), (clean, *their_weights) = results
    assert ours == clean, "the scale has grown after every fourth good step"
    assert ours["scale"] > 64.0
    assert_same_bits(our_weights, their_weights)


@pytest.mark.parametrize("deferred", [False, True])
def test_at_a_scale_of_one_a_nan_gradient_is_no_overflow(tmp_path, deferred):
    torch.manual_seed(0)
    module = Backwards(optimizer=torch.optim.AdamW, lr=0.01, fused=True)
    module.bad = frozenset({2, 3, 4, 5})
    guard = NonFiniteGuard(deferred=deferred)
    fit = make_trainer(tmp_path, guard, **scaled(init_scale=4.0))
    fit.fit(module, data(8))
    assert (guard.overflowed_steps, guard.skipped_steps) == (2, 2), "at 4 and 2 a lower scale might have cured it"
    assert scaler_of(fit).get_scale() == 1.0


def test_a_spike_is_no_good_step_of_the_scaler(tmp_path):
    module = Poisoned({3: 1e4})
    guard = NonFiniteGuard(skip_above=1e3)
    fit = make_trainer(tmp_path, guard, **scaled(init_scale=1.0, growth_interval=100))
    with pytest.warns(RuntimeWarning, match="Spike"):
        fit.fit(module, data(8, size=0.1))
    assert guard.skipped_steps == 1
    assert scaler_of(fit).state_dict()["_growth_tracker"] == 7


# Several optimizers


class Tasks(LightningModule):
    """A shared encoder, and a head for each of two optimizers; the loss of one of them is bad in some batches."""

    def __init__(self, bad: dict[int, int], order: tuple[int, int] = (0, 1), *, apart: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.encoder = nn.Linear(4, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))
        self.bad, self.order, self.apart = bad, order, apart
        self.bad_gradients: set[int] = set()

    def on_after_backward(self) -> None:
        if self.trainer.fit_loop.batch_idx in self.bad_gradients:
            self.encoder.weight.grad[0, 0] = math.nan

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        code = self.encoder(batch[0]).tanh()
        losses = [nn.functional.mse_loss(head(code), batch[1]) for head in self.heads]
        if batch_idx in self.bad:
            losses[self.bad[batch_idx]] = losses[self.bad[batch_idx]] * math.nan
        if self.apart:
            for loss in losses:
                self.manual_backward(loss, retain_graph=True)
        else:
            self.manual_backward(sum(losses))
        for index in self.order:
            optimizers[index].step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW([*self.encoder.parameters(), *head.parameters()], lr=0.05) for head in self.heads]


@pytest.mark.parametrize("apart", [False, True], ids=["one pass", "two passes"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
@pytest.mark.parametrize("whose", [0, 1])
def test_a_bad_gradient_of_a_shared_parameter_skips_both(trainer, whose, order, apart):
    batches = list(data(8))
    guard, module = NonFiniteGuard(), Tasks({3: whose}, order, apart=apart)
    trainer(guard).fit(module, DataLoader(batches, batch_size=None))
    clean = Tasks({}, order, apart=apart)
    trainer(NonFiniteGuard()).fit(clean, DataLoader(batches[:3] + batches[4:], batch_size=None))
    assert guard.skipped_steps == 2
    assert_same_bits(weights(module), weights(clean))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_where_losses_are_finite_the_first_to_skip_tells_the_other(trainer, order):
    """Its skip takes the bad gradient away, and the other one would see good ones only."""
    batches = list(data(8))
    guard, module = NonFiniteGuard(), Tasks({}, order)
    module.bad_gradients = {3}
    with pytest.warns(RuntimeWarning, match="Parameters are shared with another optimizer"):
        trainer(guard).fit(module, DataLoader(batches, batch_size=None))
    clean = Tasks({}, order)
    trainer(NonFiniteGuard()).fit(clean, DataLoader(batches[:3] + batches[4:], batch_size=None))
    assert guard.skipped_steps == 2
    assert_same_bits(weights(module), weights(clean))


def test_the_next_pass_of_a_spoilt_window_is_a_good_one(trainer):
    """Each optimizer with a forward pass of its own: what they share is no reason to skip the other one."""

    class Alone(Tasks):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            for index, optimizer in enumerate(self.optimizers()):
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(self.heads[index](self.encoder(batch[0]).tanh()), batch[1])
                self.manual_backward(loss * math.nan if self.bad.get(batch_idx) == index else loss)
                optimizer.step()

    guard = NonFiniteGuard()
    trainer(guard).fit(Alone({3: 0, 5: 1}), data(8))
    assert guard.skipped_steps == 2


# No step


@pytest.mark.filterwarnings("ignore:.*returned `None`.*")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_none_is_no_step(trainer, accumulate):
    """A batch without a step counts in no metric or streak: the metrics are those of a run that never drew these batches."""
    batches, metrics = list(data(12)), []
    for none in (True, False):
        torch.manual_seed(0)
        number = {4, 5, 8, 9}
        module = Poisoned(dict.fromkeys(number, None) if none else {}, optimizer=torch.optim.AdamW)
        kept = batches if none else [batch for place, batch in enumerate(batches) if place not in number]
        monitor = GradientNormMonitor()
        fit = trainer(NonFiniteGuard(), GradientClipping(3.0), monitor, accumulate_grad_batches=accumulate)
        fit.fit(module, DataLoader(kept, batch_size=None))
        metrics.append(
            {key: value for key, value in fit.callback_metrics.items() if key.startswith("grad") and "fraction" not in key}
        )
    assert metrics[0] == metrics[1]


@pytest.mark.filterwarnings("ignore:.*returned `None`.*")
def test_none_between_bad_steps_does_not_end_their_row(trainer):
    module = Poisoned({2: math.nan, 3: None, 4: math.nan, 5: None, 6: math.nan})
    with pytest.raises(NonFiniteGradientError, match="bad step 3 in a row"):
        trainer(NonFiniteGuard(max_consecutive=3)).fit(module, data(12))


# Streaks


class Sequences(LightningModule):
    """Truncated backpropagation by hand: many steps in each batch."""

    def __init__(self, bad: set[int], steps: int = 4) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net, self.bad, self.steps = nn.Linear(4, 1), bad, steps

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for _ in range(self.steps):
            self.optimizers().zero_grad()
            loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
            self.manual_backward(loss * math.nan if batch_idx in self.bad else loss)
            self.optimizers().step()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def test_many_bad_steps_in_one_batch_are_one_bad_batch(trainer):
    guard = NonFiniteGuard(max_consecutive=3)
    trainer(guard).fit(Sequences({2, 3, 5, 6}), data(8))
    assert guard.skipped_steps == 16


def test_bad_batches_in_a_row_stop_the_run_and_the_message_counts_both(trainer):
    with pytest.raises(NonFiniteGradientError, match=r"bad step 9 in a row, in bad batch 3 in a row \(max_consecutive=3\)"):
        trainer(NonFiniteGuard(max_consecutive=3)).fit(Sequences({2, 3, 4}), data(8))


def test_a_streak_of_batches_survives_a_resume(trainer, tmp_path):
    fit = trainer(NonFiniteGuard(max_consecutive=3), max_epochs=1)
    fit.fit(Sequences({6, 7}), data(8))
    fit.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.raises(NonFiniteGradientError, match="bad step 9 in a row, in bad batch 3 in a row"):
        trainer(NonFiniteGuard(max_consecutive=3), max_epochs=2).fit(
            Sequences({0}), data(8), ckpt_path=tmp_path / "end.ckpt", **TRUSTING
        )
