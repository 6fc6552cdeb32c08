"""FaultInjection."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from clip_callbacks.core.arguments import as_choice, as_count_or_none
from clip_callbacks.core.blocks import EVERYTHING, Selection
from clip_callbacks.core.reduction import is_sharded, shard_of
from clip_callbacks.core.tensor_table import TensorTable
from clip_callbacks.engine.resume import reading
from clip_callbacks.trainer.compat import FSDP, is_instance
from clip_callbacks.trainer.launched_processes import ResultReturningCallback
from clip_callbacks.trainer.lightning_callback import LightningCallback
from clip_callbacks.trainer.run_identity import RunIdentity

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

Fault: TypeAlias = Literal["nan", "inf", "spike", "loss"]

VARIABLE = "CLIP_CALLBACKS_INJECT"
"""The environment variable that must be 1 for anything to be poisoned."""
SPIKE_FACTOR = 1e4
"""Factor of the gradients for the kind "spike": far above what any healthy step reaches."""

_log = logging.getLogger(__name__)


class FaultInjection(ResultReturningCallback, LightningCallback):
    """Poisons gradients or losses on purpose, to rehearse a run's reaction to bad steps before they happen by themselves.

    It refuses to run unless the environment variable ``CLIP_CALLBACKS_INJECT`` is 1, so that
    one left in the code by mistake cannot damage a training run.

    The first backward pass of each chosen optimizer step is poisoned while it runs: before its gradients are added to those of the
    window, before ranks average them, and before any callback sees them, wherever this callback stands in the list. Only gradients
    of which ranks hold shards are poisoned right after the pass instead: there, put it before callbacks that look at each backward
    pass.

    Each injection is logged by this module's logger as one warning, on the rank where it happens. The loss that ``training_step``
    logged is the one before the injection.

    Args:
        kind: "nan" or "inf" put that value into the first entry of each chosen parameter's gradient; "spike" multiplies the
            gradients by 10,000; "loss" makes the loss NaN, and with it all gradients.
        step: Optimizer steps to poison, one or several, as ``trainer.global_step`` counts them, from 0, when the loss goes
            backward.
        include: Regular expression that ``re.search`` must find in the name of a parameter; None takes all. Not for "loss".
        exclude: Regular expression that ``re.search`` must not find in the name; None excludes nothing. Not for "loss".
        rank: Rank to poison; None poisons all.

    Attributes:
        injected: Injections of this run: a dictionary each, of ``kind``, ``step``, ``epoch``, ``batch``, ``rank``, and
            ``parameters``, the names of the parameters whose gradients were poisoned.

    Raises:
        ValueError: If an argument is out of its range; at fit start, if a pattern matches no parameter or there is no such rank.
        RuntimeError: At the start of a fit, if the environment variable is not 1.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> faults = FaultInjection("nan", step=[100, 101], include=r"attention.*weight")
        >>> trainer = Trainer(callbacks=[faults, NonFiniteGuard()], logger=False, enable_checkpointing=False)
        >>> faults.injected
        []
    """

    def __init__(
        self,
        kind: Fault,
        *,
        step: int | list[int],
        include: str | None = None,
        exclude: str | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__()
        self.kind: Fault = as_choice(kind, "kind", get_args(Fault))
        self.steps = _as_steps(step)
        self._selection = Selection(include, exclude)
        self.include, self.exclude = include, exclude
        if kind == "loss" and self._selection != EVERYTHING:
            argument, pattern = ("exclude", exclude) if include is None else ("include", include)
            raise ValueError(f'`{argument}` must be None for the kind "loss", got {pattern!r}: a bad loss reaches every gradient.')
        self.rank = as_count_or_none(rank, "rank", least=0, none="or None for all ranks")
        self._is_loaded = self._is_late = False
        self._run_identity = RunIdentity()
        self._targets: dict[str, Tensor] = {}
        self._injection: dict[str, Any] | None = None
        self._hooks: list[RemovableHandle] = []
        self._begin()

    def _begin(self) -> None:
        self.injected: list[dict[str, Any]] = []
        self._last_step = -1

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint: of its options, because one Trainer may have several of them."""
        return self._key(kind=self.kind, step=self.steps, include=self.include, exclude=self.exclude, rank=self.rank)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before anything is trained, to poison a run without the environment variable."""
        if stage == "fit" and os.environ.get(VARIABLE) != "1":
            raise RuntimeError(
                f"{VARIABLE} must be 1 in the environment for FaultInjection to poison this run on purpose, got "
                f"{os.environ.get(VARIABLE)!r}. Set it for a rehearsal; for real training remove FaultInjection from the callbacks."
            )
        if stage == "fit":
            if not self._is_loaded and not self._run_identity.is_continued_by(trainer, pl_module):
                self._begin()
            self._run_identity = RunIdentity(trainer, pl_module)
            self._return_results_of(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the parameters to poison."""
        self._is_loaded = False
        if self.rank is not None and self.rank >= trainer.world_size:
            raise ValueError(
                f"`rank` must be below the number of ranks, {trainer.world_size}, got {self.rank}: nothing would be poisoned."
            )
        table = TensorTable.of_named(pair for pair in pl_module.named_parameters() if pair[1].requires_grad)
        named = dict(zip(table.names, table.tensors, strict=True))
        self._selection.check(list(named))
        self._targets = {name: tensor for name, tensor in named.items() if name in self._selection}
        # Under the first FullyShardedDataParallel parameters are views into others, and gradients arrive at those others.
        self._is_late = is_instance(trainer.strategy, FSDP) or any(map(is_sharded, self._targets.values()))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Poison the loss, or hang hooks on the parameters, if this is the first backward pass of a chosen step."""
        self._withdraw()
        is_first, self._last_step = trainer.global_step != self._last_step, trainer.global_step
        if not is_first or trainer.global_step not in self.steps or self.rank not in {None, trainer.global_rank}:
            return
        place = {"step": trainer.global_step, "epoch": trainer.current_epoch, "batch": trainer.fit_loop.batch_idx}
        self._injection = {"kind": self.kind, **place, "rank": trainer.global_rank, "parameters": []}
        if self.kind == "loss":
            loss.data.fill_(math.nan)  # Bypasses the version counter: backward may need the loss itself.
            self._hooks.append(loss.register_hook(lambda gradient: gradient * math.nan))  # type: ignore[no-untyped-call]
        elif not self._is_late:
            self._hooks += [
                tensor.register_hook(self._poisoner(name))  # type: ignore[no-untyped-call]
                for name, tensor in self._targets.items()
            ]

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Poison gradients of which ranks hold shards, and log the injection."""
        if self._injection and self._is_late and self.kind != "loss":
            for name, tensor in self._targets.items():
                if tensor.grad is None:
                    continue
                shard = shard_of(tensor.grad)
                if shard.numel():
                    shard.copy_(self._poisoner(name)(shard))
        if self._injection:
            self.injected.append(self._injection)
            _log.warning(_describe(self._injection))
        self._withdraw()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Name the chosen steps that never came: a rehearsal without a fault has shown nothing."""
        missed = sorted(set(self.steps) - {injection["step"] for injection in self.injected})
        if missed and self.rank in {None, trainer.global_rank}:
            steps = ", ".join(map(str, missed))
            _log.warning(
                "FaultInjection did not poison step %s: no backward pass began there. The run ends at step %d.",
                steps,
                trainer.global_step,
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove all hooks, and hold the parameters no longer."""
        self._withdraw()
        self._targets = {}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove all hooks, and hold the parameters no longer."""
        self._withdraw()
        self._targets = {}
        if stage == "fit":
            self._is_loaded = False

    def _withdraw(self) -> None:
        self._injection = None
        while self._hooks:
            self._hooks.pop().remove()

    def _poisoner(self, name: str) -> Callable[[Tensor], Tensor]:
        """Return the function that poisons the gradient of one parameter, as a copy."""

        def poison(gradient: Tensor) -> Tensor:
            if self._injection and name not in self._injection["parameters"]:
                self._injection["parameters"].append(name)
            if self.kind == "spike":
                return gradient * SPIKE_FACTOR
            if gradient.layout is not torch.strided:
                gradient = gradient.coalesce()
                bad = gradient.values().clone()
                bad.view(-1)[:1] = float(self.kind)
                return torch.sparse_coo_tensor(gradient.indices(), bad, gradient.shape, check_invariants=False, is_coalesced=True)
            bad = gradient.clone(memory_format=torch.contiguous_format)
            bad.view(-1)[:1] = float(self.kind)
            return bad

        return poison

    def state_dict(self) -> dict[str, Any]:
        """Return the injections so far, and the last step at which a backward pass began."""
        return {"injected": list(self.injected), "last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned.

        Raises:
            ValueError: If the state is damaged.
        """
        with reading(type(self).__name__):
            injected, last_step = list(state_dict["injected"]), int(state_dict["last_step"])
        self.injected, self._last_step = injected, last_step
        self._is_loaded = True

    def _results(self) -> dict[str, Any]:
        return {"injected": self.injected}

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without the parameters and hooks of a run."""
        run: dict[str, Any] = {"_targets": {}, "_injection": None, "_hooks": [], "_run_identity": RunIdentity()}
        return super().__getstate__() | run | {"injected": list(self.injected)}


def _describe(injection: dict[str, Any]) -> str:
    kind, names = injection["kind"], ", ".join(injection["parameters"])
    what = f"{kind} into the gradients of {names or 'no parameter: there were none'}"
    if kind == "loss":
        what = "nan into the loss"
    place = ", ".join(f"{key} {injection[key]}" for key in ("step", "epoch", "batch", "rank"))
    return f"FaultInjection at {place}: {what}."


def _as_steps(step: int | list[int]) -> list[int]:
    steps = list(step) if isinstance(step, (list, tuple)) else [step]
    if not steps or not all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in steps):
        raise ValueError(f"`step` must be a whole number of at least 0, or a list of them, got {step!r}.")
    return steps
