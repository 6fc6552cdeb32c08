"""What is done about a step once it is measured, and what came of it."""

from __future__ import annotations

from enum import Enum


class Action(Enum):
    """What :func:`~clip_callbacks.core.step.apply_step` does about a step."""

    CLIP = "clip"
    """Hold the norms to their limits. Entries that are not finite stay, and no limit takes the step into its state."""
    ZERO = "zero"
    """Set entries that are not finite to 0, then clip."""
    SKIP = "skip"
    """Take the gradients away, so that the optimizer changes nothing."""
    ON_DEVICE = "on_device"
    """Clip a deferred step, or skip it if its gradients are not finite: the device decides, the host does not know yet."""


class StepOutcome(Enum):
    """What came of an optimizer step.

    Attributes:
        is_skipped: Whether the optimizer has changed nothing.
    """

    is_skipped: bool

    def __init__(self, value: str) -> None:
        """Note whether it is one of those that change nothing."""
        self.is_skipped = value in {"skipped", "overflowed"}

    TAKEN = "taken"
    """Taken, with finite gradients."""
    IGNORED = "ignored"
    """Taken with gradients, or of a loss, that are not finite."""
    ZEROED = "zeroed"
    """Taken after entries that were not finite had been set to 0."""
    SKIPPED = "skipped"
    """Not taken: gradients or a loss were not finite, the step was a spike, or no micro-batch of its window was left."""
    OVERFLOWED = "overflowed"
    """Not taken by the GradScaler, which lowers the loss scale."""
    PENDING = "pending"
    """Decided on the device; the host learns of it at the next step."""
