"""When nothing is said at the end of a fit: it was short, a callback or the Trainer was told so, or Lightning was silenced."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch

from clip_callbacks import AccumulationRescaling, GradientClipping, GradientNormMonitor, NonFiniteGuard
from clip_callbacks.stats.run_history import RunHistory
from tests.helpers.twins import TWINS, regression

SWITCHES = ("logger", "enable_progress_bar", "enable_model_summary")
"""With all of them off a Trainer shows nothing."""
LOGGERS = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}
TABLE = "Gradients of the run:"


class Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())

    @property
    def ours(self):
        return [text for text in self.texts if text.startswith((TABLE, "GradientNormMonitor", "NonFiniteGuard"))]


@pytest.fixture
def heard(monkeypatch):
    """What Lightning's own loggers are given, by the name of the Lightning; they are as an import leaves them."""
    found = {}
    for name, logger in LOGGERS.items():
        monkeypatch.setattr(logging.getLogger(logger), "level", logging.INFO)
        logging.getLogger(logger).manager._clear_cache()
        found[name] = Heard()
        monkeypatch.setattr(logging.getLogger(f"{logger}.utilities.rank_zero"), "handlers", [found[name]])
    yield found
    monkeypatch.undo()
    logging.root.manager._clear_cache()


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr("clip_callbacks.publishing.summary.MIN_STEPS_FOR_TABLE", 3)


def fit(tmp_path, *callbacks, name="lightning", steps=3, poisoned=(), **options):
    package = TWINS[name]
    quiet = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    options = quiet | {"logger": package.loggers.logger.DummyLogger()} | options
    options = {key: value for key, value in options.items() if value is not None}
    trainer = package.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, default_root_dir=tmp_path, callbacks=[*callbacks], **options
    )
    inputs = torch.randn(steps, 4)
    trainer.fit(regression(package, poisoned), torch.utils.data.DataLoader(list(zip(inputs, inputs[:, :1], strict=True))))


@pytest.mark.parametrize("name", TWINS)
def test_a_run_of_a_hundred_steps_is_worth_a_table(tmp_path, heard, name):
    """It is said by the Lightning that the Trainer is of, whichever was imported last."""
    fit(tmp_path, GradientClipping(1.0), name=name, steps=100)
    (text,) = heard.pop(name).ours
    assert text.startswith(TABLE)
    assert [others.ours for others in heard.values()] == [[]]


def test_the_steps_of_an_earlier_fit_are_worth_none(tmp_path, heard):
    clipping = GradientClipping(1.0)
    clipping.load_state_dict(clipping.state_dict() | {"history": {0: RunHistory().state_dict() | {"steps": 1000}}})
    fit(tmp_path, clipping, steps=3)
    assert heard["lightning"].ours == []


def test_a_shorter_one_is_not_but_a_monitor_suggests_what_it_was_asked_for(tmp_path, heard):
    fit(tmp_path, GradientClipping(1.0), GradientNormMonitor(), steps=99)
    (text,) = heard["lightning"].ours
    assert text.startswith("GradientNormMonitor")


@pytest.mark.parametrize(
    "callbacks",
    [
        lambda: [GradientClipping(1.0, summary=False), GradientNormMonitor()],
        lambda: [GradientNormMonitor(summary=False), GradientClipping(1.0)],
        lambda: [NonFiniteGuard(summary=False), GradientClipping(1.0)],
        lambda: [AccumulationRescaling()],
    ],
    ids=["clipping", "monitor", "guard", "nobody asks for it"],
)
def test_one_callback_can_ask_for_silence(tmp_path, heard, brief, callbacks):
    fit(tmp_path, *callbacks())
    assert heard["lightning"].ours == []


@pytest.mark.parametrize("name", TWINS)
def test_a_trainer_that_shows_nothing_hears_nothing(tmp_path, heard, brief, name):
    fit(tmp_path, GradientClipping(1.0), GradientNormMonitor(), name=name, **dict.fromkeys(SWITCHES, False))
    barebones = dict.fromkeys([*SWITCHES, "enable_checkpointing"]) | {"barebones": True}
    fit(tmp_path, GradientClipping(1.0), GradientNormMonitor(), name=name, **barebones)
    assert heard[name].ours == []


@pytest.mark.parametrize("shown", SWITCHES)
def test_one_that_shows_anything_hears_all(tmp_path, heard, brief, shown):
    switches = dict.fromkeys(SWITCHES, False) | {shown: None if shown == "logger" else True}
    if shown == "logger":
        switches[shown] = TWINS["lightning"].loggers.CSVLogger(tmp_path)
    fit(tmp_path, GradientClipping(1.0), GradientNormMonitor(), **switches)
    assert [text.split(":")[0] for text in heard["lightning"].ours] == ["Gradients of the run", "GradientNormMonitor"]


@pytest.mark.parametrize(("name", "silenced"), [*itertools.product(TWINS, ("clip_callbacks", "lightning", *LOGGERS.values()))])
def test_who_silenced_us_or_either_lightning_silenced_us(tmp_path, heard, brief, monkeypatch, name, silenced):
    """A logger above it, the one it writes to, that of the other Lightning, or our own name."""
    monkeypatch.setattr(logging.getLogger(silenced), "level", logging.WARNING)
    logging.root.manager._clear_cache()
    fit(tmp_path, GradientClipping(1.0), GradientNormMonitor(), name=name)
    assert [each.ours for each in heard.values()] == [[], []]


def test_other_ways_to_silence_a_logger(tmp_path, heard, brief, monkeypatch):
    written = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    for logger, attribute, value in (
        (written, "level", logging.ERROR),
        (written, "disabled", True),
        (logging.getLogger("pytorch_lightning"), "disabled", True),
        (logging.getLogger("pytorch_lightning.utilities.rank_zero"), "level", logging.ERROR),
        (logging.root.manager, "disable", logging.INFO),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(logger, attribute, value)
            logging.root.manager._clear_cache()
            fit(tmp_path, GradientClipping(1.0))
    logging.root.manager._clear_cache()
    assert heard["lightning"].ours == []
    fit(tmp_path, GradientClipping(1.0))
    assert len(heard["lightning"].ours) == 1


def test_real_trouble_is_told_all_the_same(tmp_path, heard, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)
    with pytest.warns(RuntimeWarning, match="Non-finite"):
        fit(tmp_path, GradientClipping(1.0, summary=False), poisoned={1}, **dict.fromkeys(SWITCHES, False))
