"""Messages that are no warnings, such as the table at the end of a fit.

Trap: ``rank_zero_info`` of lightning_utilities logs to the Lightning that was imported last, which need not be the Trainer's; and
packages silence Lightning in three ways: by Trainer options, by the level of a logger, and by disabling a logger.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from clip_callbacks.trainer.compat import MODEL_SUMMARY, PACKAGES, is_instance, package_of

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

SILENCED_BY = ("clip_callbacks", "lightning", *PACKAGES, *(f"{package}.utilities.rank_zero" for package in PACKAGES))
"""Loggers by which users silence this package or Lightning. If one of them is silenced, nothing is logged."""


def log_message(trainer: Trainer, text: str) -> None:
    """Log a message on rank 0, with the logger of the Trainer's Lightning."""
    if trainer.is_global_zero:
        _logger(trainer).info(text)


def is_silent(trainer: Trainer) -> bool:
    """Return whether the Trainer shows nothing, or Lightning or this package is silenced."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    shows_summary = any(is_instance(callback, MODEL_SUMMARY) for callback in callbacks)
    if not (trainer.loggers or trainer.progress_bar_callback or shows_summary):
        return True
    known = logging.root.manager.loggerDict  # logging.getLogger would create the loggers that it is asked for
    found = [logger for logger in map(known.get, SILENCED_BY) if isinstance(logger, logging.Logger)]
    return not _logger(trainer).isEnabledFor(logging.INFO) or any(it.level > logging.INFO or it.disabled for it in found)


def _logger(trainer: Trainer) -> logging.Logger:
    return logging.getLogger(f"{package_of(trainer)}.utilities.rank_zero")
