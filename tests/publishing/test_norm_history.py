"""Norms of a span of steps: exact while there are few, then within 1 %, in room that does not grow."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_callbacks.stats import norm_history
from clip_callbacks.stats.norm_history import MAX_EXACT_STEPS, MAX_WAITING_STEPS, NormHistory
from clip_callbacks.stats.run_history import ClipCounts, RunHistory
from clip_callbacks.stats.sketch import GAMMA, LARGEST_NORM, RELATIVE_ERROR, SMALLEST_NORM, NormSketch
from tests.helpers.matrix import examples

PERCENTS = (0, 1, 50, 90, 99, 100)
ROUNDING = 1e-9  # of the logarithm in float64, whose bins are 2 % wide
FEW = 16

norms = st.one_of(st.just(0.0), st.floats(SMALLEST_NORM, LARGEST_NORM), st.floats(0.5, 2.0))
streams = st.lists(norms, min_size=1, max_size=5 * FEW)
segments = st.sampled_from([1, 2, 4])


@pytest.fixture(scope="module", autouse=True)
def few():
    """Few norms are many, so that examples of hypothesis are short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norm_history, "MAX_EXACT_STEPS", FEW)
        patch.setattr(norm_history, "MAX_WAITING_STEPS", 3)
        yield


def filled(values, max_segments=1):
    history = NormHistory(max_segments)
    for value in values:
        history.add(torch.tensor(value, dtype=torch.float64))
    return history


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_state(left, right):
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
        return
    assert left.keys() == right.keys()
    assert all(torch.equal(torch.as_tensor(left[key]), torch.as_tensor(right[key])) for key in left)


@settings(max_examples=examples(200), deadline=None)
@given(streams, segments)
def test_percentiles_are_exact_while_there_are_few_and_within_one_percent_then(values, max_segments):
    found = filled(values, max_segments).percentiles(PERCENTS).tolist()
    true = np.quantile(np.array(values), np.array(PERCENTS) / 100)
    error = 0.0 if len(values) <= FEW else RELATIVE_ERROR + ROUNDING
    for answer, expected in zip(found, true, strict=True):
        # numpy interpolates in another order, which costs it a few units in the last place
        assert abs(answer - expected) <= error * expected + 1e-12 * expected


def test_exact_percentiles_are_those_of_torch():
    values = torch.rand(FEW, dtype=torch.float64)
    expected = torch.quantile(values, torch.tensor(PERCENTS, dtype=torch.float64) / 100)
    assert torch.equal(filled(values.tolist()).percentiles(PERCENTS), expected)


@settings(max_examples=examples(100), deadline=None)
@given(streams, streams, segments)
def test_a_checkpoint_in_mid_epoch_changes_nothing(before, after, max_segments):
    stopped = filled(before, max_segments)
    resumed = NormHistory(max_segments)
    resumed.load(through_a_file(stopped.state()))
    for history in (stopped, resumed):
        for value in after:
            history.add(torch.tensor(value, dtype=torch.float64))
    whole = filled(before + after, max_segments)
    for history in (stopped, resumed):
        assert_same_state(history.state(), whole.state())
        assert torch.equal(history.values(), whole.values())


@settings(max_examples=examples(100), deadline=None)
@given(streams, segments)
def test_all_norms_of_an_earlier_release_are_taken_up(values, max_segments):
    """It kept them all, however many there were."""
    history = NormHistory(max_segments)
    history.load(torch.tensor(values, dtype=torch.float64))
    assert_same_state(history.state(), filled(values, max_segments).state())


@settings(max_examples=examples(100), deadline=None)
@given(streams, streams)
def test_merged_sketches_are_the_sketch_of_everything(first, second):
    merged, whole = NormSketch(), NormSketch()
    merged.merge(filled(first).sketch())
    merged.merge(NormSketch())
    merged.merge(filled(second, 4).sketch())
    whole.add(torch.tensor(first + second, dtype=torch.float64)[:, None])
    assert all(torch.equal(merged.state()[key], whole.state()[key]) for key in ("blocks", "bins", "counts"))


@settings(max_examples=examples(100), deadline=None)
@given(streams, segments)
def test_values_are_as_many_each_within_a_bin(values, max_segments):
    found = filled(values, max_segments).values().sort().values.tolist()
    for answer, true in zip(found, sorted(values), strict=True):
        assert true / (GAMMA + ROUNDING) <= answer <= true * (GAMMA + ROUNDING)


@pytest.mark.parametrize("steps", [FEW + 1, 100, 777, 1024, 5000])
def test_values_of_a_long_run_are_in_about_their_order(steps):
    """To within a segment, of which there are 8 to 16."""
    found = filled([float(step) for step in range(1, steps + 1)], FEW).values()
    length = max(steps / 8, FEW)
    assert ((found - torch.arange(1, steps + 1)).abs() <= length + 0.021 * steps).all()
    if steps > 100:
        medians = [quarter.median().item() for quarter in found.tensor_split(4)]
        assert medians == pytest.approx([share * steps for share in (1 / 8, 3 / 8, 5 / 8, 7 / 8)], rel=0.1)


def test_a_span_in_random_order_is_no_growth():
    torch.manual_seed(0)
    found = filled(torch.rand(3000).exp().tolist(), 4).values()
    medians = [quarter.median().item() for quarter in found.tensor_split(4)]
    assert max(medians) < 1.1 * min(medians)


def test_norms_of_two_dtypes_wait_together():
    """A step whose norm float32 cannot hold has a float64 one."""
    history = NormHistory()
    history.add(torch.tensor(0.1))
    history.add(torch.tensor(1e300, dtype=torch.float64))
    assert history.values().tolist() == [torch.tensor(0.1).item(), 1e300]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_an_error_of_the_caller(value):
    with pytest.raises(ValueError, match="must be finite"):
        filled([value, *[1.0] * FEW]).values()


def test_nothing_gives_nothing():
    history = NormHistory()
    assert history.percentiles(PERCENTS) is None
    assert history.values().shape == (0,)
    assert history.sketch().count.tolist() == [0]
    filled_one = filled([1.0] * 50)
    filled_one.reset()
    assert_same_state(filled_one.state(), history.state())


def sizes(history):
    """Bytes of the state in a file, and everything that may grow in memory."""
    file = io.BytesIO()
    torch.save(history.state(), file)
    bins = [None if segment._counts is None else segment._counts.numel() for segment in history._segments]
    return len(file.getvalue()), len(history._waiting), len(history._exact), bins


@pytest.mark.parametrize("max_segments", [1, 8])
def test_room_does_not_grow_with_steps(max_segments):
    values = torch.linspace(1.0, 3.0, 50).tolist()
    history = filled(values * 10, max_segments)
    bytes_before, *before = sizes(history)
    for value in values * 150:
        history.add(torch.tensor(value))
    bytes_after, *after = sizes(history)
    assert after[:2] == before[:2] == [0, 0]
    assert max(len(after[2]), len(before[2])) <= max_segments
    assert bytes_after <= bytes_before * (1 if len(after[2]) <= len(before[2]) else 2), "counts are numbers of one size"


def test_limits_are_as_documented():
    assert (MAX_EXACT_STEPS, MAX_WAITING_STEPS, RELATIVE_ERROR) == (1024, 128, 0.01)


# --- counts


class SlowCounts:
    """Three pairs of numbers."""

    def __init__(self):
        self.pairs = [[0, 0], [0, 0], [0, 0]]

    def apply(self, event):
        if event == "log":
            self.pairs[0] = [0, 0]
        elif event == "epoch":
            self.pairs[1] = [0, 0]
        elif event != "resume":
            for pair in self.pairs:
                pair[0] += 1
                pair[1] += event == "clipped"

    def fraction(self, place):
        steps, clipped = self.pairs[place]
        return clipped / steps if steps else 0.0


@settings(max_examples=examples(200), deadline=None)
@given(st.lists(st.sampled_from(["log", "epoch", "resume", "clipped", "whole"]), max_size=60))
def test_counts_of_three_spans_are_those_of_three_pairs(events):
    counts, slow = ClipCounts(), SlowCounts()
    for event in events:
        slow.apply(event)
        if event == "log":
            counts.begin_log()
        elif event == "epoch":
            counts.begin_epoch()
        elif event == "resume":
            saved, counts = counts.state(), ClipCounts()
            counts.load(saved)
        else:
            counts.steps += 1
            counts.clipped += event == "clipped"
        assert counts.state() == [number for pair in slow.pairs for number in pair]
        found = (counts.fraction_since_logged, counts.fraction_of_epoch, counts.fraction)
        assert found == tuple(slow.fraction(place) for place in range(3))
        assert counts.steps_since_logged == slow.pairs[0][0]


def test_the_run_is_the_sum_of_its_epochs():
    history, values = RunHistory(), (torch.rand(100, dtype=torch.float64) + 0.5)
    for epoch in values.split(30):
        for value in epoch:
            history.epoch_norms.add(value)
        history.end_epoch()
    assert history.epoch_norms.values().shape == (0,)
    assert history.run_norms.count.tolist() == [100]
    true = torch.quantile(values, torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64))
    torch.testing.assert_close(torch.tensor(history.run_percentiles(), dtype=torch.float64), true, rtol=0.0101, atol=0)
