"""Fixtures of the tests of what is published."""

from __future__ import annotations

import pytest

from clip_callbacks.stats import vanishing
from tests.helpers.vanishing import SPANS


@pytest.fixture
def short_spans(monkeypatch):
    """Judge blocks after a few steps."""
    for name, value in SPANS.items():
        monkeypatch.setattr(vanishing, name, value)
