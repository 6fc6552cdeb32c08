"""What the bars really show: rendered by tqdm and by Rich, on their way to a terminal."""

from __future__ import annotations

import io
import re

import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from clip_callbacks import GradientClipping, GradientNormMonitor
from tests.helpers.training import GradientTape, TwoNetworks, data

FEED = torch.tensor([[3.0, 4.0], [0.3, 0.4], [30.0, 40.0]])


class Terminal(io.StringIO):
    """Takes what is written as a terminal would."""

    def isatty(self):
        return True


class RecordedRich(RichProgressBar):
    """Rich's bar on a wide terminal of our own."""

    def __init__(self, screen):
        super().__init__(refresh_rate=1, console_kwargs={"file": screen, "force_terminal": True, "width": 200})
        self.screen = screen


def rendered(trainer, bar, module, *callbacks, loader=None, monkeypatch=None, **options):
    """The text of every refresh, without the codes that colour it."""
    screen = Terminal()
    if bar == "tqdm":
        monkeypatch.setattr("sys.stdout", screen)  # Lightning has tqdm write there
        monkeypatch.setattr("sys.stderr", screen)
    progress = TQDMProgressBar(refresh_rate=1) if bar == "tqdm" else RecordedRich(screen)
    trainer(*callbacks, progress, enable_progress_bar=True, **options).fit(module, loader)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())


def last_value(text, name):
    """The value beside a metric's name in its last refresh: ``name=5`` or ``name: 5``."""
    return re.findall(rf"{re.escape(name)}[=:]\s*(\S+?)[,\]\s]", text)[-1]


@pytest.mark.parametrize("bar", ["tqdm", "rich"])
def test_they_show_total_norm_and_clip_coef_of_the_last_step(trainer, bar, monkeypatch):
    text = rendered(trainer, bar, GradientTape(FEED), GradientClipping(1.0, prog_bar=True), monkeypatch=monkeypatch)
    assert last_value(text, "grad/total_norm") == "50"
    assert last_value(text, "grad/clip_coef") == "0.02"
    if bar == "tqdm":  # Rich draws so many times a second, not every step
        assert re.findall(r"grad/total_norm=(\S+), grad/clip_coef=([^\],]+)", text)[0] == ("5", "0.2")


@pytest.mark.parametrize("bar", ["tqdm", "rich"])
@pytest.mark.parametrize("callbacks", [[GradientClipping(1.0)], [GradientNormMonitor()]], ids=["clipping", "monitor"])
def test_they_show_nothing_unasked(trainer, bar, callbacks, monkeypatch):
    text = rendered(trainer, bar, GradientTape(FEED), *callbacks, monkeypatch=monkeypatch)
    assert "3/3" in text
    assert "grad" not in text


@pytest.mark.parametrize("bar", ["tqdm", "rich"])
def test_between_logging_steps_too(trainer, bar, monkeypatch):
    clipping = GradientClipping(1.0, prog_bar=True)
    text = rendered(trainer, bar, GradientTape(FEED), clipping, monkeypatch=monkeypatch, log_every_n_steps=50)
    assert last_value(text, "grad/total_norm") == "50"


@pytest.mark.parametrize("bar", ["tqdm", "rich"])
def test_each_of_several_optimizers(trainer, bar, monkeypatch):
    clipping = GradientClipping(1.0, prog_bar=True)
    text = rendered(trainer, bar, TwoNetworks(), clipping, loader=data(3), monkeypatch=monkeypatch)
    for suffix in ("-SGD", "-SGD-1"):
        assert float(last_value(text, f"grad/total_norm{suffix}")) > 0
