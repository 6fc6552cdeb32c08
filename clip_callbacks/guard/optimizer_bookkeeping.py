"""Bookkeeping that an optimizer's own code changes in a skipped step, in which it is called without gradients.

Optimizers of ``torch.optim`` change nothing then. Those of other packages may count steps in their groups, in their state, or in
attributes. Groups and state are restored. At the first skip, what cannot be restored leads to an error or a warning. A parameter is
an error, because a bad step has moved the model. A large tensor of the state or an attribute is a warning: the model is as it was,
and a run need not end at its first bad batch because later steps differ a little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from clip_callbacks.guard.contents import Contents, comparable
from clip_callbacks.guard.resource import Resource, ResourceScope
from clip_callbacks.trainer.after_step import call_after_step
from clip_callbacks.trainer.compat import OPTIMIZABLE, is_instance
from clip_callbacks.trainer.fingerprints import fingerprint
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from clip_callbacks.trainer.step_context import StepContext

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

FOREIGN_ATTRIBUTES = frozenset(
    {"state", "param_groups", "defaults", "step", "grad_scale", "found_inf", "_step_count", "_opt_called"}
    | {"_zero_grad_profile_name", "_warned_capturable_if_run_uncaptured", "_need_device_dtype_check_for_fused"}
)
"""Attributes that are compared separately, or that torch, its schedules and a GradScaler set on every optimizer."""


def optimizer_bookkeeping(scope: ResourceScope) -> dict[int, Resource]:
    """Make the resource of each optimizer except LBFGS, which is restored as a whole."""
    return {
        context.index: OptimizerBookkeeping(scope.trainer, context)
        for context in scope.contexts
        if not isinstance(context.optimizer, LBFGS)
    }


class OptimizerBookkeeping(Resource):
    """Restores what an optimizer changes between the decision on a step, which falls within it, and its end.

    Args:
        trainer: The Trainer.
        context: The optimizer.
    """

    idle_until_skip = frozenset({"commit"})

    def __init__(self, trainer: Trainer, context: OptimizerContext) -> None:
        self._trainer = trainer
        self._context = context
        self._detach_hook: Callable[[], None] | None = None
        self._has_warned = False

    @override
    def commit(self, step: StepContext) -> None:
        if self._detach_hook:  # left over from a skipped step that has raised
            self.detach()

    @override
    def abort_on_device(self, skipped: Tensor) -> None:
        # Fused kernels of torch.optim skip by `found_inf`, and put their step counters back themselves.
        self.detach()

    @override
    def abort(self, step: StepContext, *, is_called: bool) -> None:
        # the copy from the first bad call stays
        if self._detach_hook and not step.is_new:  # the closure is called again within the same step
            return
        self.detach()
        if is_called:
            before = _OptimizerBefore(self._context)
            # Not a step hook of torch: one runs for each class whose `step` calls its parent's, and so in the middle of the step.
            end = partial(self._end_step, before, has_moved=not step.is_new)
            self._detach_hook = call_after_step(self._trainer, self._context.optimizer, end)

    @override
    def abandon(self, step: StepContext, *, is_called: bool) -> None:
        self.abort(step, is_called=is_called)

    def _end_step(self, before: _OptimizerBefore, *, has_moved: bool) -> None:
        """Restore what the optimizer has changed, and report what cannot be restored.

        Args:
            before: Copy of the optimizer from the decision on the step.
            has_moved: If True, the optimizer had called its closure before, as SAM does, and may have moved the parameters itself.
        """
        self._detach_hook = None
        # Otherwise the fingerprints are those between SAM's two passes, at weights that it has moved and moves back.
        if not has_moved:
            before.check_parameters()
        changed = before.restore()
        if changed and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"{type(self._context.optimizer).__name__} keeps something of its own that a skipped step has changed and that "
                f"cannot be restored: {', '.join(changed)}. Later steps may differ from those of a run without the bad batch. "
                "Use an optimizer that keeps such things in its param_groups or, in small tensors, in its state.",
                category=RuntimeWarning,
            )

    @override
    def detach(self) -> None:
        if self._detach_hook:
            self._detach_hook()
            self._detach_hook = None


class _OptimizerBefore:
    """Copy of an optimizer, and of those that it wraps, from the moment when a step was found to be bad.

    Args:
        context: The optimizer.
    """

    def __init__(self, context: OptimizerContext) -> None:
        self._context = context
        self._fingerprints = [fingerprint(tensor) for tensor in context.table.tensors]
        self._each = _with_wrapped(context.optimizer)
        # Parameters are left out: an optimizer that moves them without gradients is to be named by `check_parameters`, and
        # `restore` would hide it.
        self._contents = Contents(without=(group["params"] for part in self._each.values() for group in part.param_groups))
        for part in self._each.values():
            self._contents.add("param_groups", part.param_groups)
            self._contents.add("state", part.state)
        self._attributes = _attributes(self._each)

    def check_parameters(self) -> None:
        """Check that the optimizer has moved no parameter without gradients.

        Raises:
            RuntimeError: If it has.
        """
        if [fingerprint(tensor) for tensor in self._context.table.tensors] != self._fingerprints:
            raise RuntimeError(
                "`optimizer` must leave parameters without a gradient alone, got "
                f"{type(self._context.optimizer).__name__}, which moved them in a skipped step: a bad step cannot be skipped "
                "with it. Use an optimizer of torch.optim, or NonFiniteGuard('raise')."
            )

    def restore(self) -> list[str]:
        """Restore groups and state.

        Returns:
            The names of what has changed and cannot be restored.
        """
        moved = [f"{name!r} in its state" for name in self._contents.restore()]
        now = _attributes(self._each)
        names = sorted(self._attributes.keys() | now.keys())
        return moved + [name for name in names if self._attributes.get(name) != now.get(name)]


def _with_wrapped(optimizer: Optimizer) -> dict[str, Optimizer]:
    """Return an optimizer and those that its attributes hold, recursively, by the prefix of the names of their attributes."""
    found, known = {"": optimizer}, {id(optimizer)}
    waiting = [("", optimizer)]
    while waiting:
        prefix, outer = waiting.pop()
        for name, attribute in vars(outer).items():
            for inner in _optimizers_in(attribute):
                if id(inner) not in known:
                    known.add(id(inner))
                    path = f"{prefix}{name}."
                    if path in found:  # an attribute that holds several
                        path += f"{len(known)}."
                    found[path] = inner
                    waiting.append((path, inner))
    return found


def _optimizers_in(attribute: Any) -> Iterable[Any]:
    if isinstance(attribute, dict):
        attribute = list(attribute.values())
    if not isinstance(attribute, (list, tuple)):
        attribute = [attribute]
    return [value for value in attribute if is_instance(value, OPTIMIZABLE)]


def _attributes(optimizers: dict[str, Optimizer]) -> dict[str, Any]:
    """Return the optimizers' own attributes by name, in a form that can be compared later."""
    return {
        f"{prefix}{name}": comparable(value)
        for prefix, optimizer in optimizers.items()
        for name, value in vars(optimizer).items()
        # names that begin with "_optimizer_" are torch's dictionaries of hooks
        if name not in FOREIGN_ATTRIBUTES and not name.startswith("_optimizer_") and not is_instance(value, OPTIMIZABLE)
    }
