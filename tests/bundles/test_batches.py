"""Batches of all kinds in a bundle."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from clip_callbacks.bundles.bundle import UnusableBundleError
from tests.helpers.bundles import NAN, Pair, bundles_in, guard_to, loader_of
from tests.helpers.training import Poisoned, Regression, assert_same_bits, data

pytestmark = [
    pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Spike at:RuntimeWarning"),
]


class Views(Regression):
    """Takes batches of views of a large tensor, arrays and other objects."""

    def loss(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch["x"]), torch.as_tensor(batch["y"]))
        return loss * NAN if batch_idx == 1 else loss


def test_views_arrays_and_mappings_are_written_small_and_plain(trainer, tmp_path):
    large = torch.randn(100_000, 4)
    batches = [
        UserDict(x=large[i : i + 3], y=np.ones((3, 1), np.float32), n=np.float64(2.5), nested=[("a", {"b": large[5]})], none=None)
        for i in range(3)
    ]
    trainer(guard_to(tmp_path)).fit(Views(), loader_of(*batches))
    (bundle,) = bundles_in(tmp_path / "bad")
    assert (bundle.path / "batches.pt").stat().st_size < 40_000
    (row,) = bundle.micro_batches()
    batch = row["batch"]
    assert type(batch) is dict
    assert_same_bits([batch["x"], batch["nested"][0][1]["b"]], [large[1:4], large[5]])
    assert isinstance(batch["y"], np.ndarray)
    np.testing.assert_array_equal(batch["y"], np.ones((3, 1), np.float32))
    assert batch["n"] == 2.5
    assert isinstance(batch["n"], np.float64)
    assert batch["none"] is None


class Unsafe(Regression):
    def loss(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch.inputs), batch.targets) * NAN


def test_batches_of_unknown_classes_are_named_and_need_trust(trainer, tmp_path):
    batch = Pair(torch.ones(2, 4), torch.ones(2, 1))
    with pytest.warns(RuntimeWarning, match=r"objects of tests.helpers.bundles.Pair: a replay needs --trust"):
        trainer(guard_to(tmp_path)).fit(Unsafe(), loader_of(batch))
    (bundle,) = bundles_in(tmp_path / "bad")
    with pytest.raises(
        UnusableBundleError, match=r"could run code, of tests.helpers.bundles.Pair.*--trust tests.helpers.bundles.Pair"
    ):
        bundle.micro_batches()
    (row,) = bundle.micro_batches(trust=[Pair])
    assert_same_bits(list(row["batch"]), list(batch))


def test_a_batch_that_cannot_be_pickled_is_left_out_and_the_reason_told(trainer, tmp_path):
    batch = {"x": torch.ones(2, 4), "y": torch.full((2, 1), NAN), "lock": (i for i in range(3))}
    with pytest.warns(RuntimeWarning, match="batches.pt could not be written: cannot pickle 'generator'"):
        trainer(guard_to(tmp_path)).fit(Views(), loader_of(batch))
    (bundle,) = bundles_in(tmp_path / "bad")
    with pytest.raises(UnusableBundleError, match="holds no batches: cannot pickle 'generator' object"):
        bundle.micro_batches()


def test_a_batch_changed_in_place_is_told(trainer, tmp_path):
    class Changes(Poisoned):
        def loss(self, batch, batch_idx):
            batch[0].mul_(2)
            return super().loss(batch, batch_idx)

    with pytest.warns(RuntimeWarning, match="the step changed its batch in place"):
        trainer(guard_to(tmp_path)).fit(Changes({2: NAN}), data(4))
    trainer(guard_to(tmp_path)).fit(Poisoned({3: NAN}), data(4))
    changed, untouched = bundles_in(tmp_path / "bad")
    assert (changed.facts["batches"]["changed_in_place"], untouched.facts["batches"]["changed_in_place"]) == (True, False)


def test_arrays_in_named_tuples_come_back(trainer, tmp_path):
    batch = Pair(torch.ones(2, 4), np.ones((2, 1), np.float32))

    class Takes(Regression):
        def loss(self, batch, batch_idx):
            return nn.functional.mse_loss(self.net(batch.inputs), torch.as_tensor(batch.targets)) * NAN

    trainer(guard_to(tmp_path)).fit(Takes(), loader_of(batch))
    (row,) = bundles_in(tmp_path / "bad")[0].micro_batches(trust=[Pair])
    assert isinstance(row["batch"], Pair)
    np.testing.assert_array_equal(row["batch"].targets, batch.targets)


@dataclass
class Opaque:
    x: torch.Tensor


def test_views_in_named_tuples_are_written_small_and_those_in_other_objects_capped(trainer, tmp_path):
    large = torch.randn(1_000_000, 4)
    trainer(guard_to(tmp_path, max_bytes=1e5)).fit(Unsafe(), loader_of(Pair(large[:2], torch.ones(2, 1))))
    (bundle,) = bundles_in(tmp_path / "bad")
    assert (bundle.path / "batches.pt").stat().st_size < 20_000

    class Takes(Regression):
        def loss(self, batch, batch_idx):
            return self.net(batch.x).mean() * NAN

    with pytest.warns(UserWarning, match=r"a further bundle takes 16.0 MB \(max_bytes=100000\)"):
        trainer(guard_to(tmp_path, max_bytes=1e5)).fit(Takes(), loader_of(Opaque(large[:2])))
    assert len(bundles_in(tmp_path / "bad")) == 1


class Stubborn:
    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        raise self.error("not me")


@pytest.mark.parametrize("error", [RuntimeError, ValueError, NotImplementedError, KeyError])
def test_whatever_pickling_raises_costs_the_batch_alone(trainer, tmp_path, error):
    batch = {"x": torch.ones(2, 4), "y": torch.full((2, 1), NAN), "it": Stubborn(error)}
    trainer(guard_to(tmp_path)).fit(Views(), loader_of(batch))
    (bundle,) = bundles_in(tmp_path / "bad")
    assert "not me" in bundle.facts["missing"]["batches.pt"]
