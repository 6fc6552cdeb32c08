"""A step that is bad on one rank is skipped by all of them, through the engine's own path, and leaves no trace."""

from __future__ import annotations

import json
import math
from itertools import product

import pytest

from clip_callbacks import Bundles, FaultInjection, GradientClipping, NonFiniteGuard
from tests.deepspeed.conftest import alike, cell

CELLS = list(product((1, 2, 3), ("32-true", "bf16-mixed")))
NAN_ON_RANK_1 = {(1, 3): math.nan}
SPIKE = {(0, 3): 1e3, (1, 3): 1e3}


def same_run(bad, without):
    for name in ("weights", "rate", "norms"):
        left = bad[name]
        if name == "norms":
            left = left[:3] + left[4:]
        assert left == without[name], name


@pytest.fixture(scope="module")
def runs(train):
    """Of each cell: with a NaN on rank 1, with a spike, and without that batch."""
    cells = []
    for stage, precision in CELLS:
        for factors, left_out in ((NAN_ON_RANK_1, ()), (SPIKE, ()), ({}, (3,))):
            guard = NonFiniteGuard(skip_above=1000.0)
            options = {"precision": precision, "factors": factors, "left_out": left_out, "schedule": True, "steps": 10}
            cells.append(cell(stage, [guard, GradientClipping(3.0)], **options))
    results = train(2, *cells)
    return {key: results[3 * place : 3 * place + 3] for place, key in enumerate(CELLS)}


@pytest.mark.parametrize(("stage", "precision"), CELLS)
def test_a_nan_on_one_rank_is_skipped_by_all(runs, stage, precision):
    with_nan, _, without = runs[stage, precision]
    found = [each | {"norms": [norm for norm in each["norms"] if norm == norm]} for each in with_nan]  # noqa: PLR0124
    found = alike(found)
    assert found["outcomes"] == ["taken"] * 3 + ["skipped"] + ["taken"] * 6
    assert found["skipped"] == (1, 1)  # as the engine counts, and as the guard does
    assert found["norms"] == alike(without)["norms"]
    for name in ("weights", "rate"):
        assert found[name] == without[0][name], name
    # what the forward pass of the skipped batch has written is put back, on each rank
    assert [each["largest"] for each in with_nan] == [each["largest"] for each in without]


@pytest.mark.parametrize(("stage", "precision"), CELLS)
def test_a_spike_is_skipped_although_it_is_finite(runs, stage, precision):
    _, spike, without = runs[stage, precision]
    found = alike(spike)
    assert found["outcomes"][3] == "skipped"
    assert found["skipped"] == (1, 1)
    same_run(found, alike(without))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("network", ["SmallFirst", "SeldomUsed"])
@pytest.mark.parametrize("factors", [NAN_ON_RANK_1, SPIKE], ids=["nan", "spike"])
def test_a_skip_leaves_nothing_in_the_buffers_of_the_engine(train, stage, network, factors):
    from tests.helpers import deepspeed

    options = {"network": getattr(deepspeed, network), "steps": 10}
    callbacks = [NonFiniteGuard(skip_above=1000.0), GradientClipping(3.0)]
    bad, without = train(2, cell(stage, callbacks, factors=factors, **options), cell(stage, callbacks, left_out=(3,), **options))
    assert bad[0]["outcomes"] == ["taken"] * 3 + ["skipped"] + ["taken"] * 6
    assert bad[0]["skipped"] == (1, 1)
    assert bad[0]["weights"] == bad[1]["weights"] == without[0]["weights"]


def test_the_engine_looks_for_overflows_as_before_after_a_skip_in_the_last_step(train):
    config = {"bf16": {"enabled": True, "check_grad_overflow": False}}
    options = {"precision": "bf16-mixed", "factors": {(1, 4): math.nan}, "steps": 5, "config": config}
    ((found, _),) = train(2, cell(2, [NonFiniteGuard()], **options))
    assert found["outcomes"][-1] == "skipped"
    assert found["checks_overflow"] is False


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_window_with_a_bad_micro_batch(train, stage):
    options = {"precision": "bf16-mixed", "window": 3, "steps": 6}
    bad, without = train(
        2,
        cell(stage, [NonFiniteGuard()], factors={(1, 4): math.nan}, **options),
        cell(stage, [NonFiniteGuard()], left_out=(3, 4, 5), **options),
    )
    assert bad[0]["outcomes"] == ["taken", "skipped", "taken", "taken", "taken", "taken"]
    assert bad[0]["weights"] == bad[1]["weights"] == alike(without)["weights"]


@pytest.mark.parametrize("stage", [1, 3])
def test_zeroed_and_raised(train, stage):
    zeroed, raised = train(
        2,
        cell(stage, [NonFiniteGuard("zero")], factors=NAN_ON_RANK_1, steps=6),
        cell(stage, [NonFiniteGuard("raise")], factors=NAN_ON_RANK_1, steps=6),
    )
    assert alike(zeroed[:1])["outcomes"][3] == "zeroed"
    assert zeroed[0]["skipped"][0] == 0
    assert all(math.isfinite(weight) for weight in zeroed[0]["weights"])
    assert all(text.startswith("NonFiniteGradientError: ") for text in raised), raised


def test_journal_and_bundle(train, tmp_path):
    guard = NonFiniteGuard(bundles=Bundles(tmp_path / "bad"))
    ((found, _),) = train(2, cell(2, [guard], factors=NAN_ON_RANK_1, steps=6, default_root_dir=str(tmp_path), logger=True))
    assert not isinstance(found, str), found
    (line,) = [json.loads(line) for each in tmp_path.rglob("nonfinite_steps.jsonl") for line in each.read_text().splitlines()]
    assert line["stage"] == "loss"
    assert line["guilty_ranks"] == [1]
    assert {tensor["name"] for tensor in line["gradients"]} == {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"}
    assert list((tmp_path / "bad").iterdir())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_rehearsal(train, stage):
    cells = [
        cell(stage, [NonFiniteGuard(skip_above=1000.0), FaultInjection(kind, step=2)], steps=5) for kind in ("nan", "spike", "loss")
    ]
    for results in train(1, *cells):
        assert results[0]["outcomes"] == ["taken", "taken", "skipped", "taken", "taken"]


def test_too_many_in_a_row(train):
    factors = {(1, number): math.nan for number in range(2, 8)}
    (texts,) = train(2, cell(2, [NonFiniteGuard(max_consecutive=3)], factors=factors, steps=10))
    assert all(text.startswith("NonFiniteGradientError: ") for text in texts), texts
