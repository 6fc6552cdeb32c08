"""Examination of a bad step: what is non-finite, since when, and whether it is a GradScaler's overflow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from clip_callbacks.core.diagnosis import Diagnosis, NonFiniteTensor, examine, nonfinite_among
from clip_callbacks.core.losses import are_finite
from clip_callbacks.core.merged_diagnosis import merge_diagnoses
from clip_callbacks.core.nonfinite import all_finite
from clip_callbacks.core.reduction import gathered
from clip_callbacks.core.tensor_table import learns, without_wrappers
from clip_callbacks.trainer.dataloader_iter import takes_dataloader_iter
from clip_callbacks.trainer.fingerprints import version_of
from clip_callbacks.trainer.grad_scaler import grad_scaler, has_overflowed, mark_overflow
from clip_callbacks.trainer.step_context import StepContext
from clip_callbacks.trainer.tensor_attributes import nan_attributes
from clip_callbacks.trainer.trace_forward import trace_forward


@dataclass(frozen=True)
class ScalerDecision:
    """Decision of the GradScaler on a bad step.

    Args:
        skips: If True, the scaler skips the step by itself.
        cures: If True, the step is an overflow: a lower loss scale may make its gradients finite.
    """

    skips: bool
    cures: bool


def ask_scaler(step: StepContext, *, is_over: bool) -> ScalerDecision:
    """Ask the GradScaler about a bad step.

    This is a collective, unless the step is over: call it on every rank. If any rank saw an overflow, all ranks mark it, because
    not every rank may hold the non-finite gradients.

    Args:
        step: The step.
        is_over: If True, the device has decided on the step, and ranks learn of it at different times: there is no collective.
    """
    scaler = grad_scaler(step.trainer)
    if scaler is None:
        return ScalerDecision(skips=False, cures=False)
    if step.loss_scale is None:
        # Lightning has unscaled, and the scaler has looked at this rank's gradients as they were then.
        skips = _on_any_rank(step, has_overflowed(scaler, step.optimizer.optimizer), is_over=is_over)
        scale = scaler.get_scale()
        if not skips:
            return ScalerDecision(skips=False, cures=False)
        mark_overflow(scaler, step.optimizer.optimizer)
    else:
        # the scale of that step: when a deferred one is judged, the scaler has moved on
        scale = float(step.loss_scale)
    # A scale of 1 multiplies nothing, so that the gradients overflow by themselves. All ranks have the same scale: either all of
    # them ask about the losses, in a collective, or none does.
    return ScalerDecision(skips=True, cures=scale > 1.0 and not _has_bad_loss(step, is_over=is_over))


def _has_bad_loss(step: StepContext, *, is_over: bool) -> bool:
    """Return whether a loss is non-finite by itself on any rank: no loss scale would change that."""
    return _on_any_rank(step, not are_finite(step.losses), is_over=is_over)


def _on_any_rank(step: StepContext, flag: bool, *, is_over: bool) -> bool:
    if step.trainer.world_size == 1 or is_over:
        return flag
    return any(gathered(flag))


class CarriedTensors:
    """Tensors outside the gradients that hold NaN and carry it from one step of an optimizer into the next.

    They are tensors in plain attributes of modules, and frozen parameters that were written to. Those that hold NaN at the start of
    the fit, or after a bad batch, are suspected of making the next step bad. After a good step they are no longer suspected: a
    memory bank, for example, may be NaN wherever nothing has been stored yet.

    Args:
        module: The module in training.

    Attributes:
        suspects: The tensors that are suspected now.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._cleared: set[str] = set()
        # Quantized weights packed into floats look like NaN from the start: only frozen parameters that change are suspected.
        self._frozen = {id(tensor): version_of(tensor) for tensor in module.parameters() if not tensor.requires_grad}
        self.suspects = self._found()

    def _found(self) -> tuple[NonFiniteTensor, ...]:
        """Return those that hold NaN now; frozen parameters only if they were written to or replaced since the fit began."""
        named = [(without_wrappers(name), tensor) for name, tensor in self._module.named_parameters() if not tensor.requires_grad]
        written = [(name, tensor) for name, tensor in named if self._frozen.get(id(tensor), -1) != version_of(tensor)]
        return (*nan_attributes(self._module), *nonfinite_among(written))

    def begin_batch(self) -> None:
        """Drop suspects that hold NaN no longer, before the forward pass of a batch. Call it only if there are any."""
        self.suspects = self._among(self.suspects)

    def examine(self) -> tuple[tuple[NonFiniteTensor, ...], tuple[NonFiniteTensor, ...]]:
        """Return what holds NaN now, after the forward passes of a bad step, and what held NaN before them."""
        before = self.suspects
        self.suspects = tuple(each for each in self._found() if each.name not in self._cleared)
        return self.suspects, before

    def end_good_step(self) -> None:
        """Clear the suspects: the step was good although its forward passes may have read them. Call it only if there are any."""
        self._cleared |= {each.name for each in self._among(self.suspects)}
        self.suspects = ()

    def _among(self, suspects: tuple[NonFiniteTensor, ...]) -> tuple[NonFiniteTensor, ...]:
        """Return the suspects that hold NaN now."""
        names = {each.name for each in suspects}
        return tuple(each for each in self._found() if each.name in names)


def examine_step(
    step: StepContext,
    *,
    after_good_step: bool,
    traces: bool,
    norms: Tensor | None = None,
    buffers: Iterable[tuple[str, Tensor]] = (),
    carried: CarriedTensors | None = None,
    no_good_step: bool = False,
) -> Diagnosis:
    """Examine all parameters of a bad step. On several ranks this is a collective, unless the step is over.

    Args:
        step: The step.
        after_good_step: If True, the step before was taken with finite gradients.
        traces: If True, a batch with a non-finite loss is run again to find the module.
        norms: Norms of the parameters' gradients on the host, if the device has decided on the step already and nothing else is
            left of the gradients.
        buffers: Buffers that should be finite: their names, and their values from before the step's first forward pass.
        carried: Watch over tensors that carry NaN from one step into the next.
        no_good_step: If True, all steps of the optimizer so far were bad, and frozen parameters are examined too.
    """
    table = step.optimizer.table
    # Codes of quantized weights may look like NaN: they are named only where no step has shown that they do no harm.
    frozen = _frozen(step) if no_good_step else ()
    diagnosis = examine(table, step.losses, after_good_step=after_good_step, norms=norms, buffers=buffers, frozen=frozen)
    if carried:
        now, before = carried.examine()
        diagnosis = replace(diagnosis, carried=now, carried_before=before)
    if traces:
        diagnosis = replace(diagnosis, traced=_trace(step))
    if step.trainer.world_size == 1:
        return diagnosis
    # merging is a collective; ranks learn of a deferred step at different times, and each reports on its own
    if norms is None:
        return merge_diagnoses(table, diagnosis)
    if diagnosis.loss_is_finite:  # another rank's may not be
        return replace(diagnosis, loss_is_finite=None)
    return diagnosis


def may_be_source(step: StepContext, diagnosis: Diagnosis) -> bool:
    """Return whether a step may have become bad on this rank: it is one of the source ranks, or these are unknown."""
    return not diagnosis.source_ranks or step.trainer.global_rank in diagnosis.source_ranks


def _frozen(step: StepContext) -> list[tuple[str, Tensor]]:
    """Return the frozen parameters of an optimizer, and those of the module that no optimizer holds."""
    table = step.optimizer.table
    held = {id(tensor) for each in step.trainer.optimizers for group in each.param_groups for tensor in group["params"]}
    named = step.trainer.lightning_module.named_parameters()
    others = [(without_wrappers(name), tensor) for name, tensor in named if id(tensor) not in held]
    own = zip(table.names, table.tensors, strict=True)
    return [(name, tensor) for name, tensor in (*own, *others) if not learns(tensor)]


def _trace(step: StepContext) -> str | None:
    """Run the first batch with a non-finite loss again; not in manual optimization, where that would step the optimizers."""
    module = step.trainer.lightning_module
    if not module.automatic_optimization:
        return None
    for loss, kept, _ in step.micro_batches:
        # the first of the window is enough: to run every one again would take as long as the window
        if all_finite([loss]):
            continue
        if kept:
            return trace_forward(step.trainer, module, kept.batch, kept.batch_idx)
        if takes_dataloader_iter(module):
            return "not traced with training_step(dataloader_iter), which draws batches that callbacks do not see"
    return None
