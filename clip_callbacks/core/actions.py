"""Actions on a measured step, and outcomes of a step."""

from __future__ import annotations

from enum import Enum

from typing_extensions import Self


class Action(Enum):
    """An instruction to :func:`~clip_callbacks.core.step.apply_step` about a measured step."""

    CLIP = "clip"
    """Clip to the limits, a spike too. Non-finite entries stay, and no limit takes a non-finite step into its state."""
    ZERO = "zero"
    """Set non-finite entries to 0, then clip."""
    SKIP = "skip"
    """Set all gradients to None, so that the optimizer changes nothing."""
    ON_DEVICE = "on_device"
    """Clip a deferred step, or skip it if its gradients are not finite or it is a spike. The device decides."""
    SKIP_SPIKE = "skip_spike"
    """Clip a deferred step, or skip it if it is a spike; non-finite gradients are taken as they are. The device decides."""


class StepOutcome(str, Enum):
    """The outcome of an optimizer step.

    A member equals its string (``outcome == "skipped"``), so that users compare it without importing this class.
    """

    TAKEN = "taken"
    """The step was taken, with finite gradients."""
    IGNORED = "ignored"
    """The step was taken although gradients or a loss were not finite."""
    ZEROED = "zeroed"
    """The step was taken after non-finite entries had been set to 0."""
    SKIPPED = "skipped"
    """The step was skipped: gradients or a loss were not finite, the norm was a spike, or its window had no usable micro-batch."""
    OVERFLOWED = "overflowed"
    """The GradScaler skipped the step, and lowers the loss scale."""
    PENDING = "pending"
    """The device decides about the step. The host learns the outcome at the next step."""

    # Otherwise messages and f-strings would show `StepOutcome.TAKEN`. enum.StrEnum does this too, from Python 3.11 on.
    __str__ = str.__str__

    is_skipped: bool
    """Whether the optimizer changed nothing."""

    def __new__(cls, value: str) -> Self:
        """Make a member."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.is_skipped = value in {"skipped", "overflowed"}
        return member
