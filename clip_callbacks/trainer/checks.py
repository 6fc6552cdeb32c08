"""Combinations of a Trainer, module and callbacks that are refused before training.

Trap: most of them would not fail but train wrongly, as two clips, or a clip of gradients that another engine keeps elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.amp.grad_scaler import GradScaler
from torch.optim import LBFGS, Optimizer

from clip_callbacks.core.nonfinite import Policy
from clip_callbacks.trainer.compat import GRADIENT_ACCUMULATION_SCHEDULER, is_instance, overrides
from clip_callbacks.trainer.dataloader_iter import takes_dataloader_iter
from clip_callbacks.trainer.deepspeed import check_deepspeed
from clip_callbacks.trainer.grad_scaler import takes_scaler_argument
from clip_callbacks.trainer.strategies import averages_plainly

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

Kind = Literal["clipping", "guard", "rescaling", "monitor", "noise scale"]


@dataclass(frozen=True)
class CallbackFacts:
    """Facts about one gradient callback that the checks need.

    Args:
        kind: The kind of callback.
        key: The ``state_key``, which distinguishes it from others of its class.
        norm_type: The order of norms that it requires; None if it takes any.
        nonfinite: The policy for non-finite gradients that it was given; "skip" if it takes none.
        is_weighted: True if it weights micro-batches.
        options: Options that some strategy refuses, by their names.
    """

    kind: Kind
    key: str
    norm_type: float | None = None
    nonfinite: Policy = "skip"
    is_weighted: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


_SINGLE_KINDS = {
    "clipping": "gradients would be clipped twice; give one GradientClipping several `rules`",
    "guard": "only one policy can apply; keep one of them",
    "rescaling": "gradients would be rescaled twice; keep one of them",
    "noise scale": "the metric would be logged twice; keep one of them",
}


def check_trainer(trainer: Trainer, module: LightningModule, callbacks: Sequence[CallbackFacts]) -> None:
    """Refuse combinations with which gradient callbacks would be wrong.

    Raises:
        ValueError: If there is one. The message says what to change.
    """
    _check_callbacks(callbacks)
    kinds = {callback.kind for callback in callbacks}
    options = [{"nonfinite": callback.nonfinite, **callback.options} for callback in callbacks]
    check_deepspeed(trainer, module, options, clips="clipping" in kinds, estimates_noise="noise scale" in kinds)
    if "clipping" in kinds:
        _check_clipped_once(trainer, module)


def check_micro_batches(trainer: Trainer, module: LightningModule, scaler: GradScaler | None) -> None:
    """Refuse ``level="microbatch"`` where single micro-batches cannot be dropped.

    Raises:
        ValueError: If they cannot. The message says why, and what to do instead.
    """
    if trainer.world_size > 1 and not averages_plainly(trainer):
        raise ValueError(
            '`level` must be "window" on several ranks unless plain DDP averages the gradients, got "microbatch" with '
            f"{type(trainer.strategy).__name__}: gradients cannot be set aside if they are sharded or ignored, or if DDP has "
            "a communication hook, a static graph or bucket views. Use strategy='ddp'."
        )
    if scaler is not None:
        raise ValueError(
            '`level` must be "window" under a GradScaler, got "microbatch" with precision 16-mixed: dropping a micro-batch would '
            "hide its overflow from the scaler, which would never lower the loss scale. Use precision bf16-mixed."
        )
    if not module.automatic_optimization:
        raise ValueError(
            '`level` must be "window" in manual optimization, got "microbatch": only the training_step knows which backward passes '
            "make a window, and for which optimizer. Use automatic optimization."
        )
    if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
        raise ValueError(
            '`level` must be "window" with LBFGS, got "microbatch": its closure runs the window again within one step.'
        )


def check_noise_scale(trainer: Trainer, module: LightningModule, *, is_weighted: bool) -> None:
    """Refuse to estimate the noise scale where micro-batches cannot be looked at one by one.

    Args:
        trainer: The Trainer.
        module: The module to train.
        is_weighted: If True, micro-batches have weights.

    Raises:
        ValueError: It says why, and what to do instead.
    """
    if reason := _reason_against_noise_scale(trainer, module, is_weighted=is_weighted):
        raise ValueError(
            f"GradientNoiseScale must not be used with {reason}. Remove it, and estimate the noise scale in a short run on one "
            "device, with automatic optimization and equal micro-batches."
        )
    warn_of_single_micro_batches(trainer)


def _reason_against_noise_scale(trainer: Trainer, module: LightningModule, *, is_weighted: bool) -> str | None:
    if trainer.world_size > 1:
        return f"{trainer.world_size} ranks, where gradients are reduced in backward"
    if not module.automatic_optimization:
        return "manual optimization, where only the training_step knows what makes a window"
    if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
        return "LBFGS, whose closure runs the window again within one step"
    if takes_dataloader_iter(module):
        return "training_step(dataloader_iter), which draws batches that nobody else sees"
    if is_weighted:
        return "a `weight`, with which micro-batches are no samples of one size"
    return None


def warn_of_single_micro_batches(trainer: Trainer) -> None:
    """Warn if windows have one micro-batch only, from which the noise scale cannot be estimated."""
    schedulers = [it for it in trainer.callbacks if is_instance(it, GRADIENT_ACCUMULATION_SCHEDULER)]  # type: ignore[attr-defined]
    if trainer.accumulate_grad_batches <= 1 and not schedulers:
        rank_zero_warn(
            "GradientNoiseScale needs accumulation windows of several micro-batches, and logs nothing without them. Set "
            "`accumulate_grad_batches` above 1.",
            stacklevel=2,
        )


def check_optimizers(optimizers: Sequence[Optimizer], scaler: GradScaler | None, callbacks: Sequence[CallbackFacts]) -> None:
    """Refuse optimizers that gradient callbacks cannot handle.

    Raises:
        ValueError: If there is one. The message names it, and says what to do instead.
    """
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if scaler is not None and takes_scaler_argument(optimizer):
            raise ValueError(
                f"`optimizer` must leave unscaling to its caller under a GradScaler, got {name}, whose step takes the scaler "
                "as an argument: gradients would be unscaled twice. Use a fused optimizer of torch.optim, or precision bf16-mixed."
            )
        if isinstance(optimizer, LBFGS) and any(callback.kind == "rescaling" for callback in callbacks):
            raise ValueError(
                f"AccumulationRescaling must not be used with {name}: its closure runs the window again within one step. "
                "Remove AccumulationRescaling and set accumulate_grad_batches=1."
            )


def _check_callbacks(callbacks: Sequence[CallbackFacts]) -> None:
    for kind, harm in _SINGLE_KINDS.items():
        names = [callback.key for callback in callbacks if callback.kind == kind]
        if len(names) > 1:
            raise ValueError(f"`callbacks` must hold at most one {kind} callback, got {', '.join(names)}: {harm}.")
    monitors = [callback.key for callback in callbacks if callback.kind == "monitor"]
    if len(set(monitors)) < len(monitors):
        raise ValueError(
            f"`callbacks` must hold at most one GradientNormMonitor for each scope, got {', '.join(monitors)}: "
            "every metric would be logged twice."
        )
    _check_one_policy(callbacks)
    norm_types = {callback.norm_type for callback in callbacks if callback.norm_type is not None}
    if len(norm_types) > 1:
        raise ValueError(
            f"`norm_type` must be the same for all callbacks of one Trainer, got {sorted(norm_types)}: "
            "the gradients are read once for all of them."
        )


def _check_one_policy(callbacks: Sequence[CallbackFacts]) -> None:
    """Refuse a policy that a guard in the same Trainer would silently override."""
    if not any(callback.kind == "guard" for callback in callbacks):
        return
    for callback in callbacks:
        if callback.nonfinite != "skip":
            raise ValueError(
                f'`nonfinite` must be "skip" beside a NonFiniteGuard, got {callback.nonfinite!r}: the guard decides on bad '
                f"steps. Remove nonfinite from {callback.key}, or give the policy to the guard: "
                f"NonFiniteGuard({callback.nonfinite!r})."
            )


def _check_clipped_once(trainer: Trainer, module: LightningModule) -> None:
    if trainer.gradient_clip_val:  # Lightning takes 0 as "no clipping"
        raise ValueError(
            "`gradient_clip_val` must not be set beside GradientClipping, got "
            f"Trainer(gradient_clip_val={trainer.gradient_clip_val}): gradients would be clipped twice. Remove it from the "
            "Trainer; where a package makes the Trainer and sets it, pass gradient_clip_val=None through the package's arguments "
            "for the Trainer (often called trainer_kwargs or pl_trainer_kwargs)."
        )
    if overrides(module, "configure_gradient_clipping"):
        raise ValueError(
            "`configure_gradient_clipping` must not be overridden beside GradientClipping, got "
            f"{type(module).__name__}.configure_gradient_clipping: gradients would be clipped twice. Remove one of them; "
            "where the module is a package's, derive a class from it with the line "
            "`configure_gradient_clipping = LightningModule.configure_gradient_clipping`."
        )
