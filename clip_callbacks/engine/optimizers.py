"""The optimizers of a fit and their contexts, rebuilt when an optimizer takes other parameters or is replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch.optim import Optimizer

from clip_callbacks.accumulation.windows import Windows
from clip_callbacks.core.fused import detach_fused_factors
from clip_callbacks.engine.components import Components
from clip_callbacks.engine.deferred import DeferredSteps
from clip_callbacks.trainer.checks import CallbackFacts, check_optimizers
from clip_callbacks.trainer.grad_scaler import grad_scaler
from clip_callbacks.trainer.optimizer_context import OptimizerContext, make_contexts

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class Optimizers:
    """The optimizers of a fit, their contexts, and the parts that are attached to them.

    Args:
        trainer: The Trainer, after its optimizers were made.
        module: The module to train.
        components: The parts that take part in the fit.
        windows: The accumulation windows.
        deferred: The steps that are decided on the device.
        callbacks: Facts about the callbacks, for the checks.

    Attributes:
        contexts: The contexts of the optimizers.
        may_materialize: True if an optimizer holds parameters of lazy modules that have no shape yet.

    Raises:
        ValueError: If an option cannot work with these optimizers.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        components: Components,
        windows: Windows,
        deferred: DeferredSteps,
        callbacks: Sequence[CallbackFacts],
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._components = components
        self._windows = windows
        self._deferred = deferred
        self._facts = callbacks
        self.contexts = make_contexts(trainer, module, components.histories)
        for monitor in components.monitors:
            monitor.check(trainer, self.contexts)
        names = [name for name, _ in module.named_parameters()]
        self._attach(self.contexts, names, renewed=False)

    def find(self, optimizer: Optimizer) -> OptimizerContext | None:
        """Return the context of an optimizer; None if the optimizer is new."""
        for context in self.contexts:
            if context.optimizer is optimizer:
                return context
        return None

    @property
    def outdated(self) -> list[OptimizerContext]:
        """The contexts of optimizers that hold other parameters than before."""
        return [context for context in self.contexts if context.is_outdated]

    @property
    def materialized(self) -> list[OptimizerContext]:
        """The contexts with lazy parameters that a forward pass has given shapes."""
        return [context for context in self.contexts if context.has_materialized_parameters]

    def update_materialized(self) -> None:
        """Rebuild the tables of lazy parameters that have shapes now.

        The parameters are the same tensors as before, so that windows and saved states of the guard stay as they are.
        """
        if self.outdated:
            self.renew()
        materialized = self.materialized
        for context in materialized:
            context.rebuild_table(self._module)
        self._attach_parts_with_blocks(materialized, _parameter_names(materialized), renewed=True)
        for context in materialized:
            self._deferred.register(context)
        self._update_may_materialize()

    def _update_may_materialize(self) -> None:
        self.may_materialize = any(context.has_lazy_parameters for context in self.contexts)

    def renew(self) -> None:
        """Rebuild the tables of optimizers that hold other parameters than before."""
        outdated = self.outdated
        for context in outdated:
            context.rebuild_table(self._module)
        self._attach(outdated, _parameter_names(outdated), renewed=True)

    def replace_contexts(self, optimizer: Optimizer) -> OptimizerContext:
        """Make new contexts after optimizers of the Trainer were replaced in mid-fit; histories continue by number.

        Args:
            optimizer: The optimizer that has no context yet.

        Returns:
            The context of this optimizer.

        Raises:
            RuntimeError: If it is none of the Trainer's optimizers.
        """
        check_optimizers([optimizer], grad_scaler(self._trainer), self._facts)
        for context in self.contexts:
            detach_fused_factors(context.optimizer)  # factors for a step that the replaced optimizer will not take
        if not any(known is optimizer for known in self._trainer.optimizers):
            raise RuntimeError(
                f"`optimizer` must be one of trainer.optimizers, got a {type(optimizer).__name__} that is not. Return every "
                "optimizer from configure_optimizers."
            )
        before = {context.index: context for context in self.contexts}
        self.contexts = make_contexts(self._trainer, self._module, {})
        for context in self.contexts:
            if context.index in before:
                context.continue_history(before[context.index].history)
        self._attach(self.contexts, _parameter_names(self.contexts), renewed=True)
        return next(context for context in self.contexts if context.optimizer is optimizer)

    def _attach(self, changed: Sequence[OptimizerContext], names: Sequence[str], *, renewed: bool) -> None:
        """Attach all parts to the optimizers.

        Args:
            changed: The contexts of optimizers that are new, or hold other parameters.
            names: The names of parameters that patterns may match.
            renewed: True if the fit is under way.
        """
        self._attach_parts_with_blocks(changed, names, renewed=renewed)
        self._windows.attach(changed, self.contexts)
        self._components.guard.attach(self._module, self.contexts, (self._components.clipper,))
        # last: whether a step can be deferred depends on the parts
        for context in self.contexts:
            self._deferred.register(context)
        self._update_may_materialize()

    def _attach_parts_with_blocks(self, changed: Sequence[OptimizerContext], names: Sequence[str], *, renewed: bool) -> None:
        """Attach the parts that divide parameters into blocks; arguments are those of :meth:`_attach`."""
        self._components.clipper.attach(changed, names, renewed=renewed)
        for monitor in self._components.monitors:
            monitor.attach(changed, names, renewed=renewed)

    def detach(self) -> None:
        """Remove fused factors that no step has used from the optimizers."""
        for context in self.contexts:
            detach_fused_factors(context.optimizer)


def _parameter_names(contexts: Sequence[OptimizerContext]) -> list[str]:
    return [name for context in contexts for name in context.table.names]
