"""Faults injected on one rank."""

from __future__ import annotations

import pytest

from clip_callbacks import FaultInjection, GradientClipping, NonFiniteGuard
from tests.helpers import parallel
from tests.helpers.matrix import matrix
from tests.helpers.training import assert_same_bits

pytestmark = pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning", "ignore:Spike:RuntimeWarning")


@pytest.fixture(autouse=True)
def _allowed(monkeypatch):
    monkeypatch.setenv("CLIP_CALLBACKS_INJECT", "1")


# On several ranks


def on_ranks(name, kind, rank, *, first, **options):
    """Skipped steps, what was done here, and the guard's warnings."""
    import os
    import warnings

    os.environ["CLIP_CALLBACKS_INJECT"] = "1"
    faults = FaultInjection(kind, step=[2, 4], rank=rank, include=None if kind == "loss" else "up.weight")
    guard = NonFiniteGuard(**options)
    family = [faults, guard] if first else [guard, faults]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = parallel.train(name, *family, GradientClipping(1.0), steps=7)
    told = [str(warning.message) for warning in caught if "Non-finite" in str(warning.message)]
    return {
        "skipped": found["skipped"],
        "steps": [strike["step"] for strike in faults.injected],
        "names": sorted({name for strike in faults.injected for name in strike["parameters"]}),
        "weights": found["weights"],
        "told": told,
        "dropped": guard.dropped_micro_batches,
    }


@matrix(name=["ddp", "fsdp2", "fsdp1", "tp"], kind=["nan", "inf", "loss"], first=[True, False])
def test_what_strikes_one_rank_all_skip(run, name, kind, first):
    one, two = run(name, kind, 1, function=on_ranks, first=first)
    assert one["skipped"] == two["skipped"] == [False, False, True, False, True, False, False]
    assert (one["steps"], two["steps"]) == ([], [2, 4])
    assert two["names"] == ([] if kind == "loss" else ["net.up.weight"])
    assert_same_bits(one["weights"], two["weights"])
    if kind != "loss":
        assert "net.up.weight" in one["told"][0]
    if kind == "loss":
        assert "rank 1" in one["told"][0]


@pytest.mark.parametrize("first", [True, False])
def test_what_strikes_one_rank_before_the_average_all_drop(run, first):
    one, two = run("ddp", "nan", 1, function=on_ranks, first=first, level="microbatch")
    assert one["dropped"] == two["dropped"] == 2
    assert_same_bits(one["weights"], two["weights"])


def test_a_spike_on_one_rank_is_averaged(run):
    one, two = run("ddp", "spike", 1, function=on_ranks, first=True, skip_above=100.0)
    assert one["skipped"] == two["skipped"] == [False, False, True, False, True, False, False]
