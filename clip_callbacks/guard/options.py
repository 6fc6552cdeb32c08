"""What a NonFiniteGuard is told, checked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from clip_callbacks.core.arguments import as_choice, as_count, as_finite
from clip_callbacks.core.limits import Limit, as_limit
from clip_callbacks.core.nonfinite import Policy, as_policy

Level: TypeAlias = Literal["window", "microbatch"]
OnStreak: TypeAlias = Literal["raise", "rollback"]
Weights: TypeAlias = Literal["none", "reference", "full"]

EVERY, MAX_ROLLBACKS, LR_FACTOR = 100, 3, 1.0
"""Defaults of what matters with rollbacks only."""


@dataclass(frozen=True)
class GuardOptions:
    """The arguments of :class:`~clip_callbacks.NonFiniteGuard`, which documents them, and whether this is a learning-rate search.

    Raises:
        ValueError: If one is out of its range, or does not go with another one.
    """

    policy: Policy = "skip"
    max_consecutive: int = 10
    level: Level = "window"
    restore_buffers: bool = True
    hold_schedulers: bool = True
    trace_forward: bool = False
    deferred: bool | None = None
    skip_above: float | Limit | None = None
    bundle_dir: Path | None = None
    weights: Weights = "reference"
    max_bundles: int = 20
    max_bundle_bytes: float = 2e9
    on_streak: OnStreak = "raise"
    every: int = EVERY
    max_rollbacks: int = MAX_ROLLBACKS
    lr_factor: float = LR_FACTOR
    in_search: bool = False

    def __post_init__(self) -> None:
        """Check every argument, and what goes together."""
        as_policy(self.policy, "policy")
        as_choice(self.level, "level", get_args(Level))
        as_choice(self.weights, "weights", get_args(Weights))
        as_choice(self.on_streak, "on_streak", get_args(OnStreak))
        for argument in ("max_consecutive", "max_bundles", "every", "max_rollbacks"):
            as_count(getattr(self, argument), argument, least=1)
        object.__setattr__(self, "lr_factor", as_finite(self.lr_factor, "lr_factor", high=1.0, high_too=True))
        if not self.max_bundle_bytes > 0:
            raise ValueError(f"`max_bundle_bytes` must be above 0, got {self.max_bundle_bytes!r}.")
        self._check_together()
        if self.skip_above is not None:
            object.__setattr__(self, "skip_above", as_limit(self.skip_above, "skip_above"))

    def _check_together(self) -> None:
        if self.level == "microbatch" and self.policy != "skip":
            raise ValueError(
                f'`level` must be "window" for the policy {self.policy!r}, got "microbatch": only skipping drops anything.'
            )
        if self.skip_above is not None and self.policy != "skip":
            raise ValueError(
                f'`skip_above` must be None for the policy {self.policy!r}, got {self.skip_above!r}: use the policy "skip".'
            )
        if self.rolls_back and self.policy in {"raise", "ignore"}:
            raise ValueError(
                f'`on_streak` must be "raise" for the policy {self.policy!r}, got "rollback": no streak comes to its end there. '
                'Use the policy "skip" or "zero".'
            )
        for argument, default in (("every", EVERY), ("max_rollbacks", MAX_ROLLBACKS), ("lr_factor", LR_FACTOR)):
            value = getattr(self, argument)
            if not self.rolls_back and value != default:
                raise ValueError(
                    f'`{argument}` must be left at {default} without rollbacks, got {value!r}: set on_streak="rollback".'
                )

    def for_search(self) -> GuardOptions:
        """The options for a search for the learning rate, which is to go on whatever comes: bad steps are skipped without a word.

        Schedules do not stand still, since that of the search is what it is about, and nothing is left behind.
        """
        policy: Policy = "skip" if self.policy == "raise" else self.policy
        return GuardOptions(
            policy,
            level=self.level,
            restore_buffers=self.restore_buffers,
            hold_schedulers=False,
            deferred=self.deferred,
            skip_above=self.skip_above,
            in_search=True,
        )

    @property
    def ceiling(self) -> Limit | None:
        """The norm above which a finite step is skipped, as a limit."""
        assert self.skip_above is None or isinstance(self.skip_above, Limit), "made one at the beginning"
        return self.skip_above

    @cached_property
    def rolls_back(self) -> bool:
        """Whether a streak of bad steps ends in a return to earlier weights."""
        return self.on_streak == "rollback"

    @property
    def writes_all_weights(self) -> bool:
        """Whether bundles hold all weights."""
        return self.bundle_dir is not None and self.weights == "full"

    @property
    def drops_micro_batches(self) -> bool:
        """Whether bad micro-batches are dropped from their window."""
        return self.level == "microbatch"
