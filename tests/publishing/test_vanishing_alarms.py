"""Blocks that learn, or that the loss does not use by design: none of them is named."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from clip_callbacks import NonFiniteGuard
from tests.helpers.training import Poisoned, Regression, TwoNetworks
from tests.helpers.vanishing import STEPS, dead_relu, fit, vanished

pytestmark = pytest.mark.usefixtures("short_spans")


def frozen():
    module = Regression(lr=1e-3)
    module.net[0].requires_grad_(False)
    return module, {}


class UnusedHead(Regression):
    def __init__(self):
        super().__init__(lr=1e-3)
        self.head = nn.Linear(4, 3)


def unused_head():
    return UnusedHead(), {}


class TwoPhases(UnusedHead):
    """The head trains in the first steps only, and keeps a gradient of zeros then."""

    def loss(self, batch, batch_idx):
        loss = super().loss(batch, batch_idx)
        return loss + self.head(batch[0]).square().mean() if self.trainer.current_epoch == 0 else loss

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=False)


def two_phases():
    return TwoPhases(), {"max_epochs": 3}


class Frozen(UnusedHead):
    """The head is frozen after the first epoch, and keeps a gradient of zeros then."""

    optimizer_zero_grad = TwoPhases.optimizer_zero_grad

    def loss(self, batch, batch_idx):
        return super().loss(batch, batch_idx) + self.head(batch[0]).square().mean()

    def on_train_epoch_start(self):
        self.head.requires_grad_(self.current_epoch == 0)


def frozen_later():
    return Frozen(), {"max_epochs": 3}


class FrozenSoon(UnusedHead):
    """The head is frozen after two steps, which do not change its weights."""

    def __init__(self):
        super().__init__()
        self.make, self.lr = torch.optim.SGD, 1e-2

    def on_train_batch_start(self, batch, batch_idx):
        self.head.requires_grad_(batch_idx < 2)

    def loss(self, batch, batch_idx):
        return super().loss(batch, batch_idx) + 1e-12 * self.head(batch[0]).square().mean()


def frozen_soon():
    return FrozenSoon(), {"log_every_n_steps": 1}


class ZeroAndFrozenSoon(FrozenSoon):
    """The gradient of the head is exactly 0 until it is frozen, after six steps."""

    def on_train_batch_start(self, batch, batch_idx):
        self.head.requires_grad_(batch_idx < 6)

    def loss(self, batch, batch_idx):
        return Regression.loss(self, batch, batch_idx) + 0.0 * self.head(batch[0]).square().mean()

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=False)


def zero_and_frozen_soon():
    return ZeroAndFrozenSoon(), {"log_every_n_steps": 1}


class RateInSteps(Regression):
    """A learning rate that is too small to change a weight, and 0 outside of some steps."""

    def __init__(self, steps, as_tensor=False):
        super().__init__()
        self.steps, self.as_tensor = steps, as_tensor

    def configure_optimizers(self):
        rate = torch.tensor(1e-15) if self.as_tensor else 1e-15
        optimizer = torch.optim.Adam(self.parameters(), lr=rate, fused=self.as_tensor)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step in self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def soon_without_rate():
    return RateInSteps(range(2)), {"log_every_n_steps": 1}


def soon_without_rate_as_a_tensor():
    return RateInSteps(range(2), as_tensor=True), {"log_every_n_steps": 1}


def late_with_a_rate():
    """Between the check at which it is still 0 and the next one, nobody knows when it began."""
    return RateInSteps(range(12, STEPS)), {}


class Tokens(Regression):
    """An embedding of 50 rows, of which each batch has at most four, and none the last ones."""

    def __init__(self, *, sparse=False):
        super().__init__(net=nn.Linear(8, 1), lr=1e-3)
        self.embedding = nn.Embedding(50, 8, sparse=sparse)

    def loss(self, batch, batch_idx):
        tokens = (batch[0][:, 0].abs() * 17).long().clamp(max=45)
        return super().loss([self.embedding(tokens), batch[1]], batch_idx)


def embedding():
    return Tokens(), {}


def sparse_embedding():
    return Tokens(sparse=True), {}


class Experts(Regression):
    """The second expert gets tokens in one step only."""

    def __init__(self):
        super().__init__(lr=1e-3, net=nn.Linear(4, 1))
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def loss(self, batch, batch_idx):
        inputs, targets = batch
        chosen = torch.full((len(inputs),), batch_idx == 7)
        found = torch.zeros_like(inputs)
        for number, expert in enumerate(self.experts):
            found = found.index_add(0, (chosen == bool(number)).nonzero()[:, 0], expert(inputs[chosen == bool(number)]))
        return super().loss([found, targets], batch_idx)


def experts():
    return Experts(), {}


class Adapted(Regression):
    def __init__(self):
        super().__init__(net=nn.Linear(4, 1), lr=1e-3)
        self.net.requires_grad_(False)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def loss(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]) + self.up(self.down(batch[0])), batch[1])


def low_rank_adapter():
    return Adapted(), {}


class Residual(Regression):
    def __init__(self):
        super().__init__(lr=1e-3)
        self.branch, self.scale = nn.Linear(4, 4), nn.Parameter(torch.zeros(()))

    def loss(self, batch, batch_idx):
        return super().loss([batch[0] + self.scale * self.branch(batch[0]), batch[1]], batch_idx)


def branch_of_zero():
    return Residual(), {}


class Gan(TwoNetworks):
    """The generator steps in one batch of five."""

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        if batch_idx % 5 == 0:
            self.toggle_optimizer(first)
            first.zero_grad()
            self.manual_backward(self.discriminator(self.generator(batch[0])).square().mean())
            first.step()
            self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        second.zero_grad()
        self.manual_backward((self.discriminator(batch[0]) - 1).square().mean())
        second.step()
        self.untoggle_optimizer(second)


def gan():
    return Gan(), {"batches": 5 * STEPS}


def learning_rate_of_zero():
    return Regression(lr=0.0), {}


def learning_rate_tensor_of_zero():
    return Regression(torch.optim.Adam, lr=torch.tensor(0.0), fused=True), {"precision": "bf16-true"}


def short_epoch():
    return dead_relu()[0], {"batches": STEPS - 1}


class MasterWeights(torch.optim.SGD):
    """Keeps weights in float32, to which updates too small for bfloat16 are added."""

    def step(self, closure=None):
        loss = closure()
        for parameter in self.param_groups[0]["params"]:
            master = self.state[parameter].setdefault("master", parameter.detach().float())
            master -= self.param_groups[0]["lr"] * parameter.grad
            parameter.data.copy_(master)
        return loss


def master_weights():
    return Regression(MasterWeights, lr=1e-8), {"precision": "bf16-true"}


def small_but_rounded_up():
    return Regression(torch.optim.AdamW, lr=1e-2), {"precision": "bf16-true"}


LEARNS = [
    frozen,
    frozen_later,
    frozen_soon,
    zero_and_frozen_soon,
    soon_without_rate,
    soon_without_rate_as_a_tensor,
    late_with_a_rate,
    unused_head,
    two_phases,
    embedding,
    sparse_embedding,
    experts,
    low_rank_adapter,
    branch_of_zero,
    gan,
    learning_rate_of_zero,
    learning_rate_tensor_of_zero,
    short_epoch,
    master_weights,
    small_but_rounded_up,
]


@pytest.mark.parametrize("make", LEARNS)
def test_no_alarm(trainer, make):
    module, options = make()
    made, texts = fit(trainer, module, **options)
    assert not texts
    assert not vanished(made)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in module.parameters()), "all hooks are removed"


class UsedInBadSteps(Poisoned):
    """The head has gradients in bad steps only, two of which are checks."""

    def __init__(self):
        super().__init__({3: math.nan, 15: math.nan}, optimizer=torch.optim.AdamW, lr=1e-3, fused=True)
        self.head = nn.Linear(4, 3)

    def loss(self, batch, batch_idx):
        loss = super().loss(batch, batch_idx)
        return loss + self.head(batch[0]).square().mean() if batch_idx in self.factors else loss


@pytest.mark.filterwarnings("ignore:Non-finite gradients")
@pytest.mark.parametrize("deferred", [False, True])
def test_gradients_of_skipped_steps_do_not_count(trainer, deferred):
    made, texts = fit(trainer, UsedInBadSteps(), NonFiniteGuard(deferred=deferred), batches=STEPS + 12)
    assert not texts
    assert not vanished(made)


def test_gradients_whose_norms_underflow_are_not_exactly_zero(trainer):
    """Not either where they are not judged, since the learning rate was 0 in most steps."""
    module = RateInSteps(range(2), as_tensor=True)
    loss = module.loss
    module.loss = lambda batch, batch_idx: loss(batch, batch_idx) * 1e-30
    _, texts = fit(trainer, module, NonFiniteGuard(deferred=True, hold_schedulers=False), log_every_n_steps=1)
    assert not texts
