"""A bundle to read, and to tamper with."""

from __future__ import annotations

import pytest

from tests.helpers.bundles import NAN, bundles_in, guard_to
from tests.helpers.training import Poisoned, data


@pytest.fixture
def bundle(trainer, tmp_path):
    trainer(guard_to(tmp_path, weights="full")).fit(Poisoned({1: NAN}), data(3))
    (bundle,) = bundles_in(tmp_path / "bad")
    return bundle
