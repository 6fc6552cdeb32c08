"""What every rank must say alike, and what it must have in common with one process."""

from __future__ import annotations

import torch

from tests.helpers import parallel
from tests.helpers.parallel import STRATEGIES
from tests.helpers.training import assert_same_bits

DIVIDED = [name for name, (ranks, _, _) in STRATEGIES.items() if ranks > 1]
DROPS_MICRO_BATCHES = {name for name in DIVIDED if name.startswith("ddp")}
CARRIES = {name for name in DIVIDED if name != "tp"}


def nothing(name):
    """The processes are there."""


def assert_one_answer(results):
    """The same bits on every rank."""
    for other in results[1:]:
        assert_same_bits(results[0]["weights"], other["weights"])
        assert str(results[0]["norms"]) == str(other["norms"])
        assert results[0]["coefficients"] == other["coefficients"]
        torch.testing.assert_close(results[0]["states"], other["states"], rtol=0, atol=0)
    return results[0]


def assert_same_run(ours, single):
    torch.testing.assert_close(ours["weights"], single["weights"])
    for what in ("norms", "coefficients"):
        torch.testing.assert_close(torch.tensor(ours[what]), torch.tensor(single[what]))


def reports(name, *callbacks, **options):
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parallel.result(name, *callbacks, **options)
    return [str(warning.message) for warning in caught]


KINDS = ("ddp", "fsdp2", "fsdp1", "tp")
"""Each way of dividing a network once; the other strategies are variants or compounds of these, most of them on four ranks."""


def is_variant(name, *_):
    """Whether a strategy takes no part in the widest matrices of the fast suite, but in those of one axis only."""
    return name not in KINDS
