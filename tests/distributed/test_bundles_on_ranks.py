"""Bundles written by several ranks."""

from __future__ import annotations

import pytest

from tests.helpers import parallel
from tests.helpers.bundles import NAN, bundles_in, guard_to
from tests.helpers.ranks import RanksFailedError
from tests.helpers.training import assert_same_bits

pytestmark = [
    pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Spike at:RuntimeWarning"),
]


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "tp"])
def test_each_guilty_rank_writes_its_own_batch(run, tmp_path, name):
    run(name, guard_to(tmp_path), poison={(1, 3): NAN})
    (bundle,) = bundles_in(tmp_path / "bad")
    assert bundle.place == {"step": 3, "epoch": 0, "batch": 3, "rank": 1}
    assert bundle.facts["report"]["guilty_ranks"] == [1]
    (row,) = bundle.micro_batches()
    inputs, _ = row["batch"]
    share = parallel.BATCH // parallel.STRATEGIES[name][1]
    everything = parallel.rows(parallel.STEPS).tensors[0][3 * parallel.BATCH : 4 * parallel.BATCH]
    assert len(inputs) == share
    theirs = everything if name == "tp" else everything[1::2]
    assert_same_bits([inputs], [theirs])
    assert bool(row["loss"].isnan())


def test_every_rank_writes_when_nobody_knows_whose_fault_a_spike_is(run, tmp_path):
    run("ddp", guard_to(tmp_path, skip_above=1e4), poison={(1, 5): 1e9})
    assert [bundle.place["rank"] for bundle in bundles_in(tmp_path / "bad")] == [0, 1]


def test_full_weights_of_shards_are_refused(run, tmp_path):
    with pytest.raises(RanksFailedError, match="`weights` must be .reference. or .none. with sharded parameters"):
        run("fsdp2", guard_to(tmp_path, weights="full"))
