"""Blocks that do not learn where ranks hold parts of the parameters: all ranks find the same ones, those of one process."""

from __future__ import annotations

import re
import warnings
from functools import lru_cache
from unittest import mock

import pytest

from clip_callbacks import GradientNormMonitor
from clip_callbacks.stats import vanishing
from tests.helpers import parallel
from tests.helpers.matrix import matrix
from tests.helpers.vanishing import SPANS, STEPS, WARNING, vanished


def divided(name, is_zero):
    """Train with an output of zeros in the middle, or with a learning rate at which some weights change; on ranks, too."""
    options = {"lr": 0.01 if is_zero else 3e-8}
    division = parallel.STRATEGIES[name][2]
    module = parallel.Divided(division, **options)
    if is_zero:
        make = module.configure_model

        def configure_model():
            make()
            module.net.up.register_forward_hook(lambda _module, _inputs, output: output * 0.0)

        module.configure_model = configure_model
    with mock.patch.multiple(vanishing, **SPANS), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit = parallel.train(name, GradientNormMonitor(), module=module, steps=STEPS)["trainer"]
    return vanished(fit), sum(bool(re.search(WARNING, str(each.message))) for each in caught)


@lru_cache
def of_one_process(is_zero):
    return divided("single", is_zero)[0]


@matrix(name=["ddp", "fsdp2", "fsdp1", "tp"], is_zero=[True, False])
def test_ranks_agree_and_rank_zero_warns(run, name, is_zero):
    (first, named), (second, silent) = run(name, is_zero, function=divided)
    assert first == second
    assert (named, silent) == (bool(first), 0)
    expected = of_one_process(is_zero)
    assert expected
    if is_zero and name == "fsdp1":
        assert not first, "zeros of FSDP1 may be those of a parameter that the loss does not use"
    else:
        # gradients differ in their last bits between strategies, and some weights are at the edge of a change
        assert first == pytest.approx(expected, abs=0.0 if is_zero else 0.1)
