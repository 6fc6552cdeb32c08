"""What only the engine of DeepSpeed tells is refused when it has been made, before the first step."""

from __future__ import annotations

import pytest

from clip_callbacks import GradientClipping
from tests.deepspeed.conftest import cell
from tests.helpers.ranks import Ranks

BF16_OPTIMIZER = cell(1, [GradientClipping()], precision="bf16-mixed", config={"data_types": {"grad_accum_dtype": "fp32"}})


def test_the_optimizer_of_stage_1_with_sums_in_float32(train):
    (texts,) = train(1, BF16_OPTIMIZER)
    assert "ZeRO stage 1, 2 or 3, got BF16_Optimizer, which keeps gradients elsewhere" in texts[0]
    assert "`data_types.grad_accum_dtype`" in texts[0]


@pytest.mark.parametrize("stage", [2, 3])
def test_sums_in_float32_of_other_stages(train, stage):
    sums = {"data_types": {"grad_accum_dtype": "fp32"}}
    (found,) = train(2, cell(stage, [GradientClipping(3.0)], precision="bf16-mixed", window=3, config=sums, steps=4))
    assert not isinstance(found[0], str), found
    assert found[0]["weights"] == found[1]["weights"]


def test_another_version(pools):
    from tests.helpers import deepspeed

    texts = pools[1].run(deepspeed.with_an_attribute_less)
    assert "DeepSpeed must be of a version in which DeepSpeedZeroOptimizer has grad_start_offset, got 0." in texts[0]
    assert "Install deepspeed>=" in texts[0]


def test_autocast_to_float16():
    from tests.helpers import deepspeed

    config = {"torch_autocast": {"enabled": True, "dtype": "float16"}}
    ranks = Ranks(1)  # a process of its own, since DeepSpeed goes on with autocast in later fits
    try:
        (texts,) = ranks.run(deepspeed.each, [cell(stage, [GradientClipping()], config=config) for stage in (2, 3)])
    finally:
        ranks.close()
    assert all("`torch_autocast` must have the dtype bfloat16 in DeepSpeed's configuration" in text for text in texts)


@pytest.mark.parametrize(
    ("network", "text"),
    [
        ("WithMuon", "`optimizer` must leave gradients as they are until its step under DeepSpeed, got MuonWithAuxAdam"),
        ("WithExperts", "The module must have no experts of DeepSpeed (MoE) beside gradient callbacks"),
    ],
)
def test_networks(train, network, text):
    from tests.helpers import deepspeed

    (texts,) = train(1, cell(2, [GradientClipping()], network=getattr(deepspeed, network)))
    assert text in texts[0]
