"""All ranks go back together."""

from __future__ import annotations

import math

import pytest
import torch

from clip_callbacks import (
    GradientClipping,
    NonFiniteGuard,
    QuantileLimit,
)
from tests.helpers import parallel
from tests.helpers.agreement import is_variant
from tests.helpers.matrix import matrix
from tests.helpers.members import O
from tests.helpers.rollback import BAD, LOST, rollback

pytestmark = pytest.mark.filterwarnings(
    "ignore:Non-finite gradients:RuntimeWarning",
    "ignore:Spike:RuntimeWarning",
    "ignore:Every micro-batch:RuntimeWarning",
    "ignore:.*lr_scheduler.step.*:UserWarning",
)


# On several ranks

STEPS = 14


def on_ranks(name, options):
    """Rank 1 is bad at steps 5 to 7; and the run without batches 3 to 7."""
    guard = rollback()
    poison = {(1, number): math.nan for number in BAD}
    ours = parallel.train(
        name, guard, GradientClipping(QuantileLimit(0.5, window=5, warmup=2)), steps=STEPS, poison=poison, **options
    )
    family = [NonFiniteGuard(), GradientClipping(QuantileLimit(0.5, window=5, warmup=2))]
    clean = parallel.train(name, *family, steps=STEPS, bad=sorted(LOST), **options)
    same_state = [
        bool((a.full_tensor() if hasattr(a, "full_tensor") else a).equal(b.full_tensor() if hasattr(b, "full_tensor") else b))
        for one, two in zip(*([*run["trainer"].optimizers[0].state.values()] for run in (ours, clean)), strict=True)
        for a, b in zip(one.values(), two.values(), strict=True)
    ]
    return {
        "rollbacks": guard.rollbacks,
        "skipped": guard.skipped_steps,
        "weights": all(torch.equal(a, b) for a, b in zip(ours["weights"], clean["weights"], strict=True)),
        "state": all(same_state) and len(same_state) > 0,
        "norms": ours["norms"][8:] == clean["norms"][3:],
    }


@matrix(
    slow=is_variant,
    name=["ddp", "fsdp2", "fsdp2_offload", "fsdp1", "tp"],
    options={"SGD": {"momentum": 0.9}, "AdamW": {"optimizer": O.AdamW, "fused": True, "lr": 0.02}},
)
def test_all_ranks_go_back_together(run, name, options):
    if name == "tp" and "fused" in options:
        pytest.skip("torch's fused optimizers take no DTensors beside plain tensors")
    for found in run(name, options, function=on_ranks):
        assert found == {"rollbacks": 1, "skipped": 3, "weights": True, "state": True, "norms": True}
