"""The one pass: rescale, measure, guard, clip, write, report, for whatever members stand in one Trainer.

The pass knows *when*; :func:`~clip_callbacks.clip_step` knows *what*.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from clip_callbacks.blocks import ParameterTable
from clip_callbacks.callbacks._checks import check_micro_batches, check_optimizers
from clip_callbacks.callbacks._history import RunHistory
from clip_callbacks.callbacks._publisher import Publisher, as_floats, optimizer_suffixes
from clip_callbacks.nonfinite import Findings, all_finite, examine
from clip_callbacks.report import (
    ACCUMULATION_SCALE,
    AMP_SCALE,
    CLIP_COEF,
    CLIP_FRACTION,
    FALSE,
    SKIPPED_STEPS,
    TOTAL_NORM,
    TRUE,
    StepReport,
)
from clip_callbacks.step import clip_step

if TYPE_CHECKING:
    from clip_callbacks.callbacks._member import Member
    from clip_callbacks.callbacks.accumulation import AccumulationRescaling
    from clip_callbacks.callbacks.clipping import GradientClipping
    from clip_callbacks.callbacks.guard import NonFiniteGuard
    from clip_callbacks.callbacks.monitor import GradientNormMonitor

T = TypeVar("T")

SHOWN = (TOTAL_NORM, CLIP_COEF)
"""What the progress bar shows."""


class Lane:
    """One optimizer of the run: what it holds, what its steps reported.

    Args:
        index: Its number in ``trainer.optimizers``.
        optimizer: The optimizer.
        module: The module that names its parameters.
        suffix: Of its metrics; empty with one optimizer.
    """

    def __init__(self, index: int, optimizer: Optimizer, module: LightningModule, suffix: str) -> None:
        self.index = index
        self.optimizer = optimizer
        self.suffix = suffix
        self.history = RunHistory()
        self.report: StepReport | None = None
        self.scale = 1.0
        self.stepped = self.unlogged = False
        self._step_number: int | None = None
        self.tabulate(module)

    def tabulate(self, module: LightningModule) -> None:
        """Make the table of parameters."""
        self._sizes = self._group_sizes()
        self.table = ParameterTable.of_optimizer(self.optimizer, module.named_parameters())

    @property
    def is_outdated(self) -> bool:
        """Whether parameters were added or taken away since, as fine-tuning callbacks do."""
        return self._group_sizes() != self._sizes

    def _group_sizes(self) -> list[int]:
        return [len(group["params"]) for group in self.optimizer.param_groups]

    def begin(self, step_number: int) -> bool:
        """Whether this is a new optimizer step, and not another closure call of the last one, as LBFGS makes."""
        is_new, self._step_number = step_number != self._step_number, step_number
        return is_new

    def named(self, metrics: Mapping[str, T]) -> dict[str, T]:
        """Metrics under the names that they have for this optimizer."""
        return {key + self.suffix: value for key, value in metrics.items()}


class Pass:
    """What the members of one Trainer do together, once for each optimizer step.

    Args:
        trainer: The Trainer, its optimizers made.
        module: The module to train.
        members: The members, at least one; the first drives the pass.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, members: Sequence[Member]) -> None:
        self.leader = members[0]
        self.members = members
        of_kind: dict[str, Member] = {member.kind: member for member in members}
        self.clipping = cast("GradientClipping | None", of_kind.get("clipping"))
        self.guard = cast("NonFiniteGuard | None", of_kind.get("guard")) or (self.clipping.guard if self.clipping else None)
        self.rescaling = cast("AccumulationRescaling | None", of_kind.get("rescaling"))
        self.monitors = [cast("GradientNormMonitor", member) for member in members if member.kind == "monitor"]
        self.norm_type = next((member.norm_type for member in members if member.norm_type is not None), 2.0)
        self.losses: list[Tensor] = []
        self.publisher: Publisher | None = None
        self._warned_empty = False
        check_optimizers(trainer.optimizers, grad_scaler(trainer), members)
        if self.guard and self.guard.level == "microbatch":
            check_micro_batches(trainer, grad_scaler(trainer), divides=self.rescaling is not None and self.rescaling.divide)
        suffixes = optimizer_suffixes(trainer)
        self.lanes = [Lane(i, optimizer, module, suffixes[i]) for i, optimizer in enumerate(trainer.optimizers)]
        names = [name for name, _ in module.named_parameters()]
        for member in members:
            member.bind(self.lanes, names)
        self.rewind = self.guard.rewind(module, self.lanes) if self.guard else None
        self.micro_batches = self.guard.micro_batches(module, self.lanes) if self.guard else None

    @property
    def skipped_steps(self) -> int:
        """Skipped optimizer steps so far, over all optimizers."""
        return self.guard.skipped_steps if self.guard else 0

    def open(self, trainer: Trainer) -> None:
        """Take hold of where metrics go: training starts."""
        self.publisher = Publisher(trainer)
        if self.guard:
            self.guard.open_journal(trainer)

    def begin_batch(self) -> None:
        """Keep what a skipped step would have to put back."""
        if self.rewind:
            self.rewind.begin_batch()
        if self.micro_batches:
            self.micro_batches.begin_batch()

    def before_backward(self, loss: Tensor) -> None:
        """Remember the loss until the step, to be looked at only if the step is bad."""
        self.losses.append(loss.detach())
        if self.micro_batches:
            self.micro_batches.before_backward()

    def after_backward(self, trainer: Trainer) -> None:
        """Drop a bad micro-batch, if that is wanted."""
        if self.micro_batches and self.guard:
            guard, loss = self.guard, self.losses.pop()
            dropped = self.micro_batches.after_backward(
                loss, lambda lane: guard.report_micro_batch(Incident(trainer, lane, [loss], is_new=True))
            )
            guard.dropped_micro_batches += dropped
            if dropped and self.rescaling:
                self.rescaling.drop_micro_batch()

    def step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        """Rescale, measure, guard, clip and write the gradients of one optimizer; keep the report."""
        if is_still_scaled(grad_scaler(trainer), optimizer):
            return  # 16-mixed and the window's last training_step returned None: Lightning will not step either
        lane = self._lane(module, optimizer)
        is_new = lane.begin(trainer.global_step)
        lane.scale = self._scale(module, lane)
        incident = Incident(trainer, lane, list(self.losses), is_new=is_new)
        if self.rewind:
            self.rewind.begin_step(lane, is_new=is_new)
        report = self._clip(lane, incident)
        if self.micro_batches:
            self.micro_batches.end_window()
        if self.rewind:
            skipped = report.skipped is TRUE
            self.rewind.end_step(trainer, module, lane, skipped=skipped, steps=grad_scaler(trainer) is None)
        self.losses.clear()
        lane.report, lane.stepped, lane.unlogged = report, True, True
        if is_new:
            lane.history.steps += 1
        if is_new and not incident.happened:
            lane.history.add(report)
        for member in self.members:
            member.observe(lane, report, healthy=is_new and not incident.happened)

    def _scale(self, module: LightningModule, lane: Lane) -> float:
        if self.rescaling:
            return self.rescaling.scale(module, lane)
        return self.micro_batches.scale if self.micro_batches and module.automatic_optimization else 1.0

    def _clip(self, lane: Lane, incident: Incident) -> StepReport:
        is_lost = self.micro_batches is not None and self.micro_batches.is_lost
        if not lane.table.has_gradients and not is_lost:
            self._warn_empty()
        clipping = self.clipping
        report, state = clip_step(
            lane.table,
            clipping.state_of(lane.index) if clipping else None,
            rules=clipping.rules_of(lane.index) if clipping else (),
            norm_type=self.norm_type,
            clip_value=clipping.clip_value if clipping else None,
            nonfinite=partial(self.guard.judge, incident) if self.guard else "ignore",
            scale=lane.scale,
        )
        if clipping:
            clipping.keep(lane.index, state)
        if is_lost and self.guard:
            self.guard.judge(incident, lane.table)
            return replace(report, finite=FALSE, skipped=TRUE)
        return report

    def _lane(self, module: LightningModule, optimizer: Optimizer) -> Lane:
        lane = next(lane for lane in self.lanes if lane.optimizer is optimizer)
        if lane.is_outdated:
            lane.tabulate(module)
            for member in self.members:
                member.bind([lane], lane.table.names, renew=True)
        return lane

    def _warn_empty(self) -> None:
        if not self._warned_empty:
            self._warned_empty = True
            rank_zero_warn("No parameter has a gradient at the optimizer step: total_norm is 0. Was backward called?", stacklevel=2)

    def publish(self, trainer: Trainer, module: LightningModule) -> None:
        """Offer the batch's reports to ModelCheckpoint and the progress bar; on logging steps, write them to the loggers."""
        if self.rewind:
            self.rewind.end_batch()
        if self.publisher is None:
            return
        should_log = self.publisher.should_log(trainer)
        for lane in self.lanes:
            if lane.stepped and lane.report is not None:
                values = self.publisher.offer(lane.named(self._metrics(trainer, lane, lane.report)))
                if self.clipping and self.clipping.prog_bar:
                    self.publisher.show({key: values.get(key, math.nan) for key in lane.named(dict.fromkeys(SHOWN))})
            # in manual optimization the step may have come in a batch before the one that logs
            if should_log and lane.unlogged and (lane.stepped or not module.automatic_optimization):
                self._log(trainer, lane)
            lane.stepped = False

    def _metrics(self, trainer: Trainer, lane: Lane, report: StepReport) -> dict[str, Tensor | float]:
        metrics: dict[str, Tensor | float] = {**report.metrics(), CLIP_FRACTION: lane.history.since_logged.fraction}
        if self.guard:
            metrics[SKIPPED_STEPS] = float(self.guard.skipped_steps_of(lane.index))
        if (scaler := grad_scaler(trainer)) is not None:
            metrics[AMP_SCALE] = scaler.get_scale()
        if lane.scale != 1.0:
            metrics[ACCUMULATION_SCALE] = lane.scale
        return metrics

    def _log(self, trainer: Trainer, lane: Lane) -> None:
        assert lane.report is not None
        metrics = self._metrics(trainer, lane, lane.report)
        for monitor in self.monitors:
            metrics |= monitor.metrics(lane, lane.report)
        Publisher.log(trainer, as_floats(lane.named(metrics)))
        lane.history.since_logged.reset()
        lane.unlogged = False

    def end_epoch(self, trainer: Trainer) -> None:
        """Publish percentiles and the clip fraction of the epoch."""
        for lane in self.lanes if self.publisher else ():
            metrics = lane.named(lane.history.epoch_metrics())
            lane.history.end_epoch()
            if self.publisher:
                Publisher.log(trainer, self.publisher.offer(metrics), epoch_end=True)

    def close(self) -> None:
        """Say in a line each what there is to say at the end of training."""
        if self.rewind:
            self.rewind.close()
        lines = [line for member in (self.guard, *self.monitors) if member for line in member.summary(self.lanes)]
        for line in lines:
            rank_zero_info(line)

    def history_state(self) -> dict[int, dict[str, Any]]:
        """What the lanes remember, by number of the optimizer."""
        return {lane.index: lane.history.state_dict() for lane in self.lanes}


@dataclass
class Incident:
    """Where and when an optimizer step is; it has happened once the guard was asked about it.

    Args:
        trainer: The Trainer, for step, epoch, batch and rank.
        lane: The optimizer.
        losses: The losses of the window.
        is_new: Whether the optimizer's step is new, not another closure call of the last one.
    """

    trainer: Trainer
    lane: Lane
    losses: list[Tensor]
    is_new: bool
    happened: bool = False

    @property
    def under_scaler(self) -> bool:
        """Whether a GradScaler decides on overflows."""
        return grad_scaler(self.trainer) is not None

    def is_real_under_scaler(self) -> bool:
        """Whether no loss scale can cure it: the loss itself is bad, or the gradients are at a scale of 1 or less."""
        scaler = grad_scaler(self.trainer)
        return scaler is not None and (scaler.get_scale() <= 1.0 or not all_finite(self.losses))

    def findings(self, *, after_good_step: bool) -> Findings:
        """Walk over the parameters; on bad steps only."""
        return examine(self.lane.table, self.losses, after_good_step=after_good_step)

    def place(self) -> dict[str, int | str]:
        """Step, epoch, batch, rank, and with several of them the optimizer."""
        trainer = self.trainer
        place: dict[str, int | str] = {"step": trainer.global_step, "epoch": trainer.current_epoch}
        place |= {"batch": trainer.fit_loop.batch_idx, "rank": trainer.global_rank}
        return place | {"optimizer": self.lane.suffix[1:]} if self.lane.suffix else place

    def __str__(self) -> str:
        """The place in words."""
        return ", ".join(f"{what} {where}" for what, where in self.place().items())


def grad_scaler(trainer: Trainer) -> GradScaler | None:
    """The scaler of 16-mixed precision, if there is one at work."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if isinstance(scaler, GradScaler) and scaler.is_enabled() else None


def is_still_scaled(scaler: GradScaler | None, optimizer: Optimizer) -> bool:
    """Whether the gradients are still multiplied by the loss scale: asked of the scaler, not of the optimizer's type."""
    if scaler is None:
        return False
    state = scaler._per_optimizer_states.get(id(optimizer))
    return state is None or state["stage"] is OptState.READY
