"""Weighted windows: the gradient of many micro-batches is that of the one large batch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from clip_callbacks import AccumulationRescaling, BatchSize, GradientClipping, LabelTokens, NonFiniteGradientError, NonFiniteGuard
from clip_callbacks.weights import checked
from tests.conftest import TRUSTING, assert_same_bits, make_trainer, weights

CLASSES, LENGTH = 5, 12


def sentences(lengths, seed=0):
    """Micro-batches with so many labels each, of two sequences; the rest is ignored."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for count in lengths:
        labels = torch.full((2 * LENGTH,), -100)
        labels[torch.randperm(2 * LENGTH, generator=generator)[:count]] = torch.randint(CLASSES, (count,), generator=generator)
        inputs = torch.randn(2, LENGTH, 3, generator=generator, dtype=torch.float64)
        batches.append({"inputs": inputs, "labels": labels.view(2, LENGTH)})
    return batches


class Tagger(LightningModule):
    """A classifier of tokens in double precision; keeps the gradient of every step. Nothing in it knows of weights."""

    def __init__(self, make_optimizer=torch.optim.SGD, lr=0.0, folder=None, **options):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.net = nn.Linear(3, CLASSES).double()
        with torch.no_grad():
            self.net.weight.copy_(torch.randn(CLASSES, 3, generator=generator))
            self.net.bias.zero_()
        self.make_optimizer, self.options, self.folder = make_optimizer, {"lr": lr} | options, folder
        self.gradients = []

    def loss(self, batch):
        return cross_entropy(self.net(batch["inputs"]).flatten(0, 1), batch["labels"].flatten())

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def on_before_optimizer_step(self, optimizer):  # after every callback's
        self.gradients.append(self.net.weight.grad.clone() if self.net.weight.grad is not None else None)

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters(), **self.options)

    def on_train_end(self):
        if self.folder:
            torch.save(self.gradients, f"{self.folder}/{self.global_rank}.pt")


def loader(batches):
    return DataLoader(batches, batch_size=None)


def large_batch(batches):
    """The gradient of all of them as one batch."""
    module = Tagger()
    module.loss({key: torch.cat([batch[key] for batch in batches]) for key in ("inputs", "labels")}).backward()
    return module.net.weight.grad


def fit(trainer, batches, n, *callbacks, module=None, **options):
    module = module or Tagger()
    trainer(*callbacks, accumulate_grad_batches=n, **options).fit(module, loader(batches))
    return module.gradients


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


def windows(batches, n):
    return [batches[start : start + n] for start in range(0, len(batches), n)]


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


class OwnMean(Tagger):
    """A mean by hand, over no label NaN, in backward too."""

    def loss(self, batch):
        labels = batch["labels"].flatten()
        kept = labels != -100
        each = cross_entropy(self.net(batch["inputs"]).flatten(0, 1), labels.clamp(min=0), reduction="none")
        return (each * kept).sum() / kept.sum()


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
            assert bool(guard.last_report.finite)
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


class Dealt(OwnMean):
    """Each rank takes every other batch."""

    def __init__(self, batches, folder):
        super().__init__(folder=folder)
        self.batches = batches

    def train_dataloader(self):
        return loader(self.batches[self.global_rank :: 2])


def dealt_lengths():
    """Windows of two times three micro-batches: one with 1, 7, 20 and 4 labels, one with none on rank 1, a short last one."""
    generator = torch.Generator().manual_seed(5)
    lengths = (torch.randint(25, (182,), generator=generator) * (torch.rand(182, generator=generator) > 0.2)).tolist()
    lengths[:12] = [1, 7, 20, 4, 0, 2, 5, 0, 9, 0, 3, 0]
    return lengths


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore")
def test_the_large_batch_of_two_ranks(tmp_path: Path):
    batches = sentences(dealt_lengths())
    strategy = DDPStrategy(process_group_backend="gloo", start_method="spawn")
    family = [AccumulationRescaling(LabelTokens()), NonFiniteGuard()]
    options = {"accumulate_grad_batches": 3, "use_distributed_sampler": False}
    make_trainer(tmp_path, *family, devices=2, strategy=strategy, **options).fit(Dealt(batches, str(tmp_path)))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_same_bits(first, second)
    torch.testing.assert_close(first, [large_batch(window) for window in windows(batches, 6)])


# Weights themselves


class Pair(NamedTuple):
    inputs: torch.Tensor
    labels: torch.Tensor


LABELS = torch.tensor([[4, 2, -100], [1, -100, -100]])


@pytest.mark.parametrize(
    ("key", "batch"),
    [
        ("labels", {"labels": LABELS}),
        (1, (torch.zeros(2), LABELS)),
        (-1, [torch.zeros(2), LABELS]),
        ("1", (torch.zeros(2), LABELS)),
        ("labels", Pair(torch.zeros(2), LABELS)),
        ("labels", SimpleNamespace(labels=LABELS)),
        ("target.labels", {"target": {"labels": LABELS}}),
        ("1.labels", (torch.zeros(2), {"labels": LABELS})),
        ("0", {0: LABELS}),
    ],
)
def test_labels_are_found(key, batch):
    assert LabelTokens(key)(batch) == 3
    assert LabelTokens(key, ignore_index=4)(batch) == 5
    assert LabelTokens(key, shifted=True)(batch) == 1


@pytest.mark.parametrize(
    ("key", "batch", "message"),
    [
        (
            "label",
            {"labels": LABELS, "inputs": LABELS},
            r"got 'label': there is no 'label' in a dict with keys \['inputs', 'labels'\]",
        ),
        (2, (LABELS, LABELS), "got 2: there is no '2' in a tuple of 2"),
        ("labels", LABELS, "there is no 'labels' in a Tensor"),
        ("labels", {"labels": [1, 2]}, "must lead to a tensor of labels, got 'labels', where the batch has a list of 2"),
    ],
)
def test_labels_that_are_not_there(key, batch, message):
    with pytest.raises(ValueError, match=message):
        LabelTokens(key)(batch)


@pytest.mark.parametrize(
    ("batch", "size"),
    [(torch.zeros(3, 2), 3), ((torch.zeros(4), {"x": torch.zeros(4, 1), "name": "a"}), 4), ([torch.zeros(2), torch.zeros(())], 2)],
)
def test_batch_size(batch, size):
    assert BatchSize()(batch) == size


@pytest.mark.parametrize("batch", [(torch.zeros(2), torch.zeros(3)), {"x": "text"}, 3])
def test_no_batch_size(batch):
    with pytest.raises(ValueError, match="the batch must hold tensors of one length, got"):
        BatchSize()(batch)


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, None, "3", True, torch.zeros(2), torch.tensor(-1.0)])
def test_bad_weights_name_the_callable_and_the_batch(trainer, value):
    def tokens(batch):
        return value if batch["labels"].sum() else 1

    with pytest.raises(ValueError, match=r"`weight` must return a finite number of at least 0, got .* from .*tokens for batch 0"):
        fit(trainer, sentences([3]), 1, AccumulationRescaling(tokens))


def test_good_weights():
    assert [checked(value, len, 0) for value in (0, 2, 0.5, torch.tensor(3), torch.tensor([4.0]))] == [0.0, 2.0, 0.5, 3.0, 4.0]


def test_a_weight_that_cannot_be_called():
    with pytest.raises(TypeError, match="`weight` must be a function from a batch to a number, or None, got 3"):
        AccumulationRescaling(3)


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
