"""The optimizers of a fit, and what is attached to each: made anew when one takes on other parameters, or is replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch.optim import Optimizer

from clip_callbacks.accumulation.windows import Windows
from clip_callbacks.core.fused import take_back
from clip_callbacks.engine.components import Components
from clip_callbacks.engine.deferred import DeferredSteps
from clip_callbacks.publishing.histograms import check_histograms
from clip_callbacks.trainer.checks import CallbackFacts, check_optimizers
from clip_callbacks.trainer.grad_scaler import grad_scaler
from clip_callbacks.trainer.optimizer_context import OptimizerContext, make_contexts

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class Optimizers:
    """The optimizers of a fit, each with its context, and the parts that are attached to them.

    Args:
        trainer: The Trainer, its optimizers made.
        module: The module to train.
        components: What takes part in the fit.
        windows: The micro-batches that wait for steps.
        deferred: The steps that are decided on the device.
        callbacks: What the checks need to know of the callbacks.

    Attributes:
        contexts: What each optimizer has in this fit.
        may_grow: Whether any of them holds parameters of lazy modules that have not run yet.

    Raises:
        ValueError: If something asked for cannot be done with these optimizers.
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
        if any(monitor.options.histograms for monitor in components.monitors):
            check_histograms(trainer, self.contexts)
        names = [name for name, _ in module.named_parameters()]
        self._attach(self.contexts, names, renewed=False)

    def find(self, optimizer: Optimizer) -> OptimizerContext | None:
        """The context of an optimizer; None if it is not one of those that the fit has had so far."""
        for context in self.contexts:
            if context.optimizer is optimizer:
                return context
        return None

    @property
    def outdated(self) -> list[OptimizerContext]:
        """The optimizers that hold other parameters than they did."""
        return [context for context in self.contexts if context.is_outdated]

    @property
    def grown(self) -> list[OptimizerContext]:
        """The optimizers of whose lazy parameters a forward pass has made some."""
        return [context for context in self.contexts if context.has_materialized_parameters]

    def take_in_shapes(self) -> None:
        """Learn the shapes of parameters that were lazy: the same tensors, so that nothing else of a window under way changes."""
        if self.outdated:
            self.renew()
        grown = self.grown
        for context in grown:
            context.rebuild_table(self._module)
        self._meet_tables(grown, [name for context in grown for name in context.table.names], renewed=True)
        for context in grown:
            self._deferred.register(context)
        self._note_lazy()

    def _note_lazy(self) -> None:
        self.may_grow = any(context.has_lazy_parameters for context in self.contexts)

    def renew(self) -> None:
        """Take up what the optimizers hold now."""
        outdated = self.outdated
        for context in outdated:
            context.rebuild_table(self._module)
        self._attach_changed(outdated)

    def take_up(self, optimizer: Optimizer) -> OptimizerContext:
        """Take up an optimizer that was put into the Trainer in the middle of a fit; histories go on by number.

        Raises:
            RuntimeError: If it is none of the Trainer's.
        """
        check_optimizers([optimizer], grad_scaler(self._trainer), self._facts)
        for context in self.contexts:
            take_back(context.optimizer)
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
        self._attach_changed(self.contexts)
        return next(context for context in self.contexts if context.optimizer is optimizer)

    def _attach_changed(self, changed: Sequence[OptimizerContext]) -> None:
        self._attach(changed, [name for context in changed for name in context.table.names], renewed=True)

    def _attach(self, changed: Sequence[OptimizerContext], names: Sequence[str], *, renewed: bool) -> None:
        """Have every part meet the optimizers, for the parameters that they hold now.

        Args:
            changed: The optimizers that are new, or hold other parameters.
            names: The names that patterns may match.
            renewed: Whether the fit is under way.
        """
        self._meet_tables(changed, names, renewed=renewed)
        self._windows.attach(changed, self.contexts)
        self._components.guard.attach(self._module, self.contexts, (self._components.clipper,))
        for context in self.contexts:
            self._deferred.register(context)
        self._note_lazy()

    def _meet_tables(self, changed: Sequence[OptimizerContext], names: Sequence[str], *, renewed: bool) -> None:
        """Have those parts meet the optimizers that form blocks of their parameters: arguments as for :meth:`_attach`."""
        self._components.clipper.attach(changed, names, renewed=renewed)
        for monitor in self._components.monitors:
            monitor.attach(changed, names, renewed=renewed)

    def detach(self) -> None:
        """Leave nothing on the optimizers of what did not ride with their steps."""
        for context in self.contexts:
            take_back(context.optimizer)
