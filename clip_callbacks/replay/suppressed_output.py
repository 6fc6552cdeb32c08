"""What a module, a script and Lightning say while something is run that is no run of the user's."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silenced() -> Iterator[list[warnings.WarningMessage]]:
    """What the module prints goes to stderr; Lightning says nothing of a run that is none; warnings are kept."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            yield said
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
