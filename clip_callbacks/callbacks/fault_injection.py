"""FaultInjection."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from clip_callbacks.core.blocks import no_match
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
"""The environment variable without which nothing is poisoned."""
FACTOR = 1e4
"""What a spike multiplies gradients by, unless told otherwise."""

_log = logging.getLogger(__name__)


class FaultInjection(ResultReturningCallback, LightningCallback):
    """Poisons gradients or losses on purpose, to rehearse what a run does when that happens by itself.

    It refuses to run unless the environment variable ``CLIP_CALLBACKS_INJECT`` is 1, so that a forgotten one ruins no training.

    The first backward pass of a chosen optimizer step is struck, while it runs: before its gradients are added to those of the
    window, before ranks average them, and before any callback sees them, wherever this one stands among the callbacks. Gradients
    that ranks hold shards of are struck right after the pass instead: put it before callbacks that look at each backward pass.

    Each strike is logged by this module's logger as one warning, on the rank that is struck. The loss that ``training_step`` has
    logged is the one before.

    Args:
        kind: "nan" or "inf": the first entry of each chosen parameter's gradient; "spike": their gradients times ``factor``;
            "loss": the loss becomes NaN, and with it all gradients.
        step: The optimizer steps to strike, one or several, as ``trainer.global_step`` stands, from 0, when the loss goes backward.
        parameter: A regular expression that ``re.search`` must find in the name of a parameter; None takes all. Not for "loss".
        rank: The rank to strike; None strikes all.
        probability: In place of ``step``: of each optimizer step, above 0 and up to 1, drawn independently and alike on all ranks.
        factor: Of a spike, above 0.
        seed: Of the draws. They are the same in each run, and a resumed run goes on with them.

    Attributes:
        injected: What was done in this run: a dictionary for each strike, of ``kind``, ``step``, ``epoch``, ``batch``, ``rank``,
            and ``parameters``, the names of those whose gradients were struck.

    Raises:
        ValueError: If an argument is out of its range, not exactly one of ``step`` and ``probability`` is given, or at fit start
            the pattern matches no parameter or there is no such rank.
        RuntimeError: At the start of a fit, if the environment variable is not 1.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> faults = FaultInjection("nan", step=[100, 101], parameter=r"attention.*weight")
        >>> trainer = Trainer(callbacks=[faults, NonFiniteGuard()], logger=False, enable_checkpointing=False)
        >>> faults.injected
        []
    """

    def __init__(
        self,
        kind: Fault,
        *,
        step: int | list[int] | None = None,
        parameter: str | None = None,
        rank: int | None = None,
        probability: float | None = None,
        factor: float = FACTOR,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if kind not in get_args(Fault):
            raise ValueError(f"`kind` must be one of {', '.join(get_args(Fault))}, got {kind!r}.")
        self.kind: Fault = kind
        if (step is None) == (probability is None):
            raise ValueError(
                f"`step` or `probability` must be given, and not both, got step={step!r}, probability={probability!r}."
            )
        self.steps = None if step is None else _as_steps(step)
        self.parameter = _as_pattern(parameter, kind)
        if rank is not None and not _is_count(rank):
            raise ValueError(f"`rank` must be a whole number of at least 0, or None for all ranks, got {rank!r}.")
        self.rank = rank
        if probability is not None and not (_is_number(probability) and 0 < probability <= 1):
            raise ValueError(f"`probability` must be above 0 and at most 1, got {probability!r}.")
        self.probability = probability
        if not (_is_number(factor) and 0 < factor < math.inf):
            raise ValueError(f"`factor` must be a finite number above 0, got {factor!r}.")
        if factor != FACTOR and kind != "spike":
            raise ValueError(f'`factor` must be left at {FACTOR:g} for the kind {kind!r}, got {factor!r}: only a "spike" has one.')
        self.factor = factor
        if not _is_count(seed):
            raise ValueError(f"`seed` must be a whole number of at least 0, got {seed!r}.")
        self.seed = seed
        self._is_loaded = self._is_late = False
        self._run_identity = RunIdentity()
        self._targets: dict[str, Tensor] = {}
        self._strike: dict[str, Any] | None = None
        self._hooks: list[RemovableHandle] = []
        self._begin()

    def _begin(self) -> None:
        self.injected: list[dict[str, Any]] = []
        self._generator = torch.Generator().manual_seed(self.seed)
        self._decided = -1

    @property
    def state_key(self) -> str:
        """Several of them may stand in one Trainer."""
        given = {"kind": self.kind, "step": self.steps, "parameter": self.parameter, "rank": self.rank, "factor": self.factor}
        return self._key(**given, probability=self.probability, seed=self.seed)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse to poison what nobody wants poisoned, before anything is trained."""
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
        """Find the parameters to strike."""
        self._is_loaded = False
        if self.rank is not None and self.rank >= trainer.world_size:
            raise ValueError(
                f"`rank` must be below the number of ranks, {trainer.world_size}, got {self.rank}: nothing would be struck."
            )
        table = TensorTable.of_named(pair for pair in pl_module.named_parameters() if pair[1].requires_grad)
        named = dict(zip(table.names, table.tensors, strict=True))
        self._targets = {name: tensor for name, tensor in named.items() if re.search(self.parameter or "", name)}
        if self.parameter is not None and not self._targets:
            raise ValueError(no_match(self.parameter, list(named), "parameter"))
        # under the first FullyShardedDataParallel parameters are views into others, where gradients arrive
        self._is_late = is_instance(trainer.strategy, FSDP) or any(map(is_sharded, self._targets.values()))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Lie in wait in the graph, if this pass is to be struck."""
        self._withdraw()
        if not self._is_time(trainer.global_step) or self.rank not in {None, trainer.global_rank}:
            return
        place = {"step": trainer.global_step, "epoch": trainer.current_epoch, "batch": trainer.fit_loop.batch_idx}
        self._strike = {"kind": self.kind, **place, "rank": trainer.global_rank, "parameters": []}
        if self.kind == "loss":
            loss.data.fill_(math.nan)  # around the version counter: backward may need the loss
            self._hooks.append(loss.register_hook(lambda gradient: gradient * math.nan))  # type: ignore[no-untyped-call]
        elif not self._is_late:
            self._hooks += [
                tensor.register_hook(self._poisoner(name))  # type: ignore[no-untyped-call]
                for name, tensor in self._targets.items()
            ]

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Strike shards; say what was done."""
        if self._strike and self._is_late and self.kind != "loss":
            for name, tensor in self._targets.items():
                if tensor.grad is None:
                    continue
                shard = shard_of(tensor.grad)
                if shard.numel():
                    shard.copy_(self._poisoner(name)(shard))
        if self._strike:
            self.injected.append(self._strike)
            _log.warning(_told(self._strike))
        self._withdraw()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say which of the chosen steps never came: a rehearsal without a fault has shown nothing."""
        missed = sorted(set(self.steps or ()) - {strike["step"] for strike in self.injected})
        if missed and self.rank in {None, trainer.global_rank}:
            steps = ", ".join(map(str, missed))
            _log.warning(
                "FaultInjection has not struck step %s: no backward pass began there. The run ends at step %d.",
                steps,
                trainer.global_step,
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook on a parameter, and let go of them."""
        self._withdraw()
        self._targets = {}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the parameters; a state that came in the middle of a fit is that of this fit."""
        self._withdraw()
        self._targets = {}
        if stage == "fit":
            self._is_loaded = False

    def _withdraw(self) -> None:
        self._strike = None
        while self._hooks:
            self._hooks.pop().remove()

    def _is_time(self, step: int) -> bool:
        """Whether this is the first backward pass of a step to be struck; for each step asked once."""
        if step == self._decided:
            return False
        self._decided = step
        if self.steps is not None:
            return step in self.steps
        return float(torch.rand((), generator=self._generator, device="cpu")) < (self.probability or 0.0)

    def _poisoner(self, name: str) -> Callable[[Tensor], Tensor]:
        """From a gradient as it should be to one as it should not."""

        def poisoned(gradient: Tensor) -> Tensor:
            if self._strike and name not in self._strike["parameters"]:
                self._strike["parameters"].append(name)
            if self.kind == "spike":
                return gradient * self.factor
            if gradient.layout is not torch.strided:
                gradient = gradient.coalesce()
                bad = gradient.values().clone()
                bad.view(-1)[:1] = float(self.kind)
                return torch.sparse_coo_tensor(gradient.indices(), bad, gradient.shape, check_invariants=False, is_coalesced=True)
            bad = gradient.clone(memory_format=torch.contiguous_format)
            bad.view(-1)[:1] = float(self.kind)
            return bad

        return poisoned

    def state_dict(self) -> dict[str, Any]:
        """What was done, and where the draws stand."""
        return {"injected": list(self.injected), "generator": self._generator.get_state(), "decided": self._decided}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned.

        Raises:
            ValueError: If the state is damaged.
        """
        with reading(type(self).__name__):
            injected, decided = list(state_dict["injected"]), int(state_dict["decided"])
            self._generator.set_state(state_dict["generator"])
        self.injected, self._decided = injected, decided
        self._is_loaded = True

    def _results(self) -> dict[str, Any]:
        return {"injected": self.injected}

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without the run, and with the generator's state, as numbers: neither it nor shared memory can be sent."""
        state = super().__getstate__() | {"_targets": {}, "_strike": None, "_hooks": [], "_run_identity": RunIdentity()}
        return state | {"_generator": self._generator.get_state().tolist(), "injected": list(self.injected)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the generator's state back."""
        generator = torch.Generator()
        generator.set_state(torch.tensor(state["_generator"], dtype=torch.uint8))
        super().__setstate__(state | {"_generator": generator})


def _told(strike: dict[str, Any]) -> str:
    kind, names = strike["kind"], ", ".join(strike["parameters"])
    struck = f"{kind} into the gradients of {names or 'no parameter: there were none'}"
    if kind == "loss":
        struck = "nan into the loss"
    return f"FaultInjection at {', '.join(f'{key} {strike[key]}' for key in ('step', 'epoch', 'batch', 'rank'))}: {struck}."


def _as_steps(step: int | list[int]) -> list[int]:
    steps = list(step) if isinstance(step, (list, tuple)) else [step]
    if not steps or not all(map(_is_count, steps)):
        raise ValueError(f"`step` must be a whole number of at least 0, or a list of them, got {step!r}.")
    return steps


def _as_pattern(parameter: object, kind: Fault) -> str | None:
    if parameter is None:
        return None
    if kind == "loss":
        raise ValueError(f'`parameter` must be None for the kind "loss", got {parameter!r}: a bad loss reaches every gradient.')
    try:
        re.compile(parameter)  # type: ignore[call-overload]
    except (re.error, TypeError) as error:
        raise ValueError(f"`parameter` must be a regular expression, got {parameter!r}: {error}.") from error
    return parameter  # type: ignore[return-value]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
