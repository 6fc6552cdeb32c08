"""A look at a bad step: what is not finite, since when, and whether the GradScaler sees to it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from clip_callbacks.core.diagnosis import Findings, Offender, examine, examine_on_all_ranks, offenders_among
from clip_callbacks.core.losses import are_finite
from clip_callbacks.core.nonfinite import all_finite
from clip_callbacks.core.reduction import gathered
from clip_callbacks.core.tensor_table import learns, without_wrappers
from clip_callbacks.trainer.dataloader_iter import takes_dataloader_iter
from clip_callbacks.trainer.grad_scaler import grad_scaler, has_overflowed, mark_overflow
from clip_callbacks.trainer.step_context import StepContext
from clip_callbacks.trainer.tensor_attributes import nan_attributes
from clip_callbacks.trainer.trace_forward import trace_forward


@dataclass(frozen=True)
class ScalerVerdict:
    """What the GradScaler makes of a bad step.

    Args:
        skips: Whether it takes no step by itself.
        cures: Whether a lower loss scale may cure the step: it is an overflow.
    """

    skips: bool
    cures: bool


def ask_scaler(step: StepContext, *, is_over: bool) -> ScalerVerdict:
    """Ask the GradScaler about a bad step.

    This is a collective, unless the step is over: call it on every rank. If any rank saw an overflow, all ranks mark it, since not
    every rank may hold what is not finite.

    Args:
        step: The step.
        is_over: Whether the device has decided it, so that ranks learn of it at different times.
    """
    scaler = grad_scaler(step.trainer)
    if scaler is None:
        return ScalerVerdict(skips=False, cures=False)
    if step.loss_scale is None:
        skips = _on_any_rank(step, has_overflowed(scaler, step.optimizer.optimizer), is_over=is_over)
        scale = scaler.get_scale()
        if not skips:
            return ScalerVerdict(skips=False, cures=False)
        mark_overflow(scaler, step.optimizer.optimizer)
    else:
        scale = float(step.loss_scale)
    return ScalerVerdict(skips=True, cures=scale > 1.0 and not _has_bad_loss(step, is_over=is_over))


def _has_bad_loss(step: StepContext, *, is_over: bool) -> bool:
    """Whether a loss is bad by itself, on any rank: no loss scale would cure that."""
    return _on_any_rank(step, not are_finite(step.losses), is_over=is_over)


def _on_any_rank(step: StepContext, flag: bool, *, is_over: bool) -> bool:
    if step.trainer.world_size == 1 or is_over:
        return flag
    return any(gathered(flag))


class CarriedTensors:
    """The tensors in a module's plain attributes that hold NaN, as one optimizer's steps meet them.

    What holds some when the fit begins, or was left so by a bad batch, is suspected of spoiling the next step. A good step in spite
    of it acquits it: a memory bank may be NaN wherever nothing was stored yet.

    Args:
        module: The module in training.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._acquitted: set[str] = set()
        self._frozen = {id(tensor): tensor._version for tensor in module.parameters() if not tensor.requires_grad}
        self._suspects = self._found()

    def _found(self) -> tuple[Offender, ...]:
        """Those that hold NaN now: frozen parameters too that were written to, or put there, since the fit began."""
        named = [(without_wrappers(name), tensor) for name, tensor in self._module.named_parameters() if not tensor.requires_grad]
        written = [(name, tensor) for name, tensor in named if self._frozen.get(id(tensor)) != tensor._version]
        return (*nan_attributes(self._module), *offenders_among(written))

    def begin_batch(self) -> None:
        """A batch comes; nothing of it has had an effect. Only those are suspects still that hold NaN still."""
        if self._suspects:
            self._suspects = self._among(self._suspects)

    def look(self) -> tuple[tuple[Offender, ...], tuple[Offender, ...]]:
        """At a bad step, after its forward passes: what holds NaN now, and what held some before them."""
        before = self._suspects
        self._suspects = tuple(each for each in self._found() if each.name not in self._acquitted)
        return self._suspects, before

    def end_good_step(self) -> None:
        """A step was good, whatever its forward passes have met."""
        if self._suspects:
            self._acquitted |= {each.name for each in self._among(self._suspects)}
            self._suspects = ()

    def _among(self, suspects: tuple[Offender, ...]) -> tuple[Offender, ...]:
        """Those that hold NaN."""
        names = {each.name for each in suspects}
        return tuple(each for each in self._found() if each.name in names)


def look_at(
    step: StepContext,
    *,
    after_good_step: bool,
    traces: bool,
    norms: Tensor | None = None,
    buffers: Iterable[tuple[str, Tensor]] = (),
    carried: CarriedTensors | None = None,
    none_was_good: bool = False,
) -> Findings:
    """Walk over the parameters of a bad step; on several ranks a collective, unless the step is over.

    Args:
        step: The step.
        after_good_step: Whether the step before was taken with finite gradients.
        traces: Whether a batch with a bad loss is run again to find the module.
        norms: Of a step that is over, the norms of its gradients, on the host: nothing else is left of them.
        buffers: Names and values, as they were before the step's first forward pass, of those buffers that are to be finite.
        carried: What watches tensors in plain attributes.
        none_was_good: Whether all steps of the optimizer so far were bad: then frozen parameters are looked at too.
    """
    table = step.optimizer.table
    frozen = _frozen(step) if none_was_good else ()
    findings = examine(table, step.losses, after_good_step=after_good_step, norms=norms, buffers=buffers, frozen=frozen)
    if carried:
        now, before = carried.look()
        findings = replace(findings, carried=now, carried_before=before)
    if traces:
        findings = replace(findings, traced=_trace(step))
    if step.trainer.world_size == 1:
        return findings
    if norms is None:
        return examine_on_all_ranks(table, findings)
    if findings.loss_is_finite:  # another rank's may not be
        return replace(findings, loss_is_finite=None)
    return findings


def is_guilty(step: StepContext, findings: Findings) -> bool:
    """Whether a step may be this rank's fault: it is one of those where it began, or nobody knows where."""
    return not findings.guilty_ranks or step.trainer.global_rank in findings.guilty_ranks


def _frozen(step: StepContext) -> list[tuple[str, Tensor]]:
    """The frozen parameters of an optimizer, and those of the module that no optimizer holds."""
    table = step.optimizer.table
    held = {id(tensor) for each in step.trainer.optimizers for group in each.param_groups for tensor in group["params"]}
    others = [(without_wrappers(name), it) for name, it in step.trainer.lightning_module.named_parameters() if id(it) not in held]
    own = zip(table.names, table.tensors, strict=True)
    return [(name, tensor) for name, tensor in (*own, *others) if not learns(tensor)]


def _trace(step: StepContext) -> str | None:
    """Run the first batch with a non-finite loss again; in manual optimization that would step the optimizers."""
    module = step.trainer.lightning_module
    if not module.automatic_optimization:
        return None
    for loss, kept in step.micro_batches:
        if all_finite([loss]):
            continue
        if kept:
            return trace_forward(step.trainer, module, kept.batch, kept.batch_idx)
        if takes_dataloader_iter(module):
            return "not traced with training_step(dataloader_iter), which draws batches that nobody else sees"
    return None
