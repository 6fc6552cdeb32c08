"""The gradient noise scale, against models whose noise scale is known in closed form."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from clip_callbacks import (
    AccumulationRescaling,
    GradientClipping,
    GradientNoiseScale,
    GradientNormMonitor,
    LabelTokens,
    NonFiniteGuard,
)
from clip_callbacks.stats.noise_scale import NoiseScale
from clip_callbacks.trainer.checks import check_noise_scale
from tests.helpers.training import SAFELY, GradientTape, Iterating, Poisoned, Regression, data

WIDTH = 20


def estimate(callback):
    """The estimate of a callback, as a checkpoint has it."""
    return NoiseScale(**callback.state_dict()["noise"][0])


def draws(count, *, spread, seed=0):
    """Gradients of single samples: mean (1, ..., 1), covariance spread² I, so that the noise scale is spread²."""
    return 1.0 + spread * torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("spread", [0.5, 3.0])
@pytest.mark.parametrize(("count", "samples"), [(2, 1), (4, 8), (16, 2)])
def test_the_estimator_finds_the_noise_scale(spread, count, samples):
    windows = 2500
    estimate = NoiseScale(decay=0.9995)
    small = draws(windows * count * samples, spread=spread).view(windows, count, samples, WIDTH).mean(2)
    for gradients in small:
        estimate.observe(gradients.square().sum(-1).tolist(), float(gradients.mean(0).square().sum()), samples)
    assert estimate.value == pytest.approx(spread**2, rel=0.15)
    assert estimate.windows == windows


def test_the_two_estimates_are_unbiased():
    """Over all outcomes of two draws from two values, by hand: G = 2, tr(Sigma) = 1."""
    values, signal, noise = (1.0, 3.0), 0.0, 0.0
    for a in values:
        for b in values:
            estimate = NoiseScale(decay=0.0)
            estimate.observe([a * a, b * b], ((a + b) / 2) ** 2, 1)
            signal, noise = signal + estimate.signal / 4, noise + estimate.noise / 4
    assert (signal, noise) == (4.0, 1.0)


@pytest.mark.parametrize("small", [[], [2.0]])
def test_one_micro_batch_tells_nothing(small):
    estimate = NoiseScale()
    estimate.observe(small, 2.0, 1)
    assert (estimate.value, estimate.windows) == (None, 0)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ([], {}),
        pytest.param([AccumulationRescaling()], {}, marks=pytest.mark.slow),
        ([GradientClipping(0.1), AccumulationRescaling(), GradientNormMonitor("parameter")], {}),
        pytest.param([NonFiniteGuard(level="microbatch")], {}, marks=pytest.mark.slow),
        ([GradientClipping(0.1)], {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))]}),
    ],
)
def test_in_a_trainer(trainer, family, options):
    feed = draws(960, spread=3.0).float()
    run = trainer(*family, GradientNoiseScale(), accumulate_grad_batches=8, **options)
    run.fit(GradientTape(feed))
    assert run.callback_metrics["grad/noise_scale"] == pytest.approx(9.0, rel=0.25)


def test_every_micro_batch_is_measured_and_the_gradients_keep_their_bits(trainer):
    results = []
    for monitors in ([GradientNoiseScale()], []):
        torch.manual_seed(0)
        module = Regression(torch.optim.AdamW, lr=0.01)
        trainer(*monitors, accumulate_grad_batches=3).fit(module, data())
        results.append([parameter.detach().clone() for parameter in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_samples_are_counted(trainer):
    """The same gradients of micro-batches said to hold four samples, or of no one size."""
    noise = []
    for batch in (torch.zeros(4), (torch.zeros(2), torch.zeros(3))):

        class Tape(GradientTape):
            def training_step(self, batch, batch_idx):
                return (self.weight * self.feed[batch_idx]).sum()

            def train_dataloader(self, batch=batch):
                return DataLoader([batch] * 8, batch_size=None)

        monitor = GradientNoiseScale()
        trainer(monitor, accumulate_grad_batches=4).fit(Tape(draws(8, spread=2.0).float()))
        noise.append(estimate(monitor).noise)
    assert noise[0] == pytest.approx(4 * noise[1])


def test_the_estimate_goes_on_after_a_resume(trainer, tmp_path):
    feed = draws(80, spread=3.0).float()
    whole, before, after = (GradientNoiseScale() for _ in range(3))
    trainer(whole, accumulate_grad_batches=8, max_epochs=2).fit(GradientTape(feed))
    first = trainer(before, accumulate_grad_batches=8)
    first.fit(GradientTape(feed))
    first.save_checkpoint(tmp_path / "x.ckpt")
    second = trainer(after, accumulate_grad_batches=8, max_epochs=2)
    second.fit(GradientTape(feed), ckpt_path=tmp_path / "x.ckpt", **SAFELY)
    assert estimate(whole) == estimate(after) != estimate(before)


class Restore(Callback):
    """Takes the state of a callback before one batch, and gives it back before another."""

    def __init__(self, callback, saved_before, restored_before):
        self.callback, self.saved_before, self.restored_before = callback, saved_before, restored_before

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.saved_before:
            self.state = deepcopy(self.callback.state_dict())
        if batch_idx == self.restored_before:
            self.callback.load_state_dict(self.state)


@pytest.mark.parametrize("others", [[], [GradientNormMonitor("global"), GradientNormMonitor("layer")]], ids=["alone", "others"])
def test_a_state_restored_in_the_middle_of_a_fit_goes_on(trainer, others):
    feed = draws(32, spread=3.0).float()
    whole, restored = GradientNoiseScale(), GradientNoiseScale()
    trainer(whole, accumulate_grad_batches=8).fit(GradientTape(torch.cat([feed[:8], feed[16:]])))
    run = trainer(*others, restored, Restore(restored, 8, 16), accumulate_grad_batches=8)
    run.fit(GradientTape(feed))
    assert estimate(whole) == estimate(restored)
    assert restored.skipped_steps == 0
    assert restored.last_report is not None


def test_a_search_for_the_learning_rate_leaves_it_alone(trainer):
    callback = GradientNoiseScale()
    search = {"min_lr": 1e-3, "max_lr": 10.0, "num_training": 4, "early_stop_threshold": None, "update_attr": False}
    Tuner(trainer(callback, accumulate_grad_batches=2)).lr_find(Regression(), data(8), **search)
    assert callback.last_report is None
    assert callback.state_dict()["noise"] == {}


class ManualTape(GradientTape):
    def __init__(self, feed):
        super().__init__(feed)
        self.automatic_optimization = False


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
@pytest.mark.parametrize(
    ("module", "family", "message"),
    [
        (ManualTape(draws(4, spread=1.0).float()), [], "manual optimization"),
        (Regression(torch.optim.LBFGS), [], "LBFGS"),
        (Regression(), [AccumulationRescaling(LabelTokens(1))], "a `weight`"),
        (Iterating({}), [], r"training_step\(dataloader_iter\)"),
    ],
)
def test_where_it_cannot_be_estimated_it_is_refused(trainer, module, family, message):
    with pytest.raises(ValueError, match=f"GradientNoiseScale must not be used with {message}"):
        trainer(*family, GradientNoiseScale()).fit(module, *([] if isinstance(module, GradientTape) else [data(3)]))


def test_several_ranks_are_refused():
    with pytest.raises(ValueError, match="GradientNoiseScale must not be used with 2 ranks"):
        check_noise_scale(SimpleNamespace(world_size=2), Regression(), is_weighted=False)


def test_alone_it_prints_nothing_at_the_end(trainer, said):
    trainer(GradientNoiseScale(), accumulate_grad_batches=2).fit(Regression(), data(6))
    assert said == []


@pytest.mark.parametrize("other", [GradientNormMonitor(norm_type=1), GradientClipping(norm_type=1)], ids=["monitor", "clipping"])
@pytest.mark.parametrize("place", [0, 1])
def test_it_is_one_of_2_norms(trainer, other, place):
    callbacks = [GradientNoiseScale()]
    callbacks.insert(place, other)
    with pytest.raises(ValueError, match=r"`norm_type` must be the same for all callbacks of one Trainer, got \[1.0, 2.0\]"):
        trainer(*callbacks).fit(Regression(), data(2))


def test_windows_of_micro_batches_of_unequal_size_tell_nothing(trainer):
    """Their mean is not the mean over their samples."""
    batches = [torch.randn(size, 4) for size in (4, 4, 4, 2)]

    class Net(Regression):
        def loss(self, batch, batch_idx):
            return self.net(batch).square().mean()

    monitor = GradientNoiseScale()
    trainer(monitor, accumulate_grad_batches=2).fit(Net(), DataLoader(batches, batch_size=None))
    assert estimate(monitor).windows == 1


def test_an_overflow_leaves_no_micro_batch_for_the_next_window(trainer):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-110)
    run = trainer(GradientNoiseScale(), accumulate_grad_batches=8, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    run.fit(GradientTape(100 * draws(1200, spread=3.0).float()))
    assert scaler.get_scale() < 2.0**20
    assert run.callback_metrics["grad/noise_scale"] == pytest.approx(9.0, rel=0.25)


def test_the_last_micro_batch_none_under_a_fused_scaler_ends_the_window(trainer):
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))]
    module = Poisoned({3: None}, optimizer=torch.optim.AdamW, fused=True)
    monitor = GradientNoiseScale()
    trainer(monitor, accumulate_grad_batches=2, plugins=plugins).fit(module, data(6, size=1.0))
    assert estimate(monitor).windows == 2


def test_without_accumulation_it_says_that_it_learns_nothing(trainer):
    with pytest.warns(UserWarning, match="GradientNoiseScale needs accumulation windows of several micro-batches"):
        trainer(GradientNoiseScale()).fit(Regression(), data(3))


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("family", [[NonFiniteGuard(level="microbatch")], [GradientNoiseScale()]])
def test_a_backward_that_makes_a_graph(trainer, family):
    class Graph(Regression):
        def backward(self, loss):
            loss.backward(create_graph=True)

    results = []
    for callbacks in (family, []):
        torch.manual_seed(0)
        module = Graph()
        trainer(*callbacks, accumulate_grad_batches=2).fit(module, data(4))
        results.append([parameter.detach().clone() for parameter in module.parameters()])
        module.zero_grad()
    torch.testing.assert_close(*results)
