"""Statistics of gradients and norms of weights, against sums in plain Python and against what the loggers' files say."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from clip_callbacks import AccumulationRescaling, GradientClipping, GradientNormMonitor, NonFiniteGuard
from clip_callbacks.core.gradients import gradients_of
from clip_callbacks.core.tensor_norms import unread_norms
from clip_callbacks.core.tensor_table import TensorTable
from clip_callbacks.publishing.before_write import StateBeforeWrite
from clip_callbacks.stats.gradient_statistics import GradientMoments
from clip_callbacks.stats.update_ratio import WeightsBefore
from tests.helpers.matrix import examples, matrix
from tests.helpers.monitoring import Witness, blocks_of, norm
from tests.helpers.operations import SYNCS, Transfers
from tests.helpers.training import GradientTape, Poisoned, Regression, TwoNetworks, data, scaled

KEYS = ("grad_mean/", "grad_std/", "grad_zeros/")
FLOAT32_RTOL = 1.3e-6
"""What ``torch.testing.assert_close`` allows float32 numbers; here without its allowance for small ones, 1e-5."""


def slow_statistics(entries):
    """Mean, standard deviation and share of zeros, one entry after another, in float64 without rounding of the sums."""
    mean = math.fsum(entries) / len(entries)
    deviation = math.sqrt(math.fsum((entry - mean) ** 2 for entry in entries) / len(entries))
    return mean, deviation, sum(entry == 0 for entry in entries) / len(entries)


def entries_of(*tensors):
    """All entries, those that are not stored too; of a complex one both parts."""
    dense = [tensor.to_dense() if tensor.layout is not torch.strided else tensor for tensor in tensors]
    return [entry for each in dense for entry in (torch.view_as_real(each) if each.is_complex() else each).flatten().tolist()]


def with_gradients(gradients):
    """A table of parameters with these gradients, by names; None is no gradient."""
    named = {}
    for name, gradient in gradients.items():
        named[name] = nn.Parameter(torch.zeros(2) if gradient is None else torch.zeros_like(gradient, layout=torch.strided))
        named[name].grad = gradient
    return TensorTable.of_named(named.items())


def measured(table, scope="layer", factor=1.0):
    blocks = table.partition(scope)
    found = GradientMoments(gradients_of(table, bucketed=False), blocks, factor).statistics()
    return {name: tuple(float(each[place]) for each in found) for place, name in enumerate(blocks.names)}


# One step's gradients, without a Trainer

SHAPES = st.sampled_from([(), (1,), (3,), (2, 3), (4, 1, 2), (0,), (2, 0), (40,)])
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])


@st.composite
def some_gradients(draw):
    gradients = {}
    for number in range(draw(st.integers(1, 6))):
        shape, dtype = draw(SHAPES), draw(DTYPES)
        tensor = draw(st.sampled_from([1.0, 1e-3, 100.0])) * (torch.randn(shape) + draw(st.sampled_from([0.0, 1.0, 50.0])))
        tensor = (tensor * (torch.rand(shape) > draw(st.sampled_from([0.0, 0.5, 1.0])))).to(dtype)
        if tensor.ndim > 1 and draw(st.booleans()):
            tensor = tensor.transpose(0, 1).contiguous().transpose(0, 1)
        gradients[f"layer{draw(st.integers(0, 2))}.weight{number}"] = draw(st.sampled_from([tensor, tensor, None]))
    return gradients


@settings(max_examples=examples(150), deadline=None)
@given(some_gradients(), st.sampled_from(["layer", "parameter", "global"]), st.sampled_from([1.0, 1.5, 2.0**-16, -1.0]))
def test_statistics_of_any_gradients_are_those_of_all_entries(gradients, scope, factor):
    table = with_gradients(gradients)
    found = measured(table, scope, factor)
    labels = {"layer": lambda name: name.rpartition(".")[0], "parameter": str, "global": lambda _: "global"}
    for block, values in found.items():
        tensors = [gradients[name] for name in table.names if labels[scope](name) == block and gradients[name] is not None]
        entries = [entry * factor for entry in entries_of(*tensors)]
        if not entries:
            assert all(map(math.isnan, values))
            continue
        largest = max(map(abs, entries)) or 1.0
        mean, deviation, zeros = slow_statistics(entries)
        torch.testing.assert_close(values[0] / largest, mean / largest)
        torch.testing.assert_close(values[1] / largest, deviation / largest)
        assert values[2] == pytest.approx(zeros)


@pytest.mark.parametrize("chunk", [10, 1 << 18])
@pytest.mark.parametrize("scope", ["layer", "parameter"])
def test_a_mean_far_larger_than_the_spread_costs_no_digits(monkeypatch, chunk, scope):
    monkeypatch.setattr("clip_callbacks.stats.gradient_statistics.MAX_ENTRIES_ON_CPU", chunk)
    gradients = {f"net.{place}": 1e4 + 1e-2 * torch.randn(50, 3) for place in range(3)}
    gradients["net.3"] = -gradients["net.0"][:1].clone() if scope == "parameter" else 1e4 + 1e-2 * torch.randn(7)
    found = measured(with_gradients(gradients), scope)
    for block, values in found.items():
        tensors = gradients.values() if scope == "layer" else [gradients[block]]
        expected = slow_statistics(entries_of(*tensors))
        assert values == pytest.approx(expected, rel=FLOAT32_RTOL, abs=0.0)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_squares_beyond_float32_are_no_matter(scale):
    gradient = scale * torch.randn(5, 5)
    assert measured(with_gradients({"net.weight": gradient}))["net"] == pytest.approx(
        slow_statistics(entries_of(gradient)), rel=FLOAT32_RTOL, abs=0.0
    )


def test_gradients_are_left_as_they_are():
    gradients = {"a": torch.randn(3, 3, dtype=torch.float64), "b": torch.randn(7), "c": torch.randn(3, 3, dtype=torch.float64)}
    copies = {name: gradient.clone() for name, gradient in gradients.items()}
    measured(with_gradients(gradients), "parameter")
    for name, gradient in gradients.items():
        assert torch.equal(gradient, copies[name])


def embedding_gradient(rows, columns, indices, **options):
    values = torch.randn(len(indices), columns)
    return torch.sparse_coo_tensor(torch.tensor([indices]), values, (rows, columns), check_invariants=True, **options)


@pytest.mark.parametrize(
    "indices", [[1, 4], [4, 4, 1, 4], [], [0, 1, 2, 3, 4, 5]], ids=["coalesced", "uncoalesced", "nothing stored", "all stored"]
)
def test_entries_that_are_not_stored_are_zeros_of_the_whole_tensor(indices):
    sparse, dense = embedding_gradient(6, 3, indices), torch.randn(4)
    whole = sparse.to_dense()
    table = with_gradients({"words.weight": sparse, "words.bias": dense, "other.weight": None})
    found = measured(table)
    assert found["words"] == pytest.approx(slow_statistics(entries_of(whole, dense)))
    assert all(map(math.isnan, found["other"]))
    assert measured(table, "parameter")["words.weight"] == pytest.approx(slow_statistics(entries_of(whole)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_block_with_a_non_finite_entry_has_no_statistics(bad):
    found = measured(with_gradients({"good.weight": torch.tensor([0.0, 2.0]), "bad.weight": torch.tensor([0.0, bad, 1.0])}))
    assert found["good"] == (1.0, 1.0, 0.5)
    assert all(map(math.isnan, found["bad"]))


# Host syncs, told without a GPU: a fake CUDA tensor has no values to read


def test_nothing_is_read_on_the_host_before_the_step():
    with FakeTensorMode(), torch.no_grad():
        table = with_gradients({f"net.{i}": torch.ones(size, device="cuda") for i, size in enumerate((10, 10, 3, 10))})
        blocks, loss_scale = table.partition("layer"), torch.full((), 1024.0, device="cuda")
        with Transfers() as transfers:
            moments = GradientMoments(gradients_of(table, bucketed=False), blocks, 0.5 / loss_scale)
            weights = [WeightsBefore(table, blocks, 2.0, with_copies=copies) for copies in (False, True)]
        assert transfers.counts["aten._foreach_norm"] == transfers.counts["aten._foreach_copy_"] == 1
        assert not transfers.waits
        assert not SYNCS & set(transfers.counts)
        for read in (moments.statistics, *(each.norms for each in weights)):
            with Transfers() as transfers, suppress(DataDependentOutputException, RuntimeError):
                read()  # the host goes on with numbers, which fake tensors do not have
            assert True in transfers.waits


# In a fit


def read(logger):
    return pd.read_csv(Path(logger.log_dir) / "metrics.csv")


def logged(frame, key):
    """The values of a metric by their steps."""
    return frame[frame[key].notna()].set_index("step")[key].to_dict() if key in frame else {}


def blocks_in(frame, prefix):
    return {key.removeprefix(prefix) for key in frame if key.startswith(prefix)}


def assert_logged(frame, before, steps, scope="layer", factor=1.0, suffix=""):
    """Check the statistics of each block at each logging step against the gradients before clipping.

    Args:
        before: The gradients of each step by names, as a :class:`Witness` keeps them.
    """
    for block, names in blocks_of(before[0], scope).items():
        expected = {step: slow_statistics(entries_of(*(before[step][name] * factor for name in names))) for step in steps}
        for place, prefix in enumerate(KEYS):
            found = logged(frame, f"{prefix}{block}{suffix}")
            assert set(found) == set(steps)
            torch.testing.assert_close(
                torch.tensor([found[step] for step in steps]), torch.tensor([expected[step][place] for step in steps])
            )


@pytest.mark.parametrize("scope", ["layer", "parameter", "global", "group"])
def test_statistics_are_of_gradients_before_clipping_on_logging_steps(trainer, tmp_path, scope):
    witness, csv = Witness(), CSVLogger(tmp_path)
    monitor = GradientNormMonitor(scope, log_statistics=True)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    nn.init.constant_(net[0].bias, -3.0)  # so that some of its units never learn
    trainer(witness, GradientClipping(0.01), monitor, logger=csv, log_every_n_steps=3).fit(Regression(net=net), data(9))
    frame = read(csv)
    assert_logged(frame, witness.before, (2, 5, 8), scope)
    assert frame[[key for key in frame if key.startswith("grad_zeros/")]].max().max() > 0
    assert not blocks_in(frame, "weight_norm/")


def test_statistics_are_of_the_blocks_that_are_logged(trainer, tmp_path):
    csv = CSVLogger(tmp_path)
    monitor = GradientNormMonitor(
        "parameter", include="weight", top_k=1, every_n_steps=4, log_statistics=True, log_weight_norm=True
    )
    trainer(monitor, logger=csv, log_every_n_steps=2).fit(Regression(), data(8))
    frame = read(csv)
    norms = {(name, step) for name in blocks_in(frame, "grad_norm/") for step in logged(frame, f"grad_norm/{name}")}
    assert sorted(step for _, step in norms) == [3, 7]
    for prefix in (*KEYS, "weight_norm/"):
        assert {(name, step) for name in blocks_in(frame, prefix) for step in logged(frame, prefix + name)} == norms


def test_metrics_are_offered_to_other_callbacks_by_their_names(trainer):
    fit = trainer(GradientNormMonitor(log_statistics=True, log_weight_norm=True))
    fit.fit(Regression(), data(3))
    for prefix in (*KEYS, "weight_norm/"):
        assert {f"{prefix}net.0", f"{prefix}net.2"} <= set(fit.callback_metrics)


def test_statistics_are_of_the_rescaled_gradient(trainer, tmp_path):
    witness, csv = Witness(), CSVLogger(tmp_path)
    monitor = GradientNormMonitor(log_statistics=True)
    trainer(witness, AccumulationRescaling(), monitor, logger=csv, accumulate_grad_batches=3, log_every_n_steps=1).fit(
        Regression(), data(8)
    )
    frame = read(csv)
    # of the two micro-batches of the last window Lightning took a third each
    assert_logged(frame[frame["step"] == 2], witness.before, (2,), factor=1.5)
    assert_logged(frame[frame["step"] < 2], witness.before, (0, 1))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_statistics_are_without_the_loss_scale(trainer, tmp_path, fused, accumulated):
    witness, csv, scale = Witness(), CSVLogger(tmp_path), 2.0**10
    options = scaled(init_scale=scale, growth_interval=1) | {"accumulate_grad_batches": accumulated}
    module = Regression(torch.optim.AdamW, fused=fused)
    monitor = GradientNormMonitor(log_statistics=True)
    trainer(witness, AccumulationRescaling(), GradientClipping(1.0), monitor, logger=csv, **options).fit(module, data(3))
    steps = range(3) if accumulated == 1 else range(2)
    assert len(witness.before) == len(steps)
    frame = read(csv)
    for step in steps:
        # the scale grows after each step; optimizers that are not fused get gradients that are unscaled already
        factor = 1.0 / (scale * 2.0**step) if fused else 1.0
        factor *= 2.0 if accumulated == 2 and step == 1 else 1.0
        assert_logged(frame[frame["step"] == step], witness.before, (step,), factor=factor)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "16-true"])
def test_statistics_in_other_precisions(trainer, tmp_path, precision):
    witness, csv = Witness(), CSVLogger(tmp_path)
    trainer(witness, GradientNormMonitor(log_statistics=True), logger=csv, precision=precision).fit(Regression(), data(3))
    assert_logged(read(csv), witness.before, range(3))


@pytest.mark.filterwarnings("ignore:Non-finite gradients")
@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_skipped_step_has_no_statistics_but_its_weights_have_norms(trainer, tmp_path, deferred, factor):
    witness, csv = Witness(), CSVLogger(tmp_path)
    module = Poisoned({1: factor}, optimizer=torch.optim.AdamW, fused=True)
    monitor = GradientNormMonitor(log_statistics=True, log_weight_norm=True, log_update_ratio=True)
    trainer(witness, guard := NonFiniteGuard(deferred=deferred), monitor, logger=csv).fit(module, data(4))
    assert guard.skipped_steps == 1
    frame = read(csv)
    assert_logged(frame, witness.before, (0, 2, 3))
    assert set(logged(frame, "weight_norm/net.0")) == {0, 1, 2, 3}
    assert set(logged(frame, "update_ratio/net.0")) == {0, 2, 3}
    assert logged(frame, "weight_norm/net.0")[1] == logged(frame, "weight_norm/net.0")[2], "the step was skipped"


def test_of_a_bad_step_the_finite_blocks_have_statistics(trainer, tmp_path):
    class HalfBad(Regression):
        def on_after_backward(self):
            if self.trainer.global_step == 1:
                self.net[2].weight.grad[0, 0] = math.nan

    csv = CSVLogger(tmp_path)
    with pytest.warns(RuntimeWarning, match="Non-finite gradients"):
        trainer(NonFiniteGuard(), GradientNormMonitor(log_statistics=True), logger=csv).fit(HalfBad(), data(3))
    frame = read(csv)
    for prefix in KEYS:
        assert set(logged(frame, f"{prefix}net.0")) == {0, 1, 2}
        assert set(logged(frame, f"{prefix}net.2")) == {0, 2}
    assert "nan" not in (Path(csv.log_dir) / "metrics.csv").read_text().lower()


def test_several_optimizers_have_statistics_of_their_own(trainer, tmp_path):
    witness, csv = Witness(), CSVLogger(tmp_path)
    monitor = GradientNormMonitor(log_statistics=True, log_weight_norm=True)
    trainer(witness, monitor, logger=csv, log_every_n_steps=2).fit(TwoNetworks(), data(4))
    frame = read(csv)
    for place, (layer, suffix) in enumerate((("generator", "-SGD"), ("discriminator", "-SGD-1"))):
        # in manual optimization both optimizers step in each batch, one after the other
        own = [{name: each[name] for name in each if name.startswith(layer)} for each in witness.before[place::2]]
        assert_logged(frame, own, (1, 3), suffix=suffix)
        assert set(logged(frame, f"weight_norm/{layer}{suffix}")) == {1, 3}


def test_parameters_without_a_gradient_do_not_count(trainer, tmp_path):
    class Partly(Regression):
        """A layer that is not used, and a bias that is not."""

        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(3, 3)
            self.net[2].spare = nn.Parameter(torch.ones(5))

    witness, csv = Witness(), CSVLogger(tmp_path)
    monitor = GradientNormMonitor(log_statistics=True, log_weight_norm=True)
    trainer(witness, monitor, logger=csv).fit(Partly(), data(2))
    frame = read(csv)
    before = [{name: gradient for name, gradient in each.items() if gradient is not None} for each in witness.before]
    assert_logged(frame, before, (0, 1))
    for prefix in KEYS:
        assert blocks_in(frame, prefix) == {"net.0", "net.2"}
    assert blocks_in(frame, "weight_norm/") == {"net.0", "net.2", "unused"}


def test_sparse_gradients_of_an_embedding_in_a_fit(trainer, tmp_path):
    class Words(Regression):
        def __init__(self):
            super().__init__(net=nn.Embedding(10, 3, sparse=True))

        def training_step(self, batch, batch_idx):
            return self.net(torch.tensor([1, 1, 4])).sum()

    csv = CSVLogger(tmp_path)
    trainer(GradientNormMonitor(log_statistics=True), logger=csv).fit(Words(), data(1))
    expected = slow_statistics([2.0] * 3 + [1.0] * 3 + [0.0] * 24)
    assert [logged(read(csv), f"{prefix}net")[0] for prefix in KEYS] == pytest.approx(expected)


# Norms of weights


class Weights(Callback):
    """Keeps the weights before each optimizer step; at LBFGS's first closure call."""

    def __init__(self):
        self.before, self._step = [], None

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.before.append({name: tensor.detach().double().clone() for name, tensor in pl_module.named_parameters()})


WAYS = {
    "sgd": {},
    "fused": {"optimizer": torch.optim.AdamW, "fused": True},
    "lbfgs": {"optimizer": torch.optim.LBFGS, "lr": 0.5, "max_iter": 4},
}


@matrix(
    way=WAYS,
    scope=["layer", "parameter", "global"],
    norm_type=[2.0, 1.0, math.inf],
    beside={"alone": {}, "with ratios": {"log_update_ratio": True}},
)
def test_norms_of_weights_are_those_before_the_step(trainer, tmp_path, way, scope, norm_type, beside):
    weights, csv = Weights(), CSVLogger(tmp_path)
    monitor = GradientNormMonitor(scope, norm_type=norm_type, log_weight_norm=True, **beside)
    trainer(monitor, weights, logger=csv, log_every_n_steps=3).fit(Regression(**way), data(6))
    frame = read(csv)
    for block, names in blocks_of(weights.before[0], scope).items():
        found = logged(frame, f"weight_norm/{block}")
        assert set(found) == {2, 5}
        expected = [norm([weights.before[step][name] for name in names], norm_type) for step in (2, 5)]
        torch.testing.assert_close(torch.tensor([found[2], found[5]]), torch.tensor(expected))
    assert bool(blocks_in(frame, "update_ratio/")) == bool(beside)


def test_weights_are_read_once_for_both_options(trainer, monkeypatch):
    monkeypatch.setattr("clip_callbacks.stats.update_ratio.unread_norms", lambda *_: pytest.fail("read beside the copies"))
    fit = trainer(GradientNormMonitor(log_update_ratio=True, log_weight_norm=True))
    fit.fit(Regression(), data(2))
    assert {"weight_norm/net.0", "update_ratio/net.0"} <= set(fit.callback_metrics)


def test_frozen_parameters_have_no_weight_norm_and_weights_of_zero_have_one(trainer, tmp_path):
    module, csv = Regression(), CSVLogger(tmp_path)
    module.net[0].weight.requires_grad_(False)
    module.net[0].bias.requires_grad_(False)
    nn.init.zeros_(module.net[2].weight)
    module.net[2].bias.requires_grad_(False)
    trainer(GradientNormMonitor(log_weight_norm=True), logger=csv).fit(module, data(1))
    assert blocks_in(read(csv), "weight_norm/") == {"net.2"}
    assert logged(read(csv), "weight_norm/net.2") == {0: 0.0}


class Clamping(Regression):
    """Halves all weights after each step of its optimizer, in its own hook."""

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            for weight in self.parameters():
                weight.mul_(0.5)


class HalvesWeights(Callback):
    """Changes the weights when a batch ends, as averages of weights do."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for weight in pl_module.parameters():
            weight.data.mul_(0.5)


class SteppingTwice(Regression):
    """Manual optimization in which a second optimizer moves the same weights in the same batch."""

    automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.0), torch.optim.SGD(self.parameters(), lr=0.5)]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()


@pytest.mark.parametrize("module", [Clamping, Regression], ids=["own hook", "callback"])
def test_a_ratio_tells_of_the_step_alone(trainer, tmp_path, module):
    csv, callbacks = CSVLogger(tmp_path), [GradientNormMonitor(log_update_ratio=True)]
    if module is Regression:
        callbacks.insert(0, HalvesWeights())
    trainer(*callbacks, logger=csv).fit(module(lr=0.0), data(3))
    assert logged(read(csv), "update_ratio/net.0") == {0: 0.0, 1: 0.0, 2: 0.0}


def test_a_ratio_does_not_count_the_step_of_another_optimizer(trainer):
    fit = trainer(GradientNormMonitor(log_update_ratio=True))
    fit.fit(SteppingTwice(), data(2))
    ratios = {key: float(value) for key, value in fit.callback_metrics.items() if key.startswith("update_ratio/net.0")}
    assert len(ratios) == 2
    assert sorted(value > 0 for value in ratios.values()) == [False, True]


class Thaws(Callback):
    """Freezes a layer in odd batches, until they end."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.net[0].requires_grad_(batch_idx % 2 == 0)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.net[0].requires_grad_(True)


def test_parameters_are_frozen_if_they_are_in_the_step(trainer, tmp_path):
    csv = CSVLogger(tmp_path)
    trainer(Thaws(), GradientNormMonitor(log_weight_norm=True), logger=csv).fit(Regression(), data(4))
    assert list(logged(read(csv), "weight_norm/net.0")) == [0, 2]
    assert list(logged(read(csv), "weight_norm/net.2")) == [0, 1, 2, 3]


@pytest.mark.parametrize("norm_type", [2.0, 8.0])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norms_of_weights_beyond_the_powers_of_float32(norm_type, scale):
    weights = [scale * torch.randn(5), torch.randn(3), torch.randn(4).bfloat16()]
    expected = [norm([each.double() / each.abs().max()], norm_type) * float(each.abs().max()) for each in weights]
    torch.testing.assert_close(unread_norms(weights, norm_type).float(), torch.tensor(expected), atol=0.0, rtol=FLOAT32_RTOL)


def test_a_step_of_a_batch_that_is_not_logged_has_no_statistics(trainer, tmp_path):
    csv, tape = CSVLogger(tmp_path), GradientTape(torch.ones(6, 3))
    trainer(GradientNormMonitor(log_statistics=True), logger=csv, log_every_n_steps=4).fit(tape)
    assert set(logged(read(csv), "grad_std/(root)")) == {3}


class SteppingIn(GradientTape):
    """Manual optimization that steps in some batches only."""

    def __init__(self, feed, batches):
        super().__init__(feed, lr=0.1)
        self.automatic_optimization = False
        self.batches = batches

    def training_step(self, batch, batch_idx):
        if batch_idx in self.batches:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward((self.weight * batch[0][0]).sum())
            optimizer.step()


@pytest.mark.parametrize(
    ("steps", "shown", "reads"),
    [
        pytest.param(range(0, 30, 5), {9: 5, 19: 15, 29: 25}, [5, 15, 25], id="in every fifth batch"),
        pytest.param(range(0, 30, 17), {19: 17}, [17], id="less often than the log"),
        # the step in batch 7 comes sooner than expected, after the one in batch 6 was read for the log
        pytest.param((0, 6, 7, 12, 17, 22, 27), {19: 17, 29: 27}, [6, 17, 27], id="irregularly"),
    ],
)
def test_an_optimizer_that_steps_in_no_batch_that_is_logged(trainer, tmp_path, monkeypatch, steps, shown, reads):
    read_in, csv, feed = [], CSVLogger(tmp_path), torch.rand(30, 3)

    class Counting(StateBeforeWrite):
        def __init__(self, step, *args):
            read_in.append(step.trainer.fit_loop.batch_idx)
            super().__init__(step, *args)

    monkeypatch.setattr("clip_callbacks.publishing.norm_monitor.StateBeforeWrite", Counting)
    monitor = GradientNormMonitor(log_statistics=True, log_update_ratio=True)
    trainer(monitor, logger=csv, log_every_n_steps=10).fit(SteppingIn(feed, steps))
    assert read_in == reads
    deviations = {logged_in: slow_statistics(feed[batch].tolist())[1] for logged_in, batch in shown.items()}
    assert logged(read(csv), "grad_std/(root)") == pytest.approx(deviations, rel=1e-5)
    # weights begin at 0, and each step subtracts a gradient times the rate, which the ratio does not depend on
    weights = {batch: feed[[step for step in steps if step < batch]].sum(0).norm() for batch in shown.values()}
    ratios = {logged_in: float(feed[batch].norm() / weights[batch]) for logged_in, batch in shown.items()}
    assert logged(read(csv), "update_ratio/(root)") == pytest.approx(ratios, rel=1e-4)
