"""A bundle of one bad step."""

from __future__ import annotations

import pytest
from lightning.pytorch.cli import LightningCLI

from tests.helpers.replaying import Net, fitted, samples


@pytest.fixture(autouse=True)
def _only_fit(monkeypatch):
    """Have LightningCLI offer the subcommand that replays use: it builds a parser for each. Scripts that tests start offer all."""
    offered = {"fit": LightningCLI.subcommands()["fit"]}
    monkeypatch.setattr(LightningCLI, "subcommands", staticmethod(lambda: offered))


@pytest.fixture
def bad(trainer, tmp_path):
    inputs = samples()
    inputs[9, 3] = 0
    return fitted(trainer, tmp_path, Net("log"), inputs)
