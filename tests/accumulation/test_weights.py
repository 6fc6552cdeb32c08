"""Weighted windows: the gradient of many micro-batches is that of the one large batch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision

from clip_callbacks import AccumulationRescaling, BatchSize, GradientClipping, LabelTokens, NonFiniteGradientError, NonFiniteGuard
from tests.helpers.records import record_of
from tests.helpers.tagging import CLASSES, OwnMean, Tagger, fit, large_batch, loader, sentences, windows
from tests.helpers.training import TRUSTING, assert_same_bits, make_trainer, weights


def test_lightning_alone_weighs_few_labels_as_many(trainer):
    batches = sentences([1, 12])
    (gradient,) = fit(trainer, batches, 2)
    assert (gradient - large_batch(batches)).abs().max() > 0.01


@pytest.mark.parametrize("weight", [LabelTokens("labels"), lambda batch: (batch["labels"] != -100).sum().item()])
@pytest.mark.parametrize(("lengths", "n"), [([1, 12], 2), ([3, 7, 1, 12, 5], 3), ([4], 1), ([2, 0, 9], 3), ([0, 5], 2)])
def test_the_gradient_is_that_of_the_one_large_batch(trainer, weight, lengths, n):
    batches = sentences(lengths)
    gradients = fit(trainer, batches, n, AccumulationRescaling(weight))
    expected = [large_batch(batches[start : start + n]) for start in range(0, len(batches), n)]
    torch.testing.assert_close(gradients, expected)


def total_norm(batches):
    module = Tagger()
    module.loss({key: torch.cat([batch[key] for batch in batches]) for key in ("inputs", "labels")}).backward()
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters()]).norm()


def test_norm_and_scale_are_those_of_the_mean(trainer):
    batches = sentences([3, 9])
    clipping = GradientClipping(None)
    run = trainer(AccumulationRescaling(LabelTokens()), clipping, accumulate_grad_batches=2)
    run.fit(Tagger(), loader(batches))
    torch.testing.assert_close(clipping.last_report.total_norm, total_norm(batches))
    assert run.callback_metrics["grad/accumulation_scale"] == pytest.approx(2 / 12 * 2), "in units of the power of two below 3"


class Norms(Callback):
    """Keeps the total_norm of every window."""

    def __init__(self, clipping):
        self.clipping, self.norms = clipping, []

    def on_before_optimizer_step(self, *_):
        self.norms.append(self.clipping.last_report.total_norm)


@given(lengths=st.lists(st.integers(0, 24), min_size=1, max_size=10), n=st.integers(1, 5), seed=st.integers(0, 99))
@example(lengths=[1, 7, 20, 4], n=4, seed=0)
@example(lengths=[1, 7, 20, 4, 0], n=3, seed=1)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.filterwarnings("ignore")
def test_any_split_gives_the_gradient_and_norm_of_the_large_batch(tmp_path, lengths, n, seed):
    batches = sentences(lengths, seed)
    clipping = GradientClipping(None, nonfinite="ignore")
    norms, module = Norms(clipping), OwnMean()
    run = make_trainer(tmp_path, AccumulationRescaling(LabelTokens()), clipping, norms, accumulate_grad_batches=n)
    run.fit(module, loader(batches))
    assert len(module.gradients) == len(windows(batches, n))
    for window, gradient, norm in zip(windows(batches, n), module.gradients, norms.norms, strict=True):
        if any((batch["labels"] != -100).any() for batch in window):
            torch.testing.assert_close(gradient, large_batch(window))
            torch.testing.assert_close(norm, total_norm(window))
        else:
            assert gradient is None


def test_without_the_callback_or_without_weights_it_is_another_gradient(trainer):
    """What the property says does not hold by itself."""
    batches = sentences([1, 7, 20, 4])
    for family in ([], [AccumulationRescaling()]):
        (gradient,) = fit(trainer, batches, 4, *family)
        with pytest.raises(AssertionError, match="not close"):
            torch.testing.assert_close(gradient, large_batch(batches))


def test_validation_inside_a_window(trainer):
    class Validated(Tagger):
        def validation_step(self, batch, batch_idx):
            assert not torch.is_grad_enabled()

    batches, module = sentences([3, 8, 5, 1, 9]), Validated()
    run = trainer(AccumulationRescaling(LabelTokens()), accumulate_grad_batches=3, val_check_interval=2)
    run.fit(module, loader(batches), loader(batches[:2]))
    torch.testing.assert_close(module.gradients, [large_batch(window) for window in windows(batches, 3)])


@pytest.mark.parametrize("level", ["window", "microbatch"])
def test_a_micro_batch_without_labels_contributes_nothing(trainer, level):
    batches = sentences([4, 0, 6])
    guard = NonFiniteGuard(level=level)
    (gradient,) = fit(trainer, batches, 3, AccumulationRescaling(LabelTokens()), guard, module=OwnMean())
    torch.testing.assert_close(gradient, large_batch([batches[0], batches[2]]))
    assert (guard.skipped_steps, guard.dropped_micro_batches) == (0, 0)


@pytest.mark.parametrize("model", [Tagger, OwnMean])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("scaler", [False, True])
def test_a_window_without_labels_is_skipped_and_counted(trainer, model, fused, scaler):
    plugins = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))]} if scaler else {}
    results = []
    for lengths in ([4, 5, 0, 0, 6, 2], [4, 5, 6, 2]):
        batches = sentences([12] * 6)
        for batch, count in zip(batches, [4, 5, 0, 0, 6, 2], strict=True):
            batch["labels"].view(-1)[count:] = -100
        kept = [batch for batch in batches if len(lengths) == 6 or (batch["labels"] != -100).any()]
        guard = NonFiniteGuard()
        module = model(torch.optim.AdamW, lr=0.1, fused=fused).float()
        run = trainer(AccumulationRescaling(LabelTokens()), guard, accumulate_grad_batches=2, **plugins)
        for batch in kept:
            batch["inputs"] = batch["inputs"].float()
        if len(lengths) == 6:
            with pytest.warns(RuntimeWarning, match="has weight 0 at step 1, .*the step is skipped"):
                run.fit(module, loader(kept))
            assert guard.skipped_steps == 1
            assert bool(record_of(guard.last_report).finite)
            assert not scaler or run.precision_plugin.scaler.get_scale() == 8.0
        else:
            run.fit(module, loader(kept))
        results.append(weights(module))
    assert_same_bits(*results)


def test_without_a_guard_an_empty_window_is_skipped_too(trainer):
    with pytest.warns(UserWarning, match="has weight 0 at step 0"):
        assert fit(trainer, sentences([0, 0]), 2, AccumulationRescaling(LabelTokens()), module=OwnMean()) == [None]


def test_ten_empty_windows_in_a_row_stop_the_run(trainer):
    family = [AccumulationRescaling(LabelTokens()), NonFiniteGuard(max_consecutive=3)]
    with pytest.raises(NonFiniteGradientError, match="weight 0 .*bad step 3 in a row"), pytest.warns(RuntimeWarning):
        fit(trainer, sentences([4, 0, 0, 0, 0]), 1, *family)


def test_a_dropped_micro_batch_takes_its_weight_with_it(trainer):
    batches = sentences([4, 7, 6])
    batches[1]["inputs"][0, 0, 0] = math.nan
    family = [NonFiniteGuard(level="microbatch"), AccumulationRescaling(LabelTokens())]
    for order in (family, family[::-1]):
        with pytest.warns(RuntimeWarning, match="the micro-batch is dropped"):
            (gradient,) = fit(trainer, batches, 3, *order)
        torch.testing.assert_close(gradient, large_batch([batches[0], batches[2]]))


def test_batch_size_weighs_the_last_smaller_batch(trainer):
    class Regression(Tagger):
        def loss(self, batch):
            return (self.net(batch[0]) - batch[1]).square().mean()

    inputs, targets = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, CLASSES, dtype=torch.float64)
    batches = [(inputs[:4], targets[:4]), (inputs[4:6], targets[4:6]), (inputs[6:], targets[6:])]
    module = Regression()
    (gradient,) = fit(trainer, batches, 3, AccumulationRescaling(BatchSize()), module=module)
    whole = Regression()
    whole.loss((inputs, targets)).backward()
    torch.testing.assert_close(gradient, whole.net.weight.grad)


@pytest.mark.parametrize("n_at_batch_one", [2, 4])
def test_with_n_changed_inside_a_window(trainer, n_at_batch_one):
    class Changing(Tagger):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 1:
                self.trainer.accumulate_grad_batches = n_at_batch_one

    batches = sentences([3, 8, 5, 1])
    gradients = fit(trainer, batches, 4 if n_at_batch_one == 2 else 3, AccumulationRescaling(LabelTokens()), module=Changing())
    groups = [batches[:2], batches[2:]] if n_at_batch_one == 2 else [batches]
    torch.testing.assert_close(gradients, [large_batch(group) for group in groups])


class Manual(Tagger):
    def __init__(self, divides=True):
        super().__init__()
        self.automatic_optimization = False
        self.divides = divides

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        if batch_idx % 2 == 0:
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        if batch_idx % 2 == 1 or batch_idx == self.trainer.num_training_batches - 1:
            optimizer.step()


def test_manual_optimization(trainer):
    batches = sentences([3, 8, 5])
    module = Manual()
    trainer(AccumulationRescaling(LabelTokens(), divide=True)).fit(module, loader(batches))
    torch.testing.assert_close(module.gradients, [large_batch(batches[:2]), large_batch(batches[2:])])


def test_a_weight_that_nothing_divides_by_is_refused(trainer):
    with pytest.raises(ValueError, match=r"`divide` must be True beside a `weight` in manual optimization.*Set divide=True"):
        trainer(AccumulationRescaling(LabelTokens())).fit(Manual(), loader(sentences([3])))


@pytest.mark.parametrize("deferred", [False, True])
def test_16_mixed_fused(trainer, deferred):
    plugins = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))]}
    batches = sentences([3, 8, 5])
    for batch in batches:
        batch["inputs"] = batch["inputs"].float()
    results = []
    for options in ({"fused": True}, {"foreach": True}):
        module = Tagger(torch.optim.AdamW, lr=0.1, **options).float()
        family = [AccumulationRescaling(LabelTokens()), NonFiniteGuard(deferred=deferred and "fused" in options)]
        trainer(*family, accumulate_grad_batches=2, **plugins).fit(module, loader(batches))
        results.append(weights(module))
    torch.testing.assert_close(*results)


def test_resume_inside_a_window_is_the_mean_of_what_it_has(trainer, tmp_path):
    class Saving(Tagger):
        def on_train_batch_end(self, *_):
            if self.trainer.fit_loop.batch_idx == 1 and not (tmp_path / "inside.ckpt").exists():
                self.trainer.save_checkpoint(tmp_path / "inside.ckpt")

    batches = sentences([3, 8, 5, 2])
    fit(trainer, batches, 4, AccumulationRescaling(LabelTokens()), module=Saving())
    resumed = Saving()
    run = trainer(AccumulationRescaling(LabelTokens()), accumulate_grad_batches=4)
    run.fit(resumed, loader(batches), ckpt_path=tmp_path / "inside.ckpt", **TRUSTING)
    # Lightning's loader begins anew: the two batches left of the window are the first two
    torch.testing.assert_close(resumed.gradients[0], large_batch(batches[:2]))
