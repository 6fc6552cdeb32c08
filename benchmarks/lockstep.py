"""Fits that advance in turns, in one process and one thread, so that whatever disturbs the machine disturbs all of them alike.

Each fit runs in a greenlet, whose callback hands control back in the middle of the fit, at a hook of Lightning. Fits that run one
after the other differ by more than what a callback costs: the speed of a shared machine drifts within seconds.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from random import Random
from statistics import median, quantiles
from typing import Any

import greenlet
from lightning.pytorch import Callback, Trainer

WARM_UP = 50
"""Steps at the beginning of a fit that do not count; of a shorter fit half of them."""

BLOCK = 50
"""Steps whose mean time is one observation: as many as lie between two logging steps, so that each block has one."""

BLOCKS = 8
"""Observations of a run that is too short for as many blocks of that size: its blocks are shorter, and few have a logging step."""


class Pause(Callback):
    """Hands control back to whoever resumed the fit, at each call of one hook.

    Args:
        hook: The name of the hook.
    """

    def __init__(self, hook: str) -> None:
        self.trainer: Trainer | None = None
        self.parent = greenlet.getcurrent()
        self.ended_s = self.resumed_s = 0.0
        setattr(self, hook, self._pause)

    def _pause(self, trainer: Trainer, *_: Any) -> None:
        self.ended_s = time.perf_counter()
        self.trainer = trainer
        self.parent.switch()
        self.resumed_s = time.perf_counter()


Fit = Callable[[Pause], object]
"""Trains to the end, with the callback as the last one of the Trainer."""


def seconds_per_step(fits: Mapping[str, Fit], steps: int) -> dict[str, list[float]]:
    """Seconds of each step of each fit, in lockstep, in a new order at each step; the first steps do not count.

    A step lasts from the beginning of a batch to the beginning of the next one: all that Lightning does is in it.

    Args:
        fits: The fits, each of at least ``steps + 1`` steps.
        steps: Steps to take.
    """
    gc.collect()  # a Trainer is full of cycles: those of earlier fits may hold gigabytes
    times: dict[str, list[float]] = {name: [] for name in fits}
    pauses = {name: Pause("on_train_batch_start") for name in fits}
    running = {name: greenlet.greenlet(lambda name=name: fits[name](pauses[name])) for name in fits}
    for each in running.values():
        each.switch()  # to the beginning of the first batch
    for step in range(steps):
        order = list(fits)
        Random(step).shuffle(order)  # what ran before, and what it left in the caches, is not always the same
        for name in order:
            running[name].switch()
            if step >= min(WARM_UP, steps // 2):
                times[name].append(pauses[name].ended_s - pauses[name].resumed_s)
    for name, each in running.items():
        _end(each, pauses[name])
    return times


def _end(fit: greenlet.greenlet, pause: Pause) -> None:
    """Let a fit run to its end."""
    assert pause.trainer is not None
    while not fit.dead:
        pause.trainer.should_stop = True
        fit.switch()


class PausedFit:
    """An endless fit that stops before and after the hooks for complete gradients, so that these can be timed by themselves.

    Args:
        fit: Trains with the two callbacks as the first and the last one of the Trainer.
    """

    def __init__(self, fit: Callable[[Pause, Pause], object]) -> None:
        self._first, self._last = Pause("on_before_optimizer_step"), Pause("on_before_optimizer_step")
        self._fit = greenlet.greenlet(lambda: fit(self._first, self._last))
        self._is_before_hooks = False

    def prepare(self) -> None:
        """Train on to just before the next hooks, unless the fit is there already."""
        if not self._is_before_hooks:
            self._fit.switch()
            self._is_before_hooks = True

    def __call__(self) -> None:
        """Run the hooks of one step."""
        self._fit.switch()
        self._is_before_hooks = False

    def end(self) -> None:
        """End the fit."""
        self.prepare()
        _end(self._fit, self._first)


def means_of_blocks(times: list[float]) -> list[float]:
    """Mean seconds of a step in each block of steps."""
    size = max(1, min(BLOCK, len(times) // BLOCKS))
    return [sum(times[start : start + size]) / size for start in range(0, len(times) - size + 1, size)]


class Added:
    """Time that something adds to a step, from fits in lockstep.

    Args:
        times: Seconds of each step of each fit.
        bare: The fit to which something is added.
    """

    def __init__(self, times: Mapping[str, list[float]], bare: str) -> None:
        blocks = {name: means_of_blocks(each) for name, each in times.items()}
        self.bare_s = median(blocks[bare])
        self._added = {name: [a - b for a, b in zip(each, blocks[bare], strict=True)] for name, each in blocks.items()}

    def seconds(self, name: str) -> float:
        """Seconds that it adds: the median of the blocks."""
        return median(self._added[name])

    def spread(self, name: str) -> tuple[float, float]:
        """The quartiles of the same."""
        lower, _, upper = quantiles(self._added[name], n=4)
        return lower, upper

    def ratio(self, name: str, reference: str) -> float:
        """The time that it adds, relative to what another fit adds."""
        return self.seconds(name) / self.seconds(reference)
