"""Where things are said that are no warnings: by the logger of the Trainer's Lightning, unless somebody asked for silence."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from clip_callbacks.trainer.compat import MODEL_SUMMARY, PACKAGES, is_of, package_of

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

SILENCED_BY = ("clip_callbacks", "lightning", *PACKAGES, *(f"{package}.utilities.rank_zero" for package in PACKAGES))
"""The loggers by which people silence this package or Lightning; whoever has silenced one of them wants to hear of none."""


def tell(trainer: Trainer, text: str) -> None:
    """Say something once, where Lightning says things.

    Not by ``rank_zero_info``, whose logger is that of the Lightning that was imported last.
    """
    if trainer.is_global_zero:
        _logger(trainer).info(text)


def is_silent(trainer: Trainer) -> bool:
    """Whether a Trainer was told to show nothing, or Lightning to say nothing."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    shows_summary = any(is_of(callback, MODEL_SUMMARY) for callback in callbacks)
    if not (trainer.loggers or trainer.progress_bar_callback or shows_summary):
        return True
    known = logging.root.manager.loggerDict  # to get a logger would make it
    found = [logger for logger in map(known.get, SILENCED_BY) if isinstance(logger, logging.Logger)]
    return not _logger(trainer).isEnabledFor(logging.INFO) or any(it.level > logging.INFO or it.disabled for it in found)


def _logger(trainer: Trainer) -> logging.Logger:
    return logging.getLogger(f"{package_of(trainer)}.utilities.rank_zero")
