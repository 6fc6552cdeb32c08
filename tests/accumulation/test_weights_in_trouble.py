"""Weights beside overflows, exceptions and windows without labels."""

from __future__ import annotations

import json
import math

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision

from clip_callbacks import AccumulationRescaling, BatchSize, LabelTokens, NonFiniteGuard
from tests.helpers.records import record_of
from tests.helpers.tagging import Tagger, fit, loader, sentences
from tests.helpers.training import TRUSTING, Iterating, assert_same_bits, data, weights

# What has gone wrong once


def test_an_overflow_is_one_though_the_loss_of_a_micro_batch_without_labels_is_nan(trainer):
    batches = sentences([3, 0] * 4)
    for batch in batches:
        batch["inputs"] = batch["inputs"].float() * 100
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, backoff_factor=2.0**-10)
    guard = NonFiniteGuard(max_consecutive=1)
    run = trainer(
        AccumulationRescaling(LabelTokens()), guard, accumulate_grad_batches=2, plugins=[MixedPrecision("16-mixed", "cpu", scaler)]
    )
    run.fit(Tagger(torch.optim.AdamW, lr=0.1).float(), loader(batches))
    assert guard.overflowed_steps >= 1
    assert guard.skipped_steps == 0


def test_a_weight_is_for_one_backward_pass(trainer):
    class Twice(Tagger):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            (expected,) = torch.autograd.grad(loss, self.net.weight, retain_graph=True)
            self.zero_grad()
            self.manual_backward(loss, retain_graph=True)
            torch.testing.assert_close(self.net.weight.grad, 1.5 * expected)
            (again,) = torch.autograd.grad(loss, self.net.weight)
            assert torch.equal(again, expected)
            self.optimizers().step()

    trainer(AccumulationRescaling(lambda batch: 3.0, divide=True)).fit(Twice(), loader(sentences([3, 8])))


def test_an_exception_in_a_silent_backward_leaves_no_hook(trainer):
    class Bomb(Tagger):
        def backward(self, loss):
            raise KeyError("boom")

    module = Bomb()
    with pytest.raises(KeyError):
        trainer(AccumulationRescaling(lambda batch: 0.0)).fit(module, loader(sentences([3])))
    assert not any(parameter._backward_hooks for parameter in module.parameters())


@pytest.mark.parametrize("weight", [65536.0, 2.0**60, 2.0**-100])
def test_large_and_small_weights_change_no_bit_of_16_mixed(trainer, weight):
    batches = sentences([3, 8, 5, 2])
    for batch in batches:
        batch["inputs"] = batch["inputs"].float()
    results = []
    for factor in (weight, 1.0):
        plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]
        guard = NonFiniteGuard()
        module = Tagger(torch.optim.AdamW, lr=0.1).float()
        weigh = AccumulationRescaling(lambda batch, factor=factor: factor)
        trainer(weigh, guard, accumulate_grad_batches=2, plugins=plugins).fit(module, loader(batches))
        assert guard.overflowed_steps == guard.skipped_steps == 0
        results.append(weights(module))
    assert_same_bits(*results)


def test_an_empty_window_is_told_of_after_a_dropped_micro_batch_was(trainer, tmp_path):
    batches = sentences([4, 7, 0, 0])
    batches[1]["inputs"][0, 0, 0] = math.nan
    guard = NonFiniteGuard(level="microbatch")
    with pytest.warns(RuntimeWarning) as caught:
        fit(trainer, batches, 2, guard, AccumulationRescaling(LabelTokens()), logger=CSVLogger(tmp_path, version="x"))
    messages = [str(warning.message) for warning in caught if "weight 0" in str(warning.message)]
    assert len(messages) == 1
    assert guard.skipped_steps == guard.dropped_micro_batches == 1
    lines = (tmp_path / "lightning_logs" / "x" / "nonfinite_steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["stage"] for line in lines][-1] == "weight"
    assert json.loads(lines[-1])["step"] == 1


def test_ignore_never_stops_a_run_for_empty_windows(trainer):
    guard = NonFiniteGuard("ignore", max_consecutive=2)
    with pytest.warns(RuntimeWarning, match="weight 0"):
        fit(trainer, sentences([4, 0, 0, 0, 0, 3]), 1, guard, AccumulationRescaling(LabelTokens()))
    assert guard.skipped_steps == 4


class Oom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("out of memory")


def test_a_silent_backward_that_was_caught_silences_no_other(trainer):
    class Catching(Tagger):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.zero_grad()
            loss = self.loss(batch)
            try:
                self.manual_backward(Oom.apply(loss) if batch_idx == 1 else loss)
            except RuntimeError:
                return
            self.gradients.append(self.net.weight.grad.abs().sum())
            self.optimizers().step()

    weigh = iter([1.0, 0.0, 1.0, 1.0])
    module = Catching()
    trainer(AccumulationRescaling(lambda batch: next(weigh), divide=True)).fit(module, loader(sentences([3, 4, 5, 6])))
    assert len([gradient for gradient in module.gradients if gradient is not None and gradient.ndim == 0 and gradient > 0]) == 3


def test_a_fit_after_an_exception_begins_with_no_window(trainer, tmp_path):
    """Resumed inside a window, with the same callback: it knows nothing of the window that the exception left."""

    class Failing(Tagger):
        fails = True

        def training_step(self, batch, batch_idx):
            if batch_idx == 7 and self.fails:
                raise KeyError("the drive is gone")
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 5 and self.fails:
                self.trainer.save_checkpoint(tmp_path / "mid.ckpt")

    batches, gradients = sentences([3, 8, 5, 2, 7, 4, 6, 9, 1, 5, 2, 4]), []
    used = AccumulationRescaling(LabelTokens())
    with pytest.raises(KeyError):
        fit(trainer, batches, 4, used, module=Failing())
    for callback in (used, AccumulationRescaling(LabelTokens())):
        module = Failing()
        module.fails = False
        run = trainer(callback, accumulate_grad_batches=4)
        run.fit(module, loader(batches), ckpt_path=tmp_path / "mid.ckpt", **TRUSTING)
        gradients.append(module.gradients)
    torch.testing.assert_close(*gradients)


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
@pytest.mark.parametrize("weight", [LabelTokens("y"), BatchSize(), lambda batch: len(batch["y"])], ids=["labels", "samples", "own"])
def test_a_weight_of_batches_that_only_training_step_sees_is_refused_at_fit_start(trainer, weight):
    module = Iterating({})
    before = weights(module)
    with pytest.raises(ValueError, match=r"`weight` must be None beside Iterating.training_step\(dataloader_iter\), got weight="):
        trainer(AccumulationRescaling(weight), accumulate_grad_batches=2).fit(module, data(4))
    assert_same_bits(before, weights(module))
    assert not module.trainer.fit_loop.epoch_loop.total_batch_idx > 0, "nothing was drawn"
    rescaling = AccumulationRescaling()  # the way out
    trainer(rescaling, accumulate_grad_batches=2).fit(Iterating({}), data(3))
    assert record_of(rescaling.last_report).accumulation_scale == 2.0
