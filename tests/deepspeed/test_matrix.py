"""Every stage of ZeRO, in float32 and bf16, on one rank and two, with windows of one and three: as in one process by Lightning."""

from __future__ import annotations

from itertools import product

import pytest

from clip_callbacks import AccumulationRescaling, GradientClipping
from tests.deepspeed.conftest import alike, assert_close, cell

BF16 = {"rtol": 5e-2, "atol": 1e-5}
"""Ranks and micro-batches are added up in bf16, whose numbers have 8 bits: three roundings of 0.4 % in each gradient, and 20 steps.

On one rank without accumulation there are none, and all is as in float32.
"""

BF16_WEIGHTS = {"rtol": 2**-7, "atol": 2e-3}
"""One digit of the copies in bf16, and a fifth of one step of AdamW."""

CELLS = list(product((1, 2, 3), ("32-true", "bf16-mixed"), (1, 3)))


@pytest.fixture(scope="module")
def trainings(train):
    def on(world_size):
        if world_size not in found:
            cells = [
                cell(stage, [GradientClipping(3.0), AccumulationRescaling()], precision=precision, window=window)
                for stage, precision, window in CELLS
            ]
            found[world_size] = dict(zip(CELLS, train(world_size, *cells), strict=True))
        return found[world_size]

    found = {}
    return on


@pytest.fixture(scope="module")
def references():
    def of(precision, window):
        from tests.helpers.deepspeed import plain

        if (precision, window) not in found:
            found[precision, window] = plain(precision, window)
        return found[precision, window]

    found = {}
    return of


@pytest.mark.parametrize(("stage", "precision", "window"), CELLS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_twenty_clipped_steps(trainings, references, world_size, stage, precision, window):
    norms, coefficients, weights = references(precision, window)
    results = trainings(world_size)[stage, precision, window]
    found = alike(results)
    assert len(found["norms"]) == 20
    assert sum(coefficient < 1.0 for coefficient in coefficients) > 10
    is_exact = "bf16" not in precision or (world_size, window) == (1, 1)
    tolerance = {} if is_exact else BF16
    assert_close(found["norms"], norms, **tolerance)
    assert_close(found["coefficients"], coefficients, **tolerance)
    assert_close(found["weights"], weights, **({} if is_exact else BF16_WEIGHTS))
    # which the engine measures once more, after the clip
    assert_close(found["engine"], norms[-1] * coefficients[-1], **tolerance)
