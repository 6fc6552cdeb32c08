"""Nothing that a run remembers grows with the number of its steps."""

from __future__ import annotations

import gc
import io
from collections import Counter, deque
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from clip_callbacks import (
    AccumulationRescaling,
    ClipRule,
    GradientClipping,
    GradientNoiseScale,
    GradientNormMonitor,
    NonFiniteGuard,
    QuantileLimit,
    RobustZScoreLimit,
    Rollback,
    ZScoreLimit,
)
from clip_callbacks.stats import block_history, norm_history, vanishing
from tests.helpers.training import Regression, TwoNetworks

FEW, WAITING = 16, 8
"""Numbers of norms that are kept as they were, and that wait to be processed together, in these tests."""

MARKS = (8 * WAITING + 8, 16 * WAITING + 8)
"""Steps at which equally many norms wait: lists of norms have been emptied several times."""

PERIOD = 8
"""Number of batches after which the data begin again, so that sketches have the same bins at both marks."""


def containers(thing, path="", seen=None):
    """Yield the path and the size of every container and tensor that an object of this package holds, itself or through others."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield path, thing.numel()
    elif isinstance(thing, dict):
        yield path, len(thing)
        for key, value in thing.items():
            yield from containers(value, f"{path}[{key if isinstance(key, (str, int)) else type(key).__name__}]", seen)
    elif isinstance(thing, (list, tuple, set, frozenset, deque)):
        yield path, len(thing)
        for place, value in enumerate(thing):
            yield from containers(value, f"{path}[{place}]", seen)
    elif type(thing).__module__.startswith("clip_callbacks"):
        slots = {name: getattr(thing, name) for name in getattr(type(thing), "__slots__", ()) if hasattr(thing, name)}
        for name, value in {**getattr(thing, "__dict__", {}), **slots}.items():
            yield from containers(value, f"{path}.{name}", seen)


class Watch(Callback):
    """Notes at both marks what there is."""

    def __init__(self, batches_of_a_step=1):
        self.marks = [mark * batches_of_a_step for mark in MARKS]
        self.sizes, self.bytes, self.objects = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx + 1 not in self.marks:
            return
        ours = [each for each in trainer.callbacks if type(each).__module__.startswith("clip_callbacks")]
        file = io.BytesIO()
        torch.save([each.state_dict() for each in ours], file)
        self.bytes.append(len(file.getvalue()))
        self.sizes.append(dict(containers(ours)))
        gc.collect()
        kinds = [type(each) for each in gc.get_objects()]
        self.objects.append(
            Counter(kind for kind in kinds if kind is torch.Tensor or str(kind.__module__).startswith("clip_callbacks"))
        )


class Normalized(Regression):
    """With buffers, which a skipped step restores."""

    def __init__(self, **options):
        super().__init__(net=nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), lr=0.0, **options)


class TwoStandingNetworks(TwoNetworks):
    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.0) for net in (self.generator, self.discriminator)]


def repeating(batches):
    torch.manual_seed(0)
    inputs, targets = torch.randn(4 * PERIOD, 4), torch.randn(4 * PERIOD, 1) * torch.arange(4 * PERIOD)[:, None]
    times = -(-batches // PERIOD)
    return DataLoader(TensorDataset(inputs.repeat(times, 1), targets.repeat(times, 1)), batch_size=4)


def guard(**options):
    thresholds = {"skip_above": RobustZScoreLimit(10.0), "loss_above": RobustZScoreLimit(10.0, scale="linear")}
    return NonFiniteGuard(**thresholds, rollback=Rollback(every_n_steps=20), **options)


def clipping():
    rules = [ClipRule(QuantileLimit(0.5), name="all"), ClipRule(0.1, "layer", name="local")]
    return GradientClipping(rules=rules, shadow=[ZScoreLimit(1.0), 1.0])


def monitor(*, log_histograms=True):
    options = ("log_update_ratio", "log_weight_norm", "log_statistics", "log_contributions")
    return GradientNormMonitor("parameter", log_histograms=log_histograms, **dict.fromkeys(options, True))


RUNS = {
    "everything": (Normalized, lambda: [AccumulationRescaling(), guard(), clipping(), monitor(), GradientNoiseScale()], 2),
    "two optimizers": (TwoStandingNetworks, lambda: [AccumulationRescaling(), guard(), clipping(), monitor()], 1),
    "deferred": (
        partial(Normalized, optimizer=torch.optim.AdamW, fused=True),
        lambda: [NonFiniteGuard(deferred=True), GradientClipping(QuantileLimit(0.5)), monitor()],
        1,
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_nothing_grows_with_the_steps_of_an_epoch(trainer, tmp_path, monkeypatch, name):
    monkeypatch.setattr(norm_history, "MAX_EXACT_STEPS", FEW)
    for place in (norm_history, block_history, vanishing):
        monkeypatch.setattr(place, "MAX_WAITING_STEPS", WAITING)
    module, callbacks, window = RUNS[name]
    watch = Watch(window)
    options = {"accumulate_grad_batches": window, "log_every_n_steps": 32, "logger": TensorBoardLogger(tmp_path)}
    trainer(*callbacks(), watch, **options).fit(module(), repeating(MARKS[1] * window))
    before, after = watch.sizes
    assert {path: size for path, size in after.items() if size > before.get(path, -1)} == {}
    assert len(before) > 100
    assert not watch.objects[1] - watch.objects[0]
    assert watch.bytes[1] <= watch.bytes[0] + 64, "a few numbers have more digits"


def test_the_test_finds_what_grows():
    class Growing:
        __module__ = "clip_callbacks.somewhere"

        def __init__(self):
            self.parts = {"inner": [deque([1]), {2}]}

    growing = Growing()
    before = dict(containers([growing]))
    growing.parts["inner"][0].append(3)
    after = dict(containers([growing]))
    assert {path for path, size in after.items() if size > before.get(path, -1)} == {"[0].parts[inner][0]"}
