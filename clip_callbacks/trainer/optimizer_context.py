"""The context of one optimizer in a fit: its parameters, its history, the report of its last step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from operator import is_
from typing import TYPE_CHECKING, Any, TypeVar

from torch.optim import Optimizer

from clip_callbacks.core.step_record import StepRecord
from clip_callbacks.core.tensor_table import TensorTable, count_entries
from clip_callbacks.stats.run_history import RunHistory
from clip_callbacks.trainer.deepspeed import EngineGradients, uses_deepspeed
from clip_callbacks.trainer.strategies import Reduce, reduction_under

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

T = TypeVar("T")


class OptimizerContext:
    """The context of one optimizer in a fit.

    Args:
        index: The number of the optimizer in ``trainer.optimizers``.
        optimizer: The optimizer.
        module: The module that names the parameters.
        suffix: The suffix of the optimizer's metrics; empty with one optimizer.
        reduce: The function that makes the reduction of norms over ranks for some parameters.
        engine_gradients: The gradients that DeepSpeed's engine holds; None where parameters have their gradients.

    Attributes:
        table: The table of the optimizer's parameters.
        history: The history of norms in this run.
        steps: The number of steps taken or skipped in this fit.
        report: The report of the last step; None before the first. Among closure calls of LBFGS it is the first one's, unless a
            later one is bad.
    """

    def __init__(
        self,
        index: int,
        optimizer: Optimizer,
        module: LightningModule,
        suffix: str,
        reduce: Reduce,
        engine_gradients: EngineGradients | None = None,
    ) -> None:
        self.index = index
        self.optimizer = optimizer
        self.suffix = suffix
        self.history = RunHistory()
        self.steps = 0
        self.report: StepRecord | None = None
        self.engine_gradients = engine_gradients
        self._reduce = reduce
        self.rebuild_table(module)

    def rebuild_table(self, module: LightningModule) -> None:
        """Make the table of the parameters that the optimizer holds now."""
        self._held = [list(group["params"]) for group in self.optimizer.param_groups]
        if self.engine_gradients is None:
            self.table = TensorTable.of_optimizer(self.optimizer, module.named_parameters(), reduce=self._reduce)
        else:
            self.table = self.engine_gradients.make_table(module)
        # the list of this table when it was made: the table itself makes another one, once a parameter has entries
        self._awaited = self.table.awaited

    @property
    def is_outdated(self) -> bool:
        """True if the optimizer holds other parameters than the table, as after ``add_param_group`` by BaseFinetuning."""
        groups = self.optimizer.param_groups  # compared by identity in C: this runs twice in a healthy step
        if len(groups) != len(self._held):
            return True
        for group, held in zip(groups, self._held, strict=True):
            params = group["params"]
            if len(params) != len(held) or not all(map(is_, params, held)):
                return True
        return False

    @property
    def has_lazy_parameters(self) -> bool:
        """True if the table holds parameters that had no entries when it was made, such as those of lazy modules."""
        return bool(self._awaited)

    @property
    def has_materialized_parameters(self) -> bool:
        """True if a parameter without entries has got some since the table was made, as lazy ones do in a forward pass."""
        return any(map(count_entries, self._awaited))

    def record(self, report: StepRecord, *, is_new: bool, is_healthy: bool) -> None:
        """Record the report of a step.

        Args:
            report: The report.
            is_new: True if the step is new; False if it is a further closure call.
            is_healthy: If True, the norms enter the history.
        """
        self.report = report
        self.steps += is_new
        self.history.add(report, is_new=is_new, is_healthy=is_healthy)

    def continue_history(self, history: RunHistory) -> None:
        """Continue the history of the optimizer that this one replaces."""
        self.history = history

    @property
    def of_optimizer(self) -> str:
        """Ending of a name in messages, such as ``" of optimizer 1"``; empty with one optimizer."""
        return f" of optimizer {self.index}" if self.suffix else ""

    def history_state(self) -> dict[str, Any]:
        """Return the history's state for a checkpoint, with the parameters' names, by which a resume matches optimizers."""
        return {**self.history.state_dict(), "parameters": list(self.table.names)}

    def named(self, metrics: Mapping[str, T]) -> dict[str, T]:
        """Return metrics with this optimizer's suffix on their names."""
        return {key + self.suffix: value for key, value in metrics.items()}


def make_contexts(
    trainer: Trainer, module: LightningModule, histories: Mapping[int, Any], *, clips: bool
) -> list[OptimizerContext]:
    """Make a context for each optimizer of a Trainer.

    Args:
        trainer: The Trainer, after its optimizers were made.
        module: The module that names the parameters.
        histories: States of histories from a checkpoint, by the number of the optimizer.
        clips: If True, this package clips, and an engine that takes steps itself must not.
    """
    suffixes, reduce = optimizer_suffixes(trainer), reduction_under(trainer)
    engine_gradients = None
    if uses_deepspeed(trainer):  # with one optimizer at most
        engine_gradients = EngineGradients(trainer, clips=clips)
    contexts = []
    for index, optimizer in enumerate(trainer.optimizers):
        context = OptimizerContext(index, optimizer, module, suffixes[index], reduce, engine_gradients)
        if index in histories:
            context.history.load_state_dict(histories[index])
        contexts.append(context)
    return contexts


def parameter_names(trainer: Trainer, module: LightningModule) -> dict[int, tuple[str, ...]]:
    """Return the names of each optimizer's parameters as the tables of a fit have them, by the number of the optimizer.

    Wrappers such as DDP or torch.compile leave no prefixes in them.
    """
    if uses_deepspeed(trainer):
        return {0: EngineGradients(trainer).make_table(module).names}
    return {
        index: TensorTable.of_optimizer(optimizer, module.named_parameters(), reduce=lambda _: None).names
        for index, optimizer in enumerate(trainer.optimizers)
    }


def optimizer_suffixes(trainer: Trainer) -> list[str]:
    """Return the suffix of each optimizer's metrics: the name that LearningRateMonitor gives the optimizer.

    Optimizers with a scheduler are named first, as there. A single optimizer has no suffix.
    """
    if len(trainer.optimizers) == 1:
        return [""]
    ordered = [config.scheduler.optimizer for config in trainer.lr_scheduler_configs] + trainer.optimizers
    suffixes: dict[int, str] = {}
    seen: Counter[str] = Counter()
    for optimizer in ordered:
        if id(optimizer) not in suffixes:
            name = type(optimizer).__name__
            suffixes[id(optimizer)] = f"-{name}"
            if seen[name]:  # LearningRateMonitor numbers the second one of a type and those after it
                suffixes[id(optimizer)] = f"-{name}-{seen[name]}"
            seen[name] += 1
    return [suffixes[id(optimizer)] for optimizer in trainer.optimizers]
