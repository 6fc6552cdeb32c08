"""The one pass: rescale, measure, guard, clip, write, report, for whatever members stand in one Trainer.

The pass knows *when*; :func:`~clip_callbacks.clip_step` knows *what*.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from clip_callbacks.blocks import ParameterTable
from clip_callbacks.callbacks._checks import check_micro_batches, check_optimizers
from clip_callbacks.callbacks._history import RunHistory
from clip_callbacks.callbacks._publisher import Publisher, as_floats, optimizer_suffixes
from clip_callbacks.callbacks._trace import trace_forward
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


WINDOW = 1024
"""How many micro-batches of a window are remembered at most."""


class MicroBatch(NamedTuple):
    """The loss of one backward pass, and the batch with its index if it may have to be run again."""

    loss: Tensor
    batch: tuple[Any, int] | None


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
        self.window: deque[MicroBatch] = deque(maxlen=WINDOW)
        self.report: StepReport | None = None
        self.scale = 1.0
        self.stepped = self.unlogged = self.is_skipped = False
        self._step_number: int | None = None
        self.tabulate(module)

    def tabulate(self, module: LightningModule) -> None:
        """Make the table of parameters."""
        self._held = self._holding()
        self.table = ParameterTable.of_optimizer(self.optimizer, module.named_parameters())

    @property
    def is_outdated(self) -> bool:
        """Whether the optimizer holds other parameters than it did, as after fine-tuning callbacks."""
        return self._holding() != self._held

    def _holding(self) -> list[list[int]]:
        return [[*map(id, group["params"])] for group in self.optimizer.param_groups]

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
        self.publisher: Publisher | None = None
        self._batch: tuple[Any, int] | None = None
        self._warned_empty = False
        scaler = grad_scaler(trainer)
        check_optimizers(trainer.optimizers, scaler, members)
        if self.guard and self.guard.level == "microbatch":
            check_micro_batches(trainer, scaler, divides=self.rescaling is not None and self.rescaling.divide)
        self.lanes = make_lanes(trainer, module)
        for index, history in [entry for member in members for entry in member.take_history().items()]:
            if index < len(self.lanes):
                self.lanes[index].history.load_state_dict(history)
        names = [name for name, _ in module.named_parameters()]
        for member in members:
            member.bind(self.lanes, names)
        self._equip(module)

    def _equip(self, module: LightningModule) -> None:
        """Have what puts skipped steps back, for the parameters that the optimizers hold now."""
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

    def begin_batch(self, batch: Any, batch_idx: int) -> None:
        """Keep what a skipped step would have to put back, and the batch if it may have to be run again."""
        if self.guard and self.guard.trace_forward:
            self._batch = batch, batch_idx
        if self.rewind:
            self.rewind.begin_batch()
        if self.micro_batches:
            self.micro_batches.begin_batch()

    def before_backward(self, loss: Tensor) -> None:
        """Remember the loss until the step, to be looked at only if the step is bad."""
        for lane in self.lanes:
            lane.window.append(MicroBatch(loss.detach(), self._batch))
        if self.micro_batches:
            self.micro_batches.before_backward()

    def after_backward(self, trainer: Trainer) -> None:
        """Drop a bad micro-batch, if that is wanted."""
        if self.micro_batches and self.guard:
            guard = self.guard
            (micro_batch, *_) = [lane.window.pop() for lane in self.lanes]
            dropped = self.micro_batches.after_backward(
                micro_batch.loss, lambda lane: guard.report_micro_batch(Incident(trainer, lane, [micro_batch], is_new=True))
            )
            guard.dropped_micro_batches += dropped
            if dropped and self.rescaling:
                self.rescaling.drop_micro_batch()

    def step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        """Rescale, measure, guard, clip and write the gradients of one optimizer; keep the report."""
        lane = self._lane(trainer, module, optimizer)
        if is_still_scaled(grad_scaler(trainer), optimizer):
            lane.window.clear()
            return  # 16-mixed and the window's last training_step returned None: Lightning will not step either
        is_new = lane.begin(trainer.global_step)
        lane.scale = self._scale(module, lane)
        if self.rewind:
            self.rewind.begin_step(lane, is_new=is_new)
        report = self._clip(lane, Incident(trainer, lane, list(lane.window), is_new=is_new))
        lane.window.clear()
        if self.micro_batches:
            self.micro_batches.end_window()
        lane.is_skipped = report.skipped is TRUE or (lane.is_skipped and not is_new)
        if lane.is_skipped:  # LBFGS may find good points after a bad one: its step is undone all the same
            report = replace(report, skipped=TRUE)
        if self.rewind:
            self.rewind.end_step(trainer, module, lane, skipped=lane.is_skipped, steps=grad_scaler(trainer) is None)
        self._keep(lane, report, is_new=is_new)

    def _keep(self, lane: Lane, report: StepReport, *, is_new: bool) -> None:
        """Keep the report of a step: of LBFGS's closure calls the first, where the step begins, unless a later one is bad."""
        if not is_new and not lane.is_skipped:
            return
        lane.report, lane.stepped, lane.unlogged = report, True, True
        healthy = report.finite is TRUE
        lane.history.steps += is_new
        if healthy:
            lane.history.add(report)
        for member in self.members:
            member.observe(lane, report, healthy=healthy)

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

    def _lane(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> Lane:
        """The lane of an optimizer, made anew if it holds other parameters, or is another optimizer, than at the last step."""
        lane = next((lane for lane in self.lanes if lane.optimizer is optimizer), None)
        if lane is not None and not lane.is_outdated:
            return lane
        if lane is None:
            lane = self._adopt(trainer, module, optimizer)
        lane.tabulate(module)
        for member in self.members:
            member.bind([lane], lane.table.names, renew=True)
        if self.rewind:
            self.rewind.close()
        self._equip(module)
        if self.rewind:
            self.rewind.begin_batch()
        return lane

    def _adopt(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> Lane:
        """Take up an optimizer that was put into the Trainer in mid-run; histories go on by number."""
        check_optimizers([optimizer], grad_scaler(trainer), self.members)
        histories = {lane.index: lane.history for lane in self.lanes}
        if not any(known is optimizer for known in trainer.optimizers):
            raise RuntimeError(
                f"`optimizer` must be one of trainer.optimizers, got a {type(optimizer).__name__} that is not. Return every "
                "optimizer from configure_optimizers."
            )
        self.lanes = make_lanes(trainer, module)
        for lane in self.lanes:
            lane.history = histories.get(lane.index, lane.history)
            for member in self.members:
                member.bind([lane], lane.table.names, renew=True)
        return next(lane for lane in self.lanes if lane.optimizer is optimizer)

    def _warn_empty(self) -> None:
        if not self._warned_empty:
            self._warned_empty = True
            rank_zero_warn("No parameter has a gradient at the optimizer step: total_norm is 0. Was backward called?", stacklevel=2)

    def end_batch(self, trainer: Trainer, module: LightningModule) -> None:
        """Let schedules go on; publish what the batch's steps reported."""
        if self.rewind:
            self.rewind.end_batch()
        if self.publisher:
            self._publish(trainer, module, self.publisher)

    def _publish(self, trainer: Trainer, module: LightningModule, publisher: Publisher) -> None:
        """Offer reports to ModelCheckpoint and the progress bar; on logging steps, write them to the loggers."""
        is_logging_step = publisher.is_logging_step(trainer)
        for lane in self.lanes:
            if lane.stepped and lane.report is not None:
                values = publisher.offer(lane.named(self._metrics(lane, lane.report)))
                if self.clipping and self.clipping.prog_bar:
                    publisher.show({key: values.get(key, math.nan) for key in lane.named(dict.fromkeys(SHOWN))})
            # in manual optimization the step may have come in a batch before the one that logs
            if is_logging_step and lane.unlogged and (lane.stepped or not module.automatic_optimization):
                self._log(trainer, lane, publisher)
            lane.stepped = False

    def _metrics(self, lane: Lane, report: StepReport) -> dict[str, Tensor | float]:
        metrics: dict[str, Tensor | float] = {**report.metrics(clipping=self.clipping is not None)}
        if self.clipping:
            metrics[CLIP_FRACTION] = lane.history.since_logged.fraction
        if self.guard:
            metrics[SKIPPED_STEPS] = float(self.guard.skipped_steps_of(lane.index))
        if self.rescaling:
            metrics[ACCUMULATION_SCALE] = lane.scale
        return metrics

    def _log(self, trainer: Trainer, lane: Lane, publisher: Publisher) -> None:
        assert lane.report is not None
        metrics = self._metrics(lane, lane.report)
        if lane.scale == 1.0:
            metrics.pop(ACCUMULATION_SCALE, None)
        if (scaler := grad_scaler(trainer)) is not None:
            metrics[AMP_SCALE] = scaler.get_scale()
        publisher.offer(lane.named(metrics))
        for monitor in self.monitors:
            metrics |= monitor.metrics(lane, lane.report)
        Publisher.log(trainer, as_floats(lane.named(metrics)))
        lane.history.since_logged.reset()
        lane.unlogged = False

    def end_epoch(self, trainer: Trainer) -> None:
        """Publish percentiles and the clip fraction of the epoch."""
        for lane in self.lanes if self.publisher else ():
            metrics = lane.named(lane.history.epoch_metrics(clipping=self.clipping is not None))
            lane.history.end_epoch()
            if self.publisher:
                Publisher.log(trainer, self.publisher.offer(metrics), epoch_end=True)

    def summarize(self) -> None:
        """Say in a line each what there is to say at the end of training."""
        for member in (self.guard, *self.monitors):
            for line in member.summary(self.lanes) if member else ():
                rank_zero_info(line)

    def close(self) -> None:
        """Let go of the optimizers."""
        if self.rewind:
            self.rewind.close()
        if self.guard:
            self.guard.release()

    def history_state(self) -> dict[int, dict[str, Any]]:
        """What the lanes remember, by number of the optimizer."""
        return {lane.index: lane.history.state_dict() for lane in self.lanes}


@dataclass
class Incident:
    """Where and when an optimizer step is; it has happened once the guard was asked about it.

    Args:
        trainer: The Trainer, for step, epoch, batch and rank.
        lane: The optimizer.
        window: Its micro-batches.
        is_new: Whether the optimizer's step is new, not another closure call of the last one.
    """

    trainer: Trainer
    lane: Lane
    window: list[MicroBatch]
    is_new: bool
    happened: bool = False

    def _losses(self) -> list[Tensor]:
        return [loss for loss, _ in self.window]

    @property
    def under_scaler(self) -> bool:
        """Whether a GradScaler decides on overflows."""
        return grad_scaler(self.trainer) is not None

    def is_real_under_scaler(self) -> bool:
        """Whether no loss scale can cure it: the loss itself is bad, or the gradients are at a scale of 1 or less."""
        scaler = grad_scaler(self.trainer)
        return scaler is not None and (scaler.get_scale() <= 1.0 or not all_finite(self._losses()))

    def findings(self, *, after_good_step: bool) -> Findings:
        """Walk over the parameters; on bad steps only."""
        findings = examine(self.lane.table, self._losses(), after_good_step=after_good_step)
        return replace(findings, traced=self._trace())

    def _trace(self) -> str | None:
        """Run the first batch with a non-finite loss again; in manual optimization that would step the optimizers."""
        module = self.trainer.lightning_module
        if not module.automatic_optimization:
            return None
        for loss, batch in self.window:
            if batch and not all_finite([loss]):
                return trace_forward(self.trainer, module, *batch)
        return None

    def place(self) -> dict[str, int | str]:
        """Step, epoch, batch, rank, and with several of them the optimizer."""
        trainer = self.trainer
        place: dict[str, int | str] = {"step": trainer.global_step, "epoch": trainer.current_epoch}
        place |= {"batch": trainer.fit_loop.batch_idx, "rank": trainer.global_rank}
        return place | {"optimizer": self.lane.suffix[1:]} if self.lane.suffix else place

    def __str__(self) -> str:
        """The place in words."""
        return ", ".join(f"{what} {where}" for what, where in self.place().items())


def make_lanes(trainer: Trainer, module: LightningModule) -> list[Lane]:
    """A lane for each optimizer of a Trainer."""
    suffixes = optimizer_suffixes(trainer)
    return [Lane(index, optimizer, module, suffixes[index]) for index, optimizer in enumerate(trainer.optimizers)]


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
