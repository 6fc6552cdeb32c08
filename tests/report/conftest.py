"""Fixtures of the report's tests: one fit logged by every logger, and a page without plots."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from clip_callbacks import GradientClipping, GradientNormMonitor
from tests.helpers.mlflow_store import three_loggers
from tests.helpers.training import Poisoned, data


@pytest.fixture(scope="session")
def fitted(tmp_path_factory):
    """One fit with bad steps, in three loggers: to be read, or copied."""
    from tests.helpers.training import make_trainer

    folder = tmp_path_factory.mktemp("fit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        callbacks = [GradientClipping(0.5), GradientNormMonitor()]
        trainer = make_trainer(folder, *callbacks, logger=three_loggers(folder, "ours"), log_every_n_steps=2, max_epochs=3)
        trainer.fit(Poisoned({4: math.nan, 9: math.inf}), data(10))
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Leave the plots of a page blank: drawing them takes nearly all the time of a test that checks other parts of the page."""
    monkeypatch.setattr("clip_callbacks.html_report.rendering.Chart.svg", lambda chart, *, narrow: "")


@pytest.fixture
def drawn_wide(monkeypatch):
    """Draw the plots of a page in their wide form only, where a test asks whether they can be drawn at all."""
    from clip_callbacks.html_report.rendering import Chart

    svg = Chart.svg
    monkeypatch.setattr(Chart, "svg", lambda chart, *, narrow: "" if narrow else svg(chart, narrow=False))
