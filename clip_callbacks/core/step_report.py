"""The public report of one optimizer step."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from clip_callbacks.core.actions import StepOutcome
from clip_callbacks.core.decisions import Outcome
from clip_callbacks.core.step_record import StepRecord


class StepReport:
    """The norms of one optimizer step, and what was decided and done about its gradients.

    :func:`~clip_callbacks.clip_step` returns it, and every callback but FaultInjection has that of the last step as
    ``last_report``. Norms are those of the true gradients: after the accumulation scale, without the loss scale. Norms, limits and
    coefficients are float tensors on the CPU, or, of a deferred step, on the device of the gradients, where reading them is a host
    sync. Float64 appears where gradients have it, or where float32 could not hold a norm.

    Two reports are equal if they are reports of the same step.

    Args:
        record: The engine's record of the step. Reports are made by the package; nobody else needs the argument.

    Example::

        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> report, state = clip_step([weight], max_norm=1.0)
        >>> report.outcome == "taken", report.total_norm, report.clipped_norm
        (True, tensor(5.), tensor(1.0000))
    """

    __slots__ = ("__weakref__", "_record")

    def __init__(self, record: StepRecord) -> None:
        """Show users a record of the engine."""
        self._record = record

    @property
    def outcome(self) -> StepOutcome:
        """The outcome of the step, which compares with strings.

        "taken" with finite gradients; "ignored": taken with non-finite gradients or of a non-finite loss; "zeroed": taken after
        non-finite entries were set to 0; "skipped"; "overflowed": skipped by the GradScaler; "pending": a deferred step, which the
        host has not read.
        """
        return self._record.outcome

    @property
    def skipped(self) -> Tensor:
        """Whether the optimizer changes nothing at this step, 0-dim bool tensor."""
        return self._record.skipped

    @property
    def total_norm(self) -> Tensor:
        """Norm of all gradients before clipping, 0-dim tensor; non-finite if a gradient is."""
        return self._record.total_norm

    @property
    def clipped_norm(self) -> Tensor:
        """Norm of all gradients after norm clipping and before ``clip_value`` clamps entries, 0-dim tensor."""
        return self._record.clipped_norm

    @property
    def clip_coef(self) -> Tensor:
        """Ratio clipped_norm / total_norm, 0-dim tensor; for one global rule min(1, max_norm / (total_norm + 1e-6))."""
        return self._record.clip_coef

    @property
    def max_norm(self) -> Tensor:
        """Limit of the first rule, 0-dim tensor; the lowest one if its blocks have several, inf without a limit."""
        return self._record.max_norm

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the B blocks: those of the first rule, then those of the second, and so on."""
        return self._record.names

    @property
    def norms(self) -> Tensor:
        """Norms of the blocks before their rule and after the rules before it, shape ``(B,)``."""
        return self._record.norms

    @property
    def limits(self) -> Tensor:
        """Limits of the blocks, shape ``(B,)``; inf where there is none."""
        return self._record.limits

    @property
    def coefficients(self) -> Tensor:
        """Coefficients of the blocks, shape ``(B,)``, in [0, 1]; 1 where nothing is clipped."""
        return self._record.coefficients

    @property
    def shadows(self) -> tuple[Outcome, ...]:
        """Decisions of the shadow rules, in order, each with ``names``, ``norms``, ``limits`` and ``coefficients`` of its blocks.

        Empty if the step was skipped.
        """
        # one coefficient for all gradients is 0-dim in the engine
        return tuple(replace(shadow, coefficients=shadow.coefficients.reshape(-1)) for shadow in self._record.shadows)

    def metrics(self) -> dict[str, Tensor]:
        """Return the values of this step to log, 0-dim tensors under the names that the callbacks use; only finite values.

        ``grad/total_norm``, ``grad/clipped_norm``, ``grad/clip_coef`` and ``grad/max_norm``; and, of each rule with a name,
        ``grad/<name>/total_norm``, ``grad/<name>/max_norm`` and ``grad/<name>/clip_coef``. Empty if the total norm is not finite.
        """
        metrics = self._record.metrics()
        if metrics:
            # a rule without a limit so far, as in a warm-up, has inf, which not every logger takes
            metrics |= {name: value for name, value in self._record.rule_metrics().items() if value.isfinite()}
        return metrics

    def __eq__(self, other: object) -> bool:
        """Whether both are reports of the same step."""
        # by identity: to compare tensors would read them, and of a deferred step wait for the device
        return isinstance(other, StepReport) and self._record is other._record

    def __hash__(self) -> int:
        """Hash of the step."""
        return hash(self._record)

    def __repr__(self) -> str:
        """The outcome and the two numbers that are asked for most."""
        return f"StepReport({self.outcome}, total_norm={self.total_norm!r}, clip_coef={self.clip_coef!r})"
