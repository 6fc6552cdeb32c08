"""What one optimizer has in a fit: its parameters, its history, the report of its last step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from operator import is_
from typing import TYPE_CHECKING, Any, TypeVar

from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from clip_callbacks.core.step_record import StepRecord
from clip_callbacks.core.tensor_table import TensorTable
from clip_callbacks.stats.norm_history import RunHistory
from clip_callbacks.trainer.strategies import Reduce, reduction_under

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

T = TypeVar("T")


class OptimizerContext:
    """What one optimizer has in a fit.

    Args:
        index: The optimizer's number in ``trainer.optimizers``.
        optimizer: The optimizer.
        module: The module that names its parameters.
        suffix: The suffix of its metrics; empty with one optimizer.
        reduce: From its parameters to what makes norms of this rank's parts norms of the whole.

    Attributes:
        table: The parameters.
        history: What the run remembers of its norms.
        steps: How many steps it has taken or skipped in this fit.
        report: The report of the last step; of LBFGS's closure calls the first one's, unless a later one is bad.
    """

    def __init__(self, index: int, optimizer: Optimizer, module: LightningModule, suffix: str, reduce: Reduce) -> None:
        self.index = index
        self.optimizer = optimizer
        self.suffix = suffix
        self.history = RunHistory()
        self.steps = 0
        self.report: StepRecord | None = None
        self._reduce = reduce
        self._step_number: int | None = None
        self.tabulate(module)

    def tabulate(self, module: LightningModule) -> None:
        """Make the table of the parameters that the optimizer holds now."""
        self._held = [list(group["params"]) for group in self.optimizer.param_groups]
        self._lazy = [tensor for held in self._held for tensor in held if is_lazy(tensor)]
        self.table = TensorTable.of_optimizer(self.optimizer, module.named_parameters(), reduce=self._reduce)

    @property
    def is_outdated(self) -> bool:
        """Whether the optimizer holds other parameters than it did, as after fine-tuning callbacks."""
        groups = self.optimizer.param_groups
        if len(groups) != len(self._held):
            return True
        for group, held in zip(groups, self._held, strict=True):
            params = group["params"]
            if len(params) != len(held) or not all(map(is_, params, held)):
                return True
        return False

    @property
    def is_lazy(self) -> bool:
        """Whether some of the parameters were those of lazy modules that had not run yet when the table was made."""
        return bool(self._lazy)

    @property
    def has_grown(self) -> bool:
        """Whether a forward pass has given lazy modules parameters of some shape since the table was made."""
        return not all(map(is_lazy, self._lazy))

    def begins_step(self, step_number: int) -> bool:
        """Whether this is a new optimizer step, and not another closure call of the last one, as LBFGS makes.

        Args:
            step_number: ``trainer.global_step``.
        """
        is_new = step_number != self._step_number
        self._step_number = step_number
        return is_new

    def remember(self, report: StepRecord, *, is_new: bool, is_healthy: bool) -> None:
        """Keep the report of a step.

        Args:
            report: The report.
            is_new: Whether it is of a new step, and not of another closure call.
            is_healthy: Whether its norms go into the history.
        """
        self.report = report
        self.steps += is_new
        self.history.steps += is_new
        if is_healthy:
            self.history.add(report)

    def continue_history(self, history: RunHistory) -> None:
        """Go on with the history of an optimizer whose place this one has taken."""
        self.history = history

    @property
    def of_which(self) -> str:
        """Behind the name of a thing that each optimizer has: which one's it is, if there are several."""
        return f" of optimizer {self.index}" if self.suffix else ""

    def history_state(self) -> dict[str, Any]:
        """What the history holds, for a checkpoint, and what tells whether it fits: the parameters."""
        return {**self.history.state_dict(), "parameters": list(self.table.names)}

    def named(self, metrics: Mapping[str, T]) -> dict[str, T]:
        """Metrics under the names that they have for this optimizer."""
        return {key + self.suffix: value for key, value in metrics.items()}


def make_contexts(trainer: Trainer, module: LightningModule, histories: Mapping[int, Any]) -> list[OptimizerContext]:
    """Make a context for each optimizer of a Trainer.

    Args:
        trainer: A Trainer that has made its optimizers.
        module: The module that names the parameters.
        histories: What a checkpoint knows of the optimizers' histories, by number.
    """
    suffixes, reduce = optimizer_suffixes(trainer), reduction_under(trainer)
    contexts = []
    for index, optimizer in enumerate(trainer.optimizers):
        context = OptimizerContext(index, optimizer, module, suffixes[index], reduce)
        if index in histories:
            context.history.load_state_dict(histories[index])
        contexts.append(context)
    return contexts


def optimizer_suffixes(trainer: Trainer) -> list[str]:
    """Suffixes that tell the metrics of several optimizers apart, in the names that LearningRateMonitor gives them.

    Those with a scheduler come first, as there; one optimizer needs no suffix.
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
