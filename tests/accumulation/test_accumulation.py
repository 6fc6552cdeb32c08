from __future__ import annotations

import math
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn

from clip_callbacks import AccumulationRescaling, GradientClipping
from clip_callbacks.accumulation.window import Window
from tests.helpers.accumulation import Manual, Recorder
from tests.helpers.training import TRUSTING, GradientTape, Poisoned, Regression, assert_same_bits, data, weights


def steps(trainer, feed, n, *callbacks, returns_none=(), epochs=1, **options):
    module = Recorder(torch.tensor(feed, dtype=torch.float32)[:, None], returns_none)
    trainer(*callbacks, accumulate_grad_batches=n, max_epochs=epochs, **options).fit(module)
    return [gradient and gradient[0] for gradient in module.gradients]


def test_lightning_alone_is_wrong_in_the_short_window(trainer):
    assert steps(trainer, [1.0] * 5, 3) == [1.0, 0.66667]


@pytest.mark.parametrize(
    ("feed", "n", "expected"),
    [
        ([1.0] * 5, 3, [1.0, 1.0]),
        ([1.0, 2.0, 3.0, 4.0, 6.0], 3, [2.0, 5.0]),
        ([1.0, 2.0, 3.0], 1, [1.0, 2.0, 3.0]),
        ([2.0, 4.0], 2, [3.0]),
    ],
)
def test_every_window_is_a_mean(trainer, feed, n, expected):
    assert steps(trainer, feed, n, AccumulationRescaling()) == expected


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_n_larger_than_the_epoch(trainer):
    assert steps(trainer, [1.0, 2.0, 6.0], 8, AccumulationRescaling()) == [3.0]


def test_every_epoch_begins_a_new_window(trainer):
    assert steps(trainer, [1.0, 2.0, 3.0], 2, AccumulationRescaling(), epochs=2) == [1.5, 3.0, 1.5, 3.0]


@pytest.mark.filterwarnings("ignore:No parameter has a gradient")
@pytest.mark.parametrize(
    ("returns_none", "expected"),
    [({1}, [(1 + 3) / 2, 5.0]), ({0}, [2.5, 5.0]), ({2}, [1.5, 5.0]), ({0, 1, 2}, [None, 5.0]), ({4}, [2.0, 4.0])],
)
def test_micro_batches_that_returned_none(trainer, returns_none, expected):
    assert steps(trainer, [1.0, 2.0, 3.0, 4.0, 6.0], 3, AccumulationRescaling(), returns_none=returns_none) == expected


def test_scheduled_n(trainer):
    scheduler = GradientAccumulationScheduler({0: 1, 1: 2})
    module = Recorder(torch.tensor([[1.0], [2.0], [6.0]]))
    trainer(AccumulationRescaling(), scheduler, max_epochs=2).fit(module)
    assert [gradient[0] for gradient in module.gradients] == [1.0, 2.0, 6.0, 1.5, 6.0]


def test_n_changed_inside_a_window_still_gives_a_mean(trainer):
    class Changing(Recorder):
        def on_train_batch_end(self, *_):
            if self.trainer.fit_loop.batch_idx == 1:
                self.trainer.accumulate_grad_batches = 3

    module = Changing(torch.tensor([[1.0], [2.0], [6.0], [8.0]]))
    trainer(AccumulationRescaling(), accumulate_grad_batches=4).fit(module)
    assert [gradient[0] for gradient in module.gradients] == [3.0, 8.0]


def test_the_norm_is_that_of_the_mean_and_is_clipped_after(trainer):
    clipping = GradientClipping(1.0)
    fit = trainer(clipping, AccumulationRescaling(), accumulate_grad_batches=4)
    fit.fit(GradientTape(torch.tensor([[3.0, 4.0], [3.0, 4.0]])))
    assert clipping.last_report.total_norm == 5.0
    assert fit.callback_metrics["grad/accumulation_scale"] == 2.0
    torch.testing.assert_close(fit.callback_metrics["grad/clipped_norm"], torch.tensor(1.0))


def test_full_windows_keep_their_bits(trainer):
    results = []
    for callbacks in ([], [AccumulationRescaling()]):
        torch.manual_seed(0)
        module = Regression()
        trainer(*callbacks, accumulate_grad_batches=4).fit(module, data(12))
        results.append(weights(module))
    assert_same_bits(*results)


def test_ten_batches_with_n_four_equal_a_hand_written_loop(trainer):
    def start():
        torch.manual_seed(0)
        return Regression(lr=0.01)

    ours, lightning, plain = start(), start(), start()
    trainer(AccumulationRescaling(), accumulate_grad_batches=4).fit(ours, data(10))
    trainer(accumulate_grad_batches=4).fit(lightning, data(10))
    optimizer = plain.configure_optimizers()
    batches = list(data(10))
    for window in (batches[:4], batches[4:8], batches[8:]):
        optimizer.zero_grad()
        for batch in window:
            (nn.functional.mse_loss(plain.net(batch[0]), batch[1]) / len(window)).backward()
        optimizer.step()
    for a, b in zip(weights(ours), weights(plain), strict=True):
        torch.testing.assert_close(a, b)
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(weights(lightning), weights(plain), strict=True))


def test_resume_inside_a_window_is_the_mean_of_what_it_has(trainer, tmp_path):
    class Saving(Recorder):
        def on_train_batch_end(self, *_):
            if self.trainer.fit_loop.batch_idx == 1 and not (tmp_path / "inside.ckpt").exists():
                self.trainer.save_checkpoint(tmp_path / "inside.ckpt")

    feed = torch.tensor([[1.0], [2.0], [6.0], [8.0]])
    trainer(AccumulationRescaling(), accumulate_grad_batches=4).fit(Saving(feed))
    resumed = Saving(feed)
    trainer(AccumulationRescaling(), accumulate_grad_batches=4).fit(resumed, ckpt_path=tmp_path / "inside.ckpt", **TRUSTING)
    # Lightning's loader begins anew: the two batches left of the window are the first two; their gradients are 1 and 2
    assert next(gradient[0] for gradient in resumed.gradients) == 1.5


@pytest.mark.parametrize("to_none", [True, False])
def test_manual_optimization_divides_on_request(trainer, to_none):
    feed = torch.tensor([[1.0], [3.0], [5.0], [7.0], [9.0]])
    for callback, expected in ((AccumulationRescaling(), [4.0, 12.0, 9.0]), (AccumulationRescaling(divide=True), [2.0, 6.0, 9.0])):
        module = Manual(feed, to_none=to_none)
        trainer(callback).fit(module)
        assert [gradient[0] for gradient in module.gradients] == expected


def test_manual_windows_are_counted_for_each_optimizer(trainer):
    from tests.helpers.training import TwoNetworks

    results = []
    for callbacks in ([], [AccumulationRescaling(divide=True)]):
        torch.manual_seed(0)
        module = TwoNetworks()
        trainer(*callbacks).fit(module, data())
        results.append(weights(module))
    assert_same_bits(*results)  # one backward pass since each zero_grad, though the other's passes reach it too


def test_window_arithmetic():
    window = Window()
    assert window.scale() == 1.0
    assert window.loss_weight(4) == 1.0
    window.add()
    assert window.scale() == 4.0
    assert window.loss_weight(2) == 0.5
    window.reset()
    assert window.loss_weight(2) == 1.0


def test_a_bad_micro_batch_spoils_its_window_only(trainer):
    module = Poisoned({1: math.nan})
    clipping = GradientClipping(1.0)
    with pytest.warns(RuntimeWarning, match="the loss is non-finite"):
        trainer(clipping, AccumulationRescaling(), accumulate_grad_batches=3).fit(module, data(7))
    assert clipping.skipped_steps == 1
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("before", "after", "at", "feed", "expected"),
    [
        (2, 3, 3, [1, 1, 10, 10, 100, 100], [1.0, 10.0, 100.0]),
        (2, 4, 1, [1, 1, 10, 10], [1.0, 10.0]),
    ],
)
def test_n_changed_where_a_window_ends_leaves_used_gradients_out(trainer, before, after, at, feed, expected):
    class Changing(Recorder):
        def on_train_batch_end(self, *_):
            if self.trainer.fit_loop.batch_idx == at:
                self.trainer.accumulate_grad_batches = after

    module = Changing(torch.tensor(feed, dtype=torch.float32)[:, None])
    trainer(AccumulationRescaling(), accumulate_grad_batches=before).fit(module)
    assert [gradient[0] for gradient in module.gradients] == pytest.approx(expected)


@pytest.mark.parametrize("meddling", ["clamp", "create_graph", "zeros"])
def test_manual_windows_bear_with_what_users_do_to_gradients(trainer, meddling):
    class Meddling(Manual):
        def manual_backward(self, loss, **options):
            super().manual_backward(loss, create_graph=meddling == "create_graph", **options)
            if meddling == "clamp":
                self.weight.grad.data.clamp_(-100, 100)
                self.weight.grad.clamp_(-100, 100)

        def training_step(self, batch, batch_idx):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                super().training_step(batch, batch_idx)

    module = Meddling(torch.tensor([[2.0]] * 4), window=4, to_none=meddling != "zeros")
    trainer(AccumulationRescaling(divide=True)).fit(module)
    assert module.gradients[-1][0] == 2.0


def test_iterable_data_of_unknown_length(trainer):
    from torch.utils.data import DataLoader, IterableDataset

    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(torch.tensor([x]),) for x in (1.0, 2.0, 3.0, 4.0, 6.0)])

    module = Recorder(torch.zeros(1, 1))
    trainer(AccumulationRescaling(), accumulate_grad_batches=3).fit(module, DataLoader(Stream()))
    assert [gradient[0] for gradient in module.gradients] == [2.0, 5.0]


def test_max_steps_and_limits_inside_a_window(trainer):
    feed = [1.0, 2.0, 3.0, 4.0, 6.0, 8.0]
    assert steps(trainer, feed, 4, AccumulationRescaling(), limit_train_batches=3) == [2.0]
    assert steps(trainer, feed, 4, AccumulationRescaling(), max_steps=1) == [2.5]
