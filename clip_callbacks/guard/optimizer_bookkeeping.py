"""What an optimizer's own code changes in a skipped step, in which it is called without gradients.

Optimizers of ``torch.optim`` change nothing then; those of other packages may count steps, in their groups, in their state, or
on themselves. Groups and state are put back. What cannot be put back is told of at the first skip: by an error if it is a
parameter, for then a bad step has moved the model; by a warning if it is a large tensor of the state, or an attribute, for then
the model is as it was, and a run need not end at its first bad batch because later steps differ a little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from clip_callbacks.guard.contents import Contents, picture
from clip_callbacks.guard.resource import Resource, ResourceScope
from clip_callbacks.trainer.after_step import call_after_step
from clip_callbacks.trainer.compat import OPTIMIZABLE, is_instance
from clip_callbacks.trainer.fingerprints import fingerprint
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.step_context import StepContext

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

ELSEWHERE = frozenset(
    {"state", "param_groups", "defaults", "step", "grad_scale", "found_inf", "_step_count", "_opt_called"}
    | {"_zero_grad_profile_name", "_warned_capturable_if_run_uncaptured", "_need_device_dtype_check_for_fused"}
)
"""Attributes that are looked at elsewhere, or are not an optimizer's own: torch, its schedules and a GradScaler set them."""


def optimizer_bookkeeping(scope: ResourceScope) -> dict[int, Resource]:
    """Make the resource of each optimizer but LBFGS, which goes back to where its search began."""
    return {
        context.index: OptimizerBookkeeping(scope.trainer, context)
        for context in scope.contexts
        if not isinstance(context.optimizer, LBFGS)
    }


class OptimizerBookkeeping(Resource):
    """Undoes what an optimizer changes between the verdict on a step, which is within it, and its end.

    Args:
        trainer: The Trainer.
        context: The optimizer.
    """

    def __init__(self, trainer: Trainer, context: OptimizerContext) -> None:
        self._trainer = trainer
        self._context = context
        self._take_back: Callable[[], None] | None = None
        self._has_warned = False

    @override
    def commit(self, step: StepContext) -> None:
        if self._take_back:  # the skipped step before has raised
            self.detach()

    @override
    def abort_on_device(self, skipped: Tensor) -> None:
        self.detach()

    @override
    def abort(self, step: StepContext, *, is_called: bool) -> None:
        if self._take_back and not step.is_new:  # a closure that is called again in the same step
            return
        self.detach()
        if is_called:
            before = _Before(self._context)
            end = partial(self._end_step, before, has_moved=not step.is_new)
            self._take_back = call_after_step(self._trainer, self._context.optimizer, end)

    @override
    def abandon(self, step: StepContext, *, is_called: bool) -> None:
        self.abort(step, is_called=is_called)

    def _end_step(self, before: _Before, *, has_moved: bool) -> None:
        """See what the optimizer has changed.

        Args:
            before: The optimizer at the verdict.
            has_moved: Whether it had called its closure before, as SAM does, and may have left the parameters somewhere else.
        """
        self._take_back = None
        if not has_moved:
            before.check_parameters()
        changed = before.put_back()
        if changed and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"{type(self._context.optimizer).__name__} keeps something of its own that a skipped step has changed and that "
                f"cannot be put back: {', '.join(changed)}. Later steps may differ from those of a run without the bad batch. "
                "Use an optimizer that keeps such things in its param_groups or, in small tensors, in its state.",
                category=RuntimeWarning,
            )

    @override
    def detach(self) -> None:
        if self._take_back:
            self._take_back()
            self._take_back = None


class _Before:
    """An optimizer, and those that it wraps, when a step of it was found to be bad.

    Args:
        context: The optimizer.
    """

    def __init__(self, context: OptimizerContext) -> None:
        self._context = context
        self._fingerprints = [fingerprint(tensor) for tensor in context.table.tensors]
        self._each = _with_wrapped(context.optimizer)
        self._contents = Contents(without=(group["params"] for part in self._each.values() for group in part.param_groups))
        for part in self._each.values():
            self._contents.add("param_groups", part.param_groups)
            self._contents.add("state", part.state)
        self._pictures = _pictures(self._each)

    def check_parameters(self) -> None:
        """See that an optimizer without gradients has moved nothing.

        Raises:
            RuntimeError: If it has; it names the optimizer.
        """
        if [fingerprint(tensor) for tensor in self._context.table.tensors] != self._fingerprints:
            raise RuntimeError(
                "`optimizer` must leave parameters without a gradient alone, got "
                f"{type(self._context.optimizer).__name__}, which moved them in a skipped step: a bad step cannot be undone "
                "with it. Use an optimizer of torch.optim, or NonFiniteGuard('raise')."
            )

    def put_back(self) -> list[str]:
        """Put groups and state back.

        Returns:
            The names of what has changed and cannot be put back.
        """
        moved = [f"{name!r} in its state" for name in self._contents.put_back()]
        now = _pictures(self._each)
        names = sorted(self._pictures.keys() | now.keys())
        return moved + [name for name in names if self._pictures.get(name) != now.get(name)]


def _with_wrapped(optimizer: Optimizer) -> dict[str, Optimizer]:
    """An optimizer and those that its attributes hold, theirs too, by what stands before the names of their attributes."""
    found, known = {"": optimizer}, {id(optimizer)}
    waiting = [("", optimizer)]
    while waiting:
        prefix, outer = waiting.pop()
        for name, attribute in vars(outer).items():
            for inner in _optimizers_in(attribute):
                if id(inner) not in known:
                    known.add(id(inner))
                    path = f"{prefix}{name}.{len(known)}." if f"{prefix}{name}." in found else f"{prefix}{name}."
                    found[path] = inner
                    waiting.append((path, inner))
    return found


def _optimizers_in(attribute: Any) -> Iterable[Any]:
    if isinstance(attribute, dict):
        attribute = list(attribute.values())
    if not isinstance(attribute, (list, tuple)):
        attribute = [attribute]
    return [value for value in attribute if is_instance(value, OPTIMIZABLE)]


def _pictures(optimizers: dict[str, Optimizer]) -> dict[str, Any]:
    """Of all attributes of optimizers that are their own, by name."""
    return {
        f"{prefix}{name}": picture(value)
        for prefix, optimizer in optimizers.items()
        for name, value in vars(optimizer).items()
        if name not in ELSEWHERE and not name.startswith("_optimizer_") and not is_instance(value, OPTIMIZABLE)
    }
