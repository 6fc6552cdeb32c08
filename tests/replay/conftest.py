"""A bundle of one bad step."""

from __future__ import annotations

import pytest

from tests.helpers.replaying import Net, fitted, samples


@pytest.fixture
def bad(trainer, tmp_path):
    inputs = samples()
    inputs[9, 3] = 0
    return fitted(trainer, tmp_path, Net("log"), inputs)
