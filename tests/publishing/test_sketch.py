"""Quantiles from the sketch against sorted norms."""

from __future__ import annotations

import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_callbacks.core.measurement import block_norms
from clip_callbacks.core.tensor_table import TensorTable
from clip_callbacks.stats.sketch import BIN_COUNT, LARGEST_NORM, RELATIVE_ERROR, SMALLEST_NORM, NormSketch
from tests.helpers.matrix import examples

SHARES = (0.0, 0.1, 0.25, 0.5, 0.9, 0.99, 1.0)
ROUNDING = 1e-9  # of the logarithm in float64, whose bins are 2 % wide


def exact(values, share):
    rank = share * (len(values) - 1)
    lower, upper = sorted(values)[math.floor(rank)], sorted(values)[math.ceil(rank)]
    return lower + (rank - math.floor(rank)) * (upper - lower)


def assert_within_one_percent(answers, column):
    for share, answer in zip(SHARES, answers, strict=True):
        true = exact(column, share)
        assert abs(answer - true) <= (RELATIVE_ERROR + ROUNDING) * true, (share, answer, true)


norms = st.one_of(st.just(0.0), st.floats(SMALLEST_NORM, LARGEST_NORM), st.floats(0.5, 2.0))


@settings(max_examples=examples(200), deadline=None)
@given(st.lists(st.tuples(norms, norms), min_size=1, max_size=60), st.integers(1, 7))
def test_every_quantile_is_within_one_percent(steps, size):
    sketch = NormSketch(2)
    values = torch.tensor(steps, dtype=torch.float64)
    for batch in values.split(size):
        sketch.add(batch)
    found = sketch.quantiles(SHARES)
    assert found.shape == (len(SHARES), 2)
    for block in range(2):
        assert_within_one_percent(found[:, block].tolist(), values[:, block].tolist())
    assert sketch.count.tolist() == [len(steps)] * 2


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_a_heavy_tail_of_many_steps(scale):
    values = scale * torch.distributions.LogNormal(0.0, 3.0).sample((100_000, 1)).double()
    sketch = NormSketch()
    for batch in values.split(128):
        sketch.add(batch)
    assert_within_one_percent(sketch.quantiles(SHARES)[:, 0].tolist(), values[:, 0].tolist())


def test_norms_beyond_the_range_count_at_its_ends():
    sketch = NormSketch()
    sketch.add(torch.tensor([[1e-30], [1.0], [1e30], [0.0]], dtype=torch.float64))
    lowest, middle, highest = sketch.quantiles((1 / 3, 2 / 3, 1.0))[:, 0].tolist()
    assert lowest == pytest.approx(SMALLEST_NORM, rel=0.02)
    assert middle == pytest.approx(1.0, rel=0.01)
    assert highest == pytest.approx(LARGEST_NORM, rel=0.02)
    assert sketch.quantiles((0.0,)).item() == 0.0


def test_an_empty_sketch_answers_nan():
    sketch = NormSketch(3)
    sketch.add(torch.empty(0, 3))
    assert sketch.quantiles(SHARES).isnan().all()
    assert sketch.count.tolist() == [0, 0, 0]
    assert len(sketch.state()["counts"]) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_what_is_no_norm_is_refused_and_leaves_no_trace(value):
    sketch = NormSketch(2)
    with pytest.raises(ValueError, match="`values` must be finite and at least 0"):
        sketch.add(torch.tensor([[1.0, value]]))
    assert sketch.count.tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"`values` must be of shape \(steps, 2\), got \(2,\)"):
        sketch.add(torch.ones(2))


def test_a_state_goes_through_a_checkpoint_and_goes_on():
    values = torch.rand(50, 4, dtype=torch.float64)
    whole, first, second = NormSketch(4), NormSketch(4), NormSketch(4)
    whole.add(values)
    first.add(values[:20])
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    second.load(torch.load(file, weights_only=True))
    second.add(values[20:])
    assert torch.equal(second.quantiles(SHARES), whole.quantiles(SHARES))
    assert all(torch.equal(second.state()[key], value) for key, value in whole.state().items())
    assert sum(value.numel() for value in whole.state().values()) <= 3 * values.numel()
    second.reset()
    assert second.count.tolist() == [0] * 4


def test_bins_mean_the_same_in_every_release():
    """Checkpoints hold them."""
    sketch = NormSketch(2)
    sketch.add(torch.tensor([[0.0, 1.0], [1e-16, 1e16]], dtype=torch.float64))
    assert BIN_COUNT == 3687
    assert {key: value.tolist() for key, value in sketch.state().items()} == {
        "blocks": [0, 0, 1, 1],
        "bins": [0, 1, 1843, 3686],
        "counts": [1, 1, 1, 1],
    }


def test_blocks_go_on_in_another_sketch():
    sketch = NormSketch(2)
    sketch.add(torch.tensor([[1.0, 5.0], [2.0, 6.0]]))
    other = sketch.rows([1, None, 0])
    assert other.count.tolist() == [2, 0, 2]
    found = other.quantiles((0.0,))[0]
    assert found.isnan().tolist() == [False, True, False]
    assert found[[0, 2]].tolist() == pytest.approx([5.0, 1.0], rel=0.01)
    assert NormSketch(1).rows([0]).count.tolist() == [0]


def test_its_room_does_not_grow_with_steps():
    sketch = NormSketch(3)
    sketch.add(torch.rand(10, 3))
    room = sketch._counts.numel()
    for _ in range(100):
        sketch.add(torch.rand(128, 3) * 1e6)
    assert sketch._counts.numel() == room == 3 * BIN_COUNT


@pytest.mark.parametrize("scope", ["global", "group", "layer", "parameter"])
@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 3.0, 7.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_block_norms_of_many_steps_are_those_of_each(scope, norm_type, dtype):
    net = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(3)])
    partition = TensorTable.of(net.named_parameters()).partition(scope)
    values = torch.rand(5, 6, dtype=dtype)
    values[1] = 0
    each = torch.stack([block_norms(row, partition, norm_type) for row in values])
    torch.testing.assert_close(block_norms(values, partition, norm_type), each)
