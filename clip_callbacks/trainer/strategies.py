"""Which ranks decide together under a strategy of Lightning's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from clip_callbacks.core.reduction import Reduction
from clip_callbacks.trainer.compat import FSDP, MODEL_PARALLEL, is_of

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

Reduce: TypeAlias = Callable[[Sequence[Tensor]], Reduction | None]


def reduction_under(trainer: Trainer) -> Reduce:
    """From parameters to what makes norms of this rank's parts norms of the whole.

    Under DDP gradients are the same on all ranks, and nothing is reduced, unless DDP was told to leave parameters alone or has a
    communication hook, which may leave them different. Where parameters are sharded all ranks decide together, also on those of
    which each holds a copy.
    """
    strategy = trainer.strategy
    if is_of(strategy, FSDP):
        assert strategy.model is not None
        return partial(Reduction.of_flat, model=strategy.model)
    whole_world = _leaves_alone(trainer) or _is_hooked(trainer) or is_of(strategy, MODEL_PARALLEL)
    return partial(Reduction.of, whole_world=whole_world)


def data_parallel(trainer: Trainer) -> DistributedDataParallel | None:
    """What averages gradients over ranks in backward, if that is how they are averaged."""
    model = trainer.strategy.model
    if isinstance(model, DistributedDataParallel):
        return model
    return None


def averages_plainly(trainer: Trainer) -> bool:
    """Whether gradients are averaged over ranks by DDP, as they are and each in memory of its own."""
    model = data_parallel(trainer)
    is_special = _is_hooked(trainer) or _leaves_alone(trainer)
    return model is not None and not model.gradient_as_bucket_view and not model.static_graph and not is_special


def _leaves_alone(trainer: Trainer) -> bool:
    """Whether DDP was told to ignore parameters."""
    return bool(getattr(trainer.lightning_module, "_ddp_params_and_buffers_to_ignore", ()))


def _is_hooked(trainer: Trainer) -> bool:
    """Whether a communication hook stands between gradients and their mean; Lightning registers its own on GPUs only."""
    return bool(getattr(data_parallel(trainer), "_comm_hooks", ()))
