"""Histograms of gradients, read back from the loggers' own files, against a slow count of entries."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from clip_callbacks import AccumulationRescaling, GradientClipping, GradientNormMonitor, NonFiniteGuard
from clip_callbacks.stats.histogram import Histogram, code_counts
from tests.helpers.monitoring import Witness
from tests.helpers.training import Poisoned, Regression, TwoNetworks, data, scaled

TINY = 2.0**-126


def slow_count(entries):
    """Of each finite entry the bin: by its sign and the powers of two around it."""
    return Counter(bin_of(entry) for entry in entries if math.isfinite(entry))


def bin_of(entry):
    if abs(entry) < TINY:
        return (-TINY, TINY)
    power = math.frexp(abs(entry))[1]
    low, high = 2.0 ** (power - 1), 2.0**power
    return (low, high) if entry > 0 else (-high, -low)


def as_counter(edges, counts):
    return Counter({(a, b): int(n) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True) if n})


def counted(*tensors, factor=1.0):
    histogram = Histogram.of_codes(sum(code_counts(tensor, factor) for tensor in tensors))
    return as_counter(histogram.edges.tolist(), histogram.counts.tolist())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [1.0, 3.0, 2.0**-16])
def test_every_entry_is_between_its_powers_of_two(dtype, factor):
    tensor = (torch.randn(7, 11, 3).double() * torch.logspace(-6, 3, 33, base=10).reshape(11, 3)).to(dtype)
    wide = tensor.float() if dtype is not torch.float64 else tensor
    assert counted(tensor, factor=factor) == slow_count((wide * factor).flatten().tolist())
    assert counted(tensor.transpose(0, 1), factor=torch.tensor(factor)) == counted(tensor, factor=factor)


def test_what_is_special():
    special = [0.0, -0.0, 1.0, -1.0, 2.0, TINY, TINY / 2, -1e-45, 3e38, math.inf, -math.inf, math.nan]
    assert counted(torch.tensor(special)) == slow_count(special)
    assert Histogram.of_codes(code_counts(torch.tensor([math.nan, -math.inf]))) is None
    assert Histogram.of_codes(code_counts(torch.empty(0))) is None
    assert counted(torch.tensor([1e300, 1e-300, math.nan], dtype=torch.float64)) == slow_count([3e38, 0.0])
    assert counted(torch.tensor([3 - 4j])) == slow_count([3.0, -4.0])
    float16 = torch.tensor([2.0**-24, 2.0**-14, 0.0], dtype=torch.float16)
    assert counted(float16) == slow_count([2.0**-24, 2.0**-14, 0.0]), "subnormals of float16 are seen"


def test_more_entries_than_are_looked_at_together(monkeypatch):
    monkeypatch.setattr("clip_callbacks.stats.histogram.MAX_ENTRIES_AT_ONCE", 10)
    tensor = torch.randn(101)
    assert counted(tensor) == slow_count(tensor.tolist())


def from_tensorboard(logger):
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0})
    events.Reload()
    found = {}
    for tag in events.Tags()["histograms"]:
        for event in events.Histograms(tag):
            value = event.histogram_value
            edges = [value.min, *value.bucket_limit]
            assert value.max == edges[-1]
            assert value.num == sum(value.bucket)
            found[tag, event.step] = as_counter(edges, value.bucket)
    return found


def expected(before, layers, steps, factor=1.0):
    counts = {}
    for layer in layers:
        for step in steps:
            gradients = [before[step][f"{layer}.{kind}"].float() * factor for kind in ("weight", "bias")]
            counts[f"grad_histogram/{layer}", step] = slow_count([entry for each in gradients for entry in each.flatten().tolist()])
    return counts


def test_histograms_are_of_gradients_before_clipping_on_logging_steps(trainer, tmp_path):
    witness, board = Witness(), TensorBoardLogger(tmp_path)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    monitor = GradientNormMonitor(log_histograms=True)
    trainer(witness, GradientClipping(0.01), monitor, logger=[CSVLogger(tmp_path), board], log_every_n_steps=3).fit(
        Regression(net=net), data(9)
    )
    assert from_tensorboard(board) == expected(witness.before, ("net.0", "net.2"), (2, 5, 8))


def test_histograms_are_of_the_blocks_that_are_logged(trainer, tmp_path):
    board = TensorBoardLogger(tmp_path)
    monitor = GradientNormMonitor("parameter", include="weight", top_k=1, every_n_steps=4, log_histograms=True)
    trainer(monitor, logger=board, log_every_n_steps=2).fit(Regression(), data(8))
    found = from_tensorboard(board)
    assert [step for _, step in found] == [3, 7]
    events = EventAccumulator(board.log_dir)
    events.Reload()
    norms = {
        (f"grad_histogram/{tag[10:]}", it.step)
        for tag in events.Tags()["scalars"]
        if tag.startswith("grad_norm/")
        for it in events.Scalars(tag)
    }
    assert set(found) == norms


def test_histograms_are_of_the_rescaled_gradient(trainer, tmp_path):
    witness, board = Witness(), TensorBoardLogger(tmp_path)
    monitor = GradientNormMonitor(log_histograms=True)
    trainer(witness, AccumulationRescaling(), monitor, logger=board, accumulate_grad_batches=3).fit(Regression(), data(8))
    found = from_tensorboard(board)
    short = expected(witness.before, ("net.0", "net.2"), (2,), factor=1.5)  # of its two micro-batches Lightning took a third each
    assert {key: value for key, value in found.items() if key[1] == 2} == short


@pytest.mark.parametrize("fused", [False, True])
def test_histograms_are_without_the_loss_scale(trainer, tmp_path, fused):
    board, plain = TensorBoardLogger(tmp_path), TensorBoardLogger(tmp_path)
    for logger, scale in ((board, 2.0**10), (plain, 1.0)):
        torch.manual_seed(0)
        options = scaled(init_scale=scale, growth_interval=1000)
        monitor = GradientNormMonitor("global", log_histograms=True)
        trainer(GradientClipping(1.0), monitor, logger=logger, **options).fit(Regression(torch.optim.AdamW, fused=fused), data(2))
    scaled_run, plain_run = (from_tensorboard(logger)["grad_histogram/global", 0] for logger in (board, plain))
    middles = [sum((a + b) / 2 * count for (a, b), count in run.items() if a > 0) for run in (scaled_run, plain_run)]
    assert middles[0] == pytest.approx(middles[1], rel=0.05), "float16 activations round otherwise under another scale"
    assert sum(scaled_run.values()) == sum(plain_run.values()) == 49


@pytest.mark.filterwarnings("ignore:Non-finite gradients")
@pytest.mark.parametrize("deferred", [False, True])
def test_of_a_bad_step_finite_entries_only(trainer, tmp_path, deferred):
    witness, board = Witness(), TensorBoardLogger(tmp_path)
    module = Poisoned({1: math.nan}, optimizer=torch.optim.AdamW, fused=True)
    monitor = GradientNormMonitor(log_histograms=True)
    trainer(witness, NonFiniteGuard(deferred=deferred), monitor, logger=board).fit(module, data(3))
    assert from_tensorboard(board) == expected(witness.before, ("net.0", "net.2"), (0, 2)), "of step 1 all entries are NaN"


def test_several_optimizers_have_histograms_of_their_own(trainer, tmp_path):
    board = TensorBoardLogger(tmp_path)
    trainer(GradientNormMonitor(log_histograms=True), logger=board, log_every_n_steps=2).fit(TwoNetworks(), data(4))
    tags = ("grad_histogram/generator-SGD", "grad_histogram/discriminator-SGD-1")
    assert set(from_tensorboard(board)) == {(tag, step) for tag in tags for step in (1, 3)}


def test_histograms_of_sparse_gradients_count_what_is_stored(trainer, tmp_path):
    class Words(Regression):
        def __init__(self):
            super().__init__(net=nn.Embedding(10, 3, sparse=True))

        def training_step(self, batch, batch_idx):
            return self.net(torch.tensor([1, 1, 4])).sum()

    board = TensorBoardLogger(tmp_path)
    trainer(GradientNormMonitor(log_histograms=True), logger=board).fit(Words(), data(1))
    assert from_tensorboard(board) == {("grad_histogram/net", 0): Counter({(2.0, 4.0): 3, (1.0, 2.0): 3})}


def chunks(content, block=1 << 15, header=7):
    """Records of a file in the format of LevelDB's log, as wandb writes it after a header of as many bytes: some are in pieces."""
    place, pieces = header, b""
    while place + header <= len(content):
        if block - place % block < header:
            place += block - place % block
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        pieces += content[place + header : place + header + length]
        place += header + length
        if kind in {1, 4}:  # whole, or the last piece
            yield pieces
            pieces = b""


def records(folder):
    """All that an offline run has logged, by wandb's own messages."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    (path,) = Path(folder).rglob("*.wandb")
    found, deadline = [], time.monotonic() + 60
    while not found or found[-1].WhichOneof("record_type") != "exit":  # another process writes, and may be behind
        assert time.monotonic() < deadline
        with suppress(DecodeError):  # of a record that is half written
            found = [wandb_internal_pb2.Record.FromString(chunk) for chunk in chunks(path.read_bytes())]
    return [
        {tuple(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.WhichOneof("record_type") == "history"
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prefix", ["", "run"])
def test_histograms_in_wandb_on_lightnings_x_axis(trainer, tmp_path, prefix):
    wandb = pytest.importorskip("wandb")
    witness = Witness()
    logger = WandbLogger(save_dir=tmp_path, offline=True, prefix=prefix)
    trainer(witness, GradientNormMonitor(log_histograms=True), logger=logger, log_every_n_steps=2).fit(Regression(), data(4))
    wandb.finish()
    start = f"{prefix}-" if prefix else ""
    found = {}
    for row in records(tmp_path):
        for tag in {key[0] for key, value in row.items() if key[1:] == ("_type",) and value == "histogram"}:
            assert tag.startswith(start)
            place = tag.removeprefix(start), row["trainer/global_step",]
            found[place] = as_counter(row[tag, "bins"], row[tag, "values"])
    assert found == expected(witness.before, ("net.0", "net.2"), (1, 3))


@pytest.mark.parametrize("logger", [False, "csv"])
def test_histograms_that_nobody_would_see_are_refused(trainer, tmp_path, logger):
    loggers = CSVLogger(tmp_path) if logger else False
    named = "CSVLogger" if logger else "no logger"
    with pytest.raises(
        ValueError, match=f"`log_histograms` must be False without a TensorBoardLogger or a WandbLogger, got True with {named}"
    ):
        trainer(GradientNormMonitor(log_histograms=True), logger=loggers).fit(Regression(), data(2))
    trainer(GradientNormMonitor(log_histograms=True), logger=loggers, fast_dev_run=2).fit(Regression(), data(2))
