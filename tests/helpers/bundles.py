"""Guards that write bundles, and the bundles that they wrote."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch.utils.data import DataLoader

from clip_callbacks import Bundles, NonFiniteGuard
from clip_callbacks.bundles.bundle import Bundle
from tests.helpers.training import Poisoned, data

NAN = math.nan


class Pair(NamedTuple):
    inputs: torch.Tensor
    targets: torch.Tensor


def bundles_in(folder):
    return [Bundle.read(path) for path in sorted(folder.iterdir())]


def guard_to(folder, *, weights="reference", max_count=20, max_bytes=2e9, **options):
    bundles = Bundles(folder / "bad", weights=weights, max_count=max_count, max_bytes=max_bytes)
    return NonFiniteGuard(bundles=bundles, **options)


def loader_of(*batches):
    return DataLoader(list(batches), batch_size=None, collate_fn=lambda batch: batch)


@pytest.fixture
def bundle(trainer, tmp_path):
    trainer(guard_to(tmp_path, weights="full")).fit(Poisoned({1: NAN}), data(3))
    (bundle,) = bundles_in(tmp_path / "bad")
    return bundle
