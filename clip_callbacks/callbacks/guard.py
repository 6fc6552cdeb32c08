"""NonFiniteGuard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from clip_callbacks.blocks import ParameterTable
from clip_callbacks.callbacks._member import Member
from clip_callbacks.callbacks._pass import Incident, Lane
from clip_callbacks.nonfinite import NonFiniteGradientError, Policy, as_policy

NEVER = -2
"""Not the number of a step, nor of the one before it."""


@dataclass
class Counters:
    """What the guard counts for one optimizer.

    Attributes:
        skipped: Steps skipped.
        zeroed: Steps taken after non-finite entries were set to 0.
        overflowed: Steps that a GradScaler skipped.
        streak: Bad steps in a row, up to ``last_bad``.
        last_bad: Number of the last bad step, counted over this optimizer's steps of the run; ``NEVER`` before the first.
    """

    skipped: int = 0
    zeroed: int = 0
    overflowed: int = 0
    streak: int = 0
    last_bad: int = NEVER


class NonFiniteGuard(Member):
    """Keeps NaN and Inf gradients from the weights.

    Under "skip" the gradients of a bad step become None, so that every optimizer of ``torch.optim`` leaves the parameters, its
    own state, step counters and weight decay as they are, bit for bit. ``global_step`` and the batch counter advance: Lightning
    owns them.

    Each bad step warns once: where and when, which parameters (with counts of NaN and inf), their nearest finite neighbours, and
    whether the loss or the parameters were non-finite before. The parameters are walked over on bad steps only.

    Under a GradScaler (16-mixed) an overflow is the scaler's business: it skips the step and lowers the scale. Such steps are
    counted apart (``overflowed_steps``) and raise nothing.

    Args:
        policy: "skip" the step; "raise" an error; "zero" the non-finite entries and take the step; "ignore" them and take the step.
        max_consecutive: After so many bad steps in a row an error is raised, on all ranks; at least 1.

    Raises:
        ValueError: If the policy is unknown or ``max_consecutive`` is below 1.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[NonFiniteGuard(max_consecutive=3)], logger=False, enable_checkpointing=False)
    """

    kind = "guard"

    def __init__(self, policy: Policy = "skip", *, max_consecutive: int = 10) -> None:
        super().__init__()
        self.policy = as_policy(policy, "policy")
        if not isinstance(max_consecutive, int) or max_consecutive < 1:
            raise ValueError(f"`max_consecutive` must be a whole number of at least 1, got {max_consecutive!r}.")
        self.max_consecutive = max_consecutive
        self._counters: dict[int, Counters] = {}

    @property
    def skipped_steps(self) -> int:
        """How many optimizer steps were skipped so far, over all optimizers."""
        return sum(counters.skipped for counters in self._counters.values())

    @property
    def zeroed_steps(self) -> int:
        """How many steps were taken after non-finite entries were set to 0."""
        return sum(counters.zeroed for counters in self._counters.values())

    @property
    def overflowed_steps(self) -> int:
        """How many steps a GradScaler skipped for an overflow."""
        return sum(counters.overflowed for counters in self._counters.values())

    def skipped_steps_of(self, index: int) -> int:
        """How many steps of one optimizer were skipped so far."""
        return self._counters[index].skipped

    def bind(self, lanes: Sequence[Lane], names: Sequence[str], *, renew: bool = False) -> None:
        """Have counters for each optimizer.

        Raises:
            ValueError: If restored counters are those of other optimizers.
        """
        super().bind(lanes, names, renew=renew)
        if not renew and not self._counters.keys() <= {lane.index for lane in lanes}:
            raise ValueError(
                "the checkpoint's state of NonFiniteGuard must fit the optimizers, "
                f"got counters of {len(self._counters)} for {len(lanes)}."
            )
        for lane in lanes:
            counters = self._counters.setdefault(lane.index, Counters())
            if counters.last_bad >= lane.history.steps:  # of an earlier fit
                counters.last_bad = NEVER

    def judge(self, incident: Incident, table: ParameterTable) -> Policy:
        """Decide on a step whose gradients are not finite, before anything is touched.

        Args:
            incident: Where and when.
            table: The parameters of the optimizer.

        Returns:
            The policy to follow.

        Raises:
            NonFiniteGradientError: If the policy is "raise", or this is one bad step too many in a row.
        """
        incident.happened = True
        counters = self._counters[incident.lane.index]
        is_counted = self._count(counters, incident)
        if incident.under_scaler:
            counters.overflowed += is_counted
            return "skip"
        if self.policy == "ignore":
            return "ignore"
        counters.skipped += is_counted and self.policy == "skip"
        counters.zeroed += is_counted and self.policy == "zero"
        self._speak(incident, counters.streak)
        return self.policy

    def _count(self, counters: Counters, incident: Incident) -> bool:
        """Count a bad step once, though its closure may run several times; whether it is counted now."""
        if incident.under_scaler:
            return incident.is_new
        number = incident.lane.history.steps + (0 if incident.is_new else -1)
        if number == counters.last_bad:
            return False
        counters.streak = counters.streak + 1 if counters.last_bad == number - 1 else 1
        counters.last_bad = number
        return True

    def _speak(self, incident: Incident, streak: int) -> None:
        what = f"Non-finite gradients at {incident}"
        found = incident.findings().describe()
        if self.policy == "raise":
            raise NonFiniteGradientError(f"{what}.\n{found}")
        if streak >= self.max_consecutive:
            raise NonFiniteGradientError(
                f"{what}: bad step {streak} in a row (max_consecutive={self.max_consecutive}).\n{found}\n"
                "Lower the learning rate, clip harder, or look at the stage named above."
            )
        done = "the step is skipped" if self.policy == "skip" else "non-finite entries become 0"
        rank_zero_warn(
            f"{what}: {done} (bad step {streak} in a row, {self.max_consecutive} stop the run).\n{found}", category=RuntimeWarning
        )

    def summary(self, lanes: Sequence[Lane]) -> list[str]:
        """One line if the run had bad steps."""
        steps = sum(lane.history.steps for lane in lanes)
        parts = [
            f"{count} {word}"
            for count, word in (
                (self.skipped_steps, "skipped"),
                (self.zeroed_steps, "taken with non-finite entries set to 0"),
                (self.overflowed_steps, "left out by the GradScaler"),
            )
            if count
        ]
        return [f"NonFiniteGuard: of {steps} optimizer steps, {', '.join(parts)}."] if parts else []

    def state_dict(self) -> dict[str, Any]:
        """The counters."""
        return super().state_dict() | {"counters": {index: asdict(counters) for index, counters in self._counters.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned.

        Raises:
            ValueError: If the state is not one of this callback.
        """
        super().load_state_dict(state_dict)
        self._counters = {int(index): Counters(**counters) for index, counters in state_dict["counters"].items()}
