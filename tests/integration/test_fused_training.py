"""The factors that fused optimizers apply, in a Trainer."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from clip_callbacks import (
    AccumulationRescaling,
    GradientClipping,
    NonFiniteGuard,
)
from tests.helpers.fused import FUSED, network, state_of
from tests.helpers.matrix import matrix
from tests.helpers.training import Regression, assert_same_bits, data, scaled, weights

# The factors


@matrix(name=list(FUSED), deferred=[False, True], batches=[1, 3])
def test_equal_to_the_unfused_path(trainer, name, deferred, batches):
    results = []
    for fused in (True, False):
        family = [GradientClipping(0.5), AccumulationRescaling(), NonFiniteGuard(deferred=deferred and fused)]
        module = network(name, fused=fused)
        fit = trainer(*family, accumulate_grad_batches=batches, max_epochs=2, log_every_n_steps=3)
        fit.fit(module, data(10))
        metrics = {key: value for key, value in fit.callback_metrics.items() if key.startswith("grad/")}
        results.append((weights(module), state_of(fit), metrics))
    torch.testing.assert_close(results[0], results[1])
    assert results[0][2]["grad/clip_coef"] < 1.0


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("scaler", [False, True])
def test_attributes_are_taken_back_after_an_exception_in_the_trainer(trainer, deferred, scaler):
    class Bomb(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 2:
                raise KeyError("boom")

    module = network("AdamW")
    fit = trainer(GradientClipping(1e-3), NonFiniteGuard(deferred=deferred), Bomb(), **(scaled() if scaler else {}))
    with pytest.raises(KeyError):
        fit.fit(module, data())
    (optimizer,) = fit.optimizers
    assert not {"grad_scale", "found_inf"} & set(vars(optimizer))
    assert not optimizer._optimizer_step_pre_hooks


def test_a_step_without_the_callback_is_not_scaled_by_an_earlier_one(trainer):
    class Twice(Regression):
        def __init__(self):
            super().__init__(torch.optim.SGD, lr=1.0, fused=True)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.zero_grad()
            self.manual_backward(self.loss(batch, batch_idx))
            self.optimizers().step()
            before = [parameter.grad.clone() for parameter in self.parameters()]
            self.optimizers().optimizer.step()  # around Lightning: no hook is called
            assert_same_bits(before, [parameter.grad for parameter in self.parameters()])

    trainer(GradientClipping(0.1)).fit(Twice(), data(3))


def test_manual_optimization_in_bf16_true(trainer):
    class Manual(Regression):
        def __init__(self, **options):
            super().__init__(torch.optim.SGD, lr=0.1, **options)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.zero_grad()
            self.manual_backward(self.loss(batch, batch_idx))
            self.optimizers().step()

    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        module = Manual(fused=fused)
        trainer(GradientClipping(0.1), precision="bf16-true").fit(module, data(3))
        results.append(weights(module))
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)
