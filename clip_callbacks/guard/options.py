"""The options of NonFiniteGuard: those of bundles and of rollbacks in classes of their own, and all of them checked together."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from clip_callbacks.core.arguments import as_choice, as_count, as_finite, as_flag, number_above_zero
from clip_callbacks.core.limits import Limit, as_limit, as_loss_limit
from clip_callbacks.core.nonfinite import POLICIES, Policy
from clip_callbacks.core.rules import NO_SPIKE_LIMITS, SpikeLimits

GuardPolicy: TypeAlias = Policy | Literal["warn"]
Level: TypeAlias = Literal["window", "microbatch"]
Weights: TypeAlias = Literal["none", "reference", "full"]


@dataclass(frozen=True)
class Bundles:
    """Keeps on disk what it takes to run a bad step again; an option of :class:`~clip_callbacks.NonFiniteGuard`.

    Each bad step, and each dropped micro-batch, gets a folder of its own, which ``clip-callbacks replay`` runs again. It holds the
    micro-batches of the window, the states of the random number generators before each of them, the report of the step, the
    versions of the software and the configuration of the run. Until a step is over, the guard keeps references to the batches of
    its window.

    On several ranks only the ranks on which the bad step began write a bundle, or all ranks if those are not known. A bundle is
    written completely or not at all. If that fails, one warning says so, and training continues without further bundles.

    Args:
        folder: Folder for the bundles, made if it is not there. A relative path is resolved when this object is
            made; later changes of the working directory do not move it.
        weights: Weights and optimizer states in a bundle, as they were before the step. "none" leaves them out. "reference" names
            the last checkpoint, which ModelCheckpoint deletes when it has a better one unless ``save_top_k=-1``. "full" stores
            them, which an exact replay needs; not with sharded parameters.
        max_count: Number of bundles that the folder may hold, at least 1. Those of earlier runs count.
        max_bytes: Size that all bundles in the folder may have together, in bytes, above 0.

    Raises:
        ValueError: If ``weights`` is unknown or a number is out of its range; at fit start, if the folder cannot be written to.

    Example::

        >>> guard = NonFiniteGuard(bundles=Bundles("bad_steps", weights="full"))
        >>> guard.bundles.max_count
        20
    """

    folder: str | Path
    _: KW_ONLY
    weights: Weights = "reference"
    max_count: int = 20
    max_bytes: float = 2e9

    def __post_init__(self) -> None:
        """Check every argument."""
        if not isinstance(self.folder, (str, Path)):
            raise TypeError(f"`folder` must be a path, got {self.folder!r}.")
        # Training may change the working directory, as Hydra does; bundles stay together.
        object.__setattr__(self, "folder", Path(self.folder).expanduser().absolute())
        as_choice(self.weights, "weights", get_args(Weights))
        as_count(self.max_count, "max_count", least=1)
        max_bytes = number_above_zero(self.max_bytes)
        if max_bytes is None:
            raise ValueError(f"`max_bytes` must be a number above 0, got {self.max_bytes!r}.")
        object.__setattr__(self, "max_bytes", max_bytes)


@dataclass(frozen=True)
class Rollback:
    """Returns to the last good weights when bad steps do not end; an option of :class:`~clip_callbacks.NonFiniteGuard`.

    The guard keeps one copy of the run in memory: parameters and buffers, the optimizers' states and parameter groups, the
    learning-rate schedules, the limits' states, and the GradScaler's scale. The copy is made right before a good step is taken, and
    holds the state in which the window of that step began: at the first good step, and then every ``every_n_steps`` good steps.

    After ``max_consecutive`` bad batches in a row the whole copy is restored in place and the last bad step is skipped as well.
    From there the run is, bit for bit, one that starts from the copy with the batches that follow. Data, random numbers,
    ``global_step``, epochs, metrics and counts continue. A loss scale that was lowered since the copy is restored too: non-finite
    losses lower it although the scale is not at fault, and if it was too high the scaler finds out again.

    On several ranks each keeps its own shards. Copies of a GPU's tensors are in pinned host memory, and the host does not wait for
    them. The copy is not in checkpoints: after a resume the first good step makes a new one.

    **Optimizers and schedules** are copied as a checkpoint would have them: by ``state``, ``param_groups`` and ``state_dict``.
    Schedules that advance by epochs are restored too, though the epochs are not. With several optimizers, the copy is made before
    the first step of a batch, if the last steps of the other optimizers were good and the norms of their parameters are finite;
    after a rollback the rest of the batch does not count.

    **Averages of the weights** are restored too: an ``AveragedModel`` that a callback holds, as WeightAveraging does, and the one
    of StochasticWeightAveraging. Two kinds of buffers stay as they are: new ones, and non-persistent ones whose shape has changed,
    such as caches that grow.

    **Runs that change**: if an optimizer takes up parameters that the module has had all along, as fine-tuning callbacks do, or
    schedules are replaced, as StochasticWeightAveraging does, the copy stays valid. A rollback then restores the weights and
    moments of the copy, and the parameter groups and schedules of the moment of the change. Parameters that are new to the module
    make the copy invalid, and the next good step makes another.

    **Learning rates**: ``lr_factor`` accumulates; after two rollbacks with 0.5 the factor is 0.25. It multiplies ``lr``,
    ``initial_lr``, ``max_lr``, ``min_lr`` and ``swa_lr`` in parameter groups, and ``base_lrs``, ``max_lrs``, ``min_lrs`` and
    ``eta_min`` in the schedules of ``torch.optim``. A schedule of your own that keeps rates under other names sets them again.

    Args:
        every_n_steps: Number of good optimizer steps between copies, counted over all optimizers; at least 1.
        max_rollbacks: Number of rollbacks in a run, at least 1. The next streak of bad steps raises the error.
        lr_factor: Factor for learning rates at each rollback, above 0 and at most 1.

    Raises:
        ValueError: If a number is out of its range.

    Example::

        >>> guard = NonFiniteGuard(max_consecutive=5, rollback=Rollback(every_n_steps=100, lr_factor=0.5))
        >>> guard.rollbacks
        0
    """

    _: KW_ONLY
    every_n_steps: int = 100
    max_rollbacks: int = 3
    lr_factor: float = 1.0

    def __post_init__(self) -> None:
        """Check every argument."""
        as_count(self.every_n_steps, "every_n_steps", least=1)
        as_count(self.max_rollbacks, "max_rollbacks", least=1)
        object.__setattr__(self, "lr_factor", as_finite(self.lr_factor, "lr_factor", high=1.0, high_too=True))


@dataclass(frozen=True)
class GuardOptions:
    """The arguments of :class:`~clip_callbacks.NonFiniteGuard`, which documents them.

    Args:
        policy: The policy. NonFiniteGuard documents it and all following arguments but the last.
        in_search: If True, Lightning searches for a learning rate: bad steps are skipped silently, and no streak ends the fit.

    Raises:
        ValueError: If an argument is out of its range, or does not go with another one.
        TypeError: If ``bundles`` or ``rollback`` is of another class.
    """

    policy: GuardPolicy = "skip"
    _: KW_ONLY
    max_consecutive: int = 10
    level: Level = "window"
    skip_above: float | Limit | None = None
    loss_above: float | Limit | None = None
    both: bool = False
    hold_schedulers: bool = True
    trace_forward: bool = False
    deferred: bool | None = None
    bundles: Bundles | None = None
    rollback: Rollback | None = None
    in_search: bool = False

    def __post_init__(self) -> None:
        """Check every argument, and what goes together."""
        as_choice(self.policy, "policy", (*POLICIES, "warn"))
        as_choice(self.level, "level", get_args(Level))
        as_count(self.max_consecutive, "max_consecutive", least=1)
        for name in ("both", "hold_schedulers", "trace_forward"):
            object.__setattr__(self, name, as_flag(getattr(self, name), name))
        if self.deferred is not None:
            object.__setattr__(self, "deferred", as_flag(self.deferred, "deferred"))
        if self.bundles is not None and not isinstance(self.bundles, Bundles):
            raise TypeError(f"`bundles` must be a folder, Bundles(...) or None, got {self.bundles!r}.")
        if self.rollback is not None and not isinstance(self.rollback, Rollback):
            raise TypeError(f"`rollback` must be Rollback(...) or None, got {self.rollback!r}.")
        if self.policy != "skip":
            self._check_policy()
        if self.both and (self.skip_above is None or self.loss_above is None):
            raise ValueError(
                f"`both` must be False unless `skip_above` and `loss_above` are given, got both={self.both!r} with "
                f"skip_above={self.skip_above!r} and loss_above={self.loss_above!r}. Give both of them."
            )
        _ = self.limits  # checks them

    def _check_policy(self) -> None:
        """Refuse options that need the policy "skip", for another policy."""
        if self.drops_micro_batches:
            raise ValueError(
                f'`level` must be "window" for the policy {self.policy!r}, got "microbatch": only skipping drops anything.'
            )
        for name, limit in (("skip_above", self.skip_above), ("loss_above", self.loss_above)):
            if limit is not None and self.policy != "warn":
                raise ValueError(
                    f'`{name}` must be None for the policy {self.policy!r}, got {limit!r}: use "skip" to skip spikes, or "warn" to '
                    "report them."
                )
        # "zero" takes bad steps, but counts them: a streak of them ends as under "skip"
        if self.rollback is not None and self.policy != "zero":
            raise ValueError(
                f"`rollback` must be None for the policy {self.policy!r}, got {self.rollback!r}: with this policy no streak of bad "
                'steps ends in a rollback. Use the policy "skip" or "zero".'
            )

    def for_search(self) -> GuardOptions:
        """Return the options for a search for the learning rate, which has to reach its end whatever the gradients are.

        Bad steps are skipped without a message, schedules advance because the search itself is one, and no files are written. The
        loss is not judged, because the search looks for the rate at which it grows.
        """
        # A search goes up to rates at which training diverges: an error there would lose the curve that it is made for.
        policy: GuardPolicy = "skip" if self.policy == "raise" else self.policy
        return GuardOptions(
            policy,
            level=self.level,
            hold_schedulers=False,
            deferred=self.deferred,
            skip_above=None if self.both else self.skip_above,
            in_search=True,
        )

    @cached_property
    def limits(self) -> SpikeLimits:
        """``skip_above`` and ``loss_above`` as limits; one object, by which a table finds the plan that it made before."""
        if self.skip_above is None and self.loss_above is None:
            return NO_SPIKE_LIMITS
        skip_above = None if self.skip_above is None else as_limit(self.skip_above, "skip_above")
        loss_above = None if self.loss_above is None else as_loss_limit(self.loss_above)
        return SpikeLimits(skip_above, loss_above, self.both)

    @property
    def takes_bad_steps(self) -> bool:
        """Whether steps are taken, whatever their gradients and losses are."""
        return self.policy in {"ignore", "warn"}

    @property
    def writes_all_weights(self) -> bool:
        """Whether bundles hold all weights."""
        return self.bundles is not None and self.bundles.weights == "full"

    @property
    def drops_micro_batches(self) -> bool:
        """Whether bad micro-batches are dropped from their window."""
        return self.level == "microbatch"
