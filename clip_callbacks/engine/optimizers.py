"""The optimizers of a fit and their contexts, rebuilt when an optimizer takes other parameters or is replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        collect_reports: Function that is called before a table changes: pending reports belong to the table before.

    Attributes:
        contexts: The contexts of the optimizers.
        may_materialize: True if an optimizer holds parameters without entries yet, such as those of lazy modules.

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
        collect_reports: Callable[[], None],
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._components = components
        self._windows = windows
        self._deferred = deferred
        self._facts = callbacks
        self._collect_reports = collect_reports
        self.contexts = make_contexts(trainer, module, components.histories, clips=components.clipper.clips)
        for monitor in components.monitors:
            monitor.check(trainer, self.contexts)
        names = [name for name, _ in module.named_parameters()]
        self._attach(self.contexts, names, renewed=False)

    def context_of(self, optimizer: Optimizer) -> OptimizerContext:
        """Return the context of an optimizer, up to date if the optimizer or its parameters have changed since the last step.

        Raises:
            RuntimeError: If it is none of the Trainer's optimizers.
        """
        if self.may_materialize:
            self.update_materialized()
        for context in self.contexts:
            if context.optimizer is optimizer:
                if context.is_outdated:
                    self._renew()
                return context
        # strategy.optimizers was replaced in mid-fit, as by setup_optimizers
        return self._replace_contexts(optimizer)

    def update(self) -> None:
        """Rebuild the tables of optimizers that hold other parameters than before, if there are any."""
        for context in self.contexts:
            if context.is_outdated:
                self._renew()

    def update_materialized(self) -> None:
        """Rebuild the tables of parameters that had no entries and have got some, as lazy ones do in a forward pass.

        The parameters are the same tensors as before, so that windows and saved states of the guard stay as they are.
        """
        if not any(context.has_materialized_parameters for context in self.contexts):
            return
        self.update()
        self._collect_reports()
        materialized = [context for context in self.contexts if context.has_materialized_parameters]
        for context in materialized:
            context.rebuild_table(self._module)
        self._attach_parts_with_blocks(materialized, _parameter_names(materialized), renewed=True)
        for context in materialized:
            self._deferred.register(context)
        self._update_may_materialize()

    def _update_may_materialize(self) -> None:
        self.may_materialize = any(context.has_lazy_parameters for context in self.contexts)

    def _renew(self) -> None:
        """Rebuild the tables of optimizers that hold other parameters than before."""
        self._collect_reports()
        outdated = [context for context in self.contexts if context.is_outdated]
        for context in outdated:
            context.rebuild_table(self._module)
        self._attach(outdated, _parameter_names(outdated), renewed=True)

    def _replace_contexts(self, optimizer: Optimizer) -> OptimizerContext:
        """Make new contexts after optimizers of the Trainer were replaced in mid-fit; histories continue by number.

        Args:
            optimizer: The optimizer that has no context yet.

        Returns:
            The context of this optimizer.
        """
        self._collect_reports()
        check_optimizers([optimizer], grad_scaler(self._trainer), self._facts)
        for context in self.contexts:
            detach_fused_factors(context.optimizer)  # factors for a step that the replaced optimizer will not take
        if not any(known is optimizer for known in self._trainer.optimizers):
            raise RuntimeError(
                f"`optimizer` must be one of trainer.optimizers, got a {type(optimizer).__name__} that is not. Return every "
                "optimizer from configure_optimizers."
            )
        before = {context.index: context for context in self.contexts}
        self.contexts = make_contexts(self._trainer, self._module, {}, clips=self._components.clipper.clips)
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
        """Remove fused factors that no step has used from the optimizers, and hold the engine no longer."""
        self._collect_reports = _no_reports
        for context in self.contexts:
            detach_fused_factors(context.optimizer)


def _no_reports() -> None:
    """Collect nothing: the fit is over."""


def _parameter_names(contexts: Sequence[OptimizerContext]) -> list[str]:
    return [name for context in contexts for name in context.table.names]
