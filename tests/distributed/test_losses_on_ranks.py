"""NonFiniteGuard(loss_above=…) on several ranks: the loss is the mean over all of them, and all of them decide alike."""

from __future__ import annotations

import math

import pytest
import torch

from clip_callbacks import AccumulationRescaling, BatchSize, GradientClipping, NonFiniteGuard, RobustZScoreLimit
from tests.distributed.test_logs_and_checkpoints import counted
from tests.helpers import parallel
from tests.helpers.agreement import KINDS, assert_one_answer, is_variant
from tests.helpers.matrix import matrix
from tests.helpers.training import assert_same_bits

STEPS = 14
SPIKE = 12


def guarded(norm_type, **options):
    limit = RobustZScoreLimit(50.0, window=20, warmup=3, scale="linear")
    return NonFiniteGuard(loss_above=limit, **options), GradientClipping(0.5, norm_type=norm_type)


def lifted(name, norm_type, **options):
    """The loss of one batch is lifted on the last rank alone; its gradients are zero there."""
    poison = {(rank, SPIKE): "lifted" for rank in ((0, 1) if name == "tp" else (1,))}
    found = parallel.result(name, *guarded(norm_type), poison=poison, steps=STEPS, **options)
    return found | {"losses": found["metrics"]["grad/loss"]}


@matrix(
    lambda name, norm_type: norm_type == 2.0 or name == "fsdp2",  # the maximum takes another way through the collective
    slow=is_variant,
    name=[*KINDS, "fsdp2_offload"],
    norm_type=[2.0, math.inf],
)
def test_a_lifted_loss_on_one_rank_is_a_spike_for_all(run, name, norm_type):
    ours = assert_one_answer(run(name, norm_type, function=lifted))
    assert [step for step, skipped in enumerate(ours["skipped"]) if skipped] == [SPIKE]
    single = parallel.result("single", *guarded(norm_type), bad=(SPIKE,), steps=STEPS)
    torch.testing.assert_close(ours["weights"], single["weights"])
    torch.testing.assert_close(ours["losses"], single["metrics"]["grad/loss"])


def accumulated(name):
    callbacks = [NonFiniteGuard(loss_above=1e9), AccumulationRescaling(BatchSize())]
    return float(parallel.result(name, *callbacks, steps=4, accumulate_grad_batches=2)["metrics"]["grad/loss"])


def test_a_weighted_window_is_that_of_one_process(run):
    first, second = run("ddp", function=accumulated)
    assert first == second == pytest.approx(accumulated("single"), rel=1e-5)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_a_threshold_of_the_loss_takes_one_collective_at_most(run, name, norm_type):
    """That of the norms, where there is one."""
    assert run(name, *guarded(norm_type), function=counted, steps=4) == [[1] * 4] * 2


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_under_warn_a_bad_loss_of_one_rank_changes_nothing(run, name):
    """Its gradients are finite: they stay as they are, on all ranks."""
    poison = {(1, 2): "no gradient", (1, 3): "lifted"}
    ours = assert_one_answer(run(name, NonFiniteGuard("warn", loss_above=100.0), poison=poison, steps=6))
    theirs = assert_one_answer(run(name, GradientClipping(None, nonfinite="ignore"), poison=poison, steps=6))
    assert_same_bits(ours["weights"], theirs["weights"])
    assert ours["metrics"]["grad/spikes"] == 1
