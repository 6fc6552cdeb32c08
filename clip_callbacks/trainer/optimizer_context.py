"""One optimizer of the run: what it holds, what its steps reported."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from clip_callbacks.core.nonfinite import NonFiniteGradientError
from clip_callbacks.core.parameters import ParameterTable
from clip_callbacks.core.step_report import StepReport
from clip_callbacks.stats.noise_scale import WindowNorms
from clip_callbacks.stats.norm_history import RunHistory
from clip_callbacks.trainer.strategies import Reduce, reduction_under

if TYPE_CHECKING:
    from clip_callbacks.engine.deferred import Verdict

T = TypeVar("T")

WINDOW = 1024
"""How many micro-batches of a window are remembered at most."""

KEPT = 16
"""How many batches are kept in manual optimization, where nobody says how long a window is."""


class KeptBatch(NamedTuple):
    """A batch that may have to be run again, its index; if wanted, the states of random numbers and versions of tensors before."""

    batch: Any
    batch_idx: int
    rng: dict[str, Any] | None = None
    versions: tuple[tuple[int, int], ...] = ()


class MicroBatch(NamedTuple):
    """The loss of one backward pass, and the batch if it may have to be run again."""

    loss: Tensor
    kept: KeptBatch | None


class Lane:
    """One optimizer of the run: what it holds, what its steps reported.

    Args:
        index: Its number in ``trainer.optimizers``.
        optimizer: The optimizer.
        module: The module that names its parameters.
        suffix: Of its metrics; empty with one optimizer.
        reduce: From its parameters to what makes norms of this rank's parts norms of the whole.
    """

    def __init__(self, index: int, optimizer: Optimizer, module: LightningModule, suffix: str, reduce: Reduce) -> None:
        self.index = index
        self._reduce = reduce
        self.optimizer = optimizer
        self.suffix = suffix
        self.history = RunHistory()
        self.window: deque[MicroBatch] = deque(maxlen=WINDOW)
        self.report: StepReport | None = None
        self.verdict: Verdict | None = None
        self.error: NonFiniteGradientError | None = None
        self.noise: WindowNorms | None = None
        self.scale = 1.0
        self.stepped = self.unlogged = self.is_skipped = False
        self._step_number: int | None = None
        self.tabulate(module)

    def tabulate(self, module: LightningModule) -> None:
        """Make the table of parameters."""
        self._held = [list(group["params"]) for group in self.optimizer.param_groups]
        self.table = ParameterTable.of_optimizer(self.optimizer, module.named_parameters(), reduce=self._reduce)

    @property
    def is_outdated(self) -> bool:
        """Whether the optimizer holds other parameters than it did, as after fine-tuning callbacks."""
        groups = self.optimizer.param_groups
        if len(groups) != len(self._held):
            return True
        pairs = [(group["params"], held) for group, held in zip(groups, self._held, strict=True)]
        return any(len(params) != len(held) or not all(map(is_, params, held)) for params, held in pairs)

    def begin(self, step_number: int) -> bool:
        """Whether this is a new optimizer step, and not another closure call of the last one, as LBFGS makes."""
        is_new, self._step_number = step_number != self._step_number, step_number
        return is_new

    def named(self, metrics: Mapping[str, T]) -> dict[str, T]:
        """Metrics under the names that they have for this optimizer."""
        return {key + self.suffix: value for key, value in metrics.items()}


def make_lanes(trainer: Trainer, module: LightningModule) -> list[Lane]:
    """A lane for each optimizer of a Trainer."""
    suffixes, reduce = optimizer_suffixes(trainer), reduction_under(trainer)
    return [Lane(index, optimizer, module, suffixes[index], reduce) for index, optimizer in enumerate(trainer.optimizers)]


def optimizer_suffixes(trainer: Trainer) -> list[str]:
    """What tells the metrics of several optimizers apart, in the names that LearningRateMonitor gives them.

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
            suffixes[id(optimizer)] = f"-{name}-{seen[name]}" if seen[name] else f"-{name}"
            seen[name] += 1
    return [suffixes[id(optimizer)] for optimizer in trainer.optimizers]
