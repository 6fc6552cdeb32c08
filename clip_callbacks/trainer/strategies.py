"""Reductions under Lightning's strategies: which ranks must decide together.

Trap: under DDP gradients are the same on all ranks and need no collective, except where DDP ignores parameters or a communication
hook is registered; under FSDP and ModelParallelStrategy each rank sees its own shards only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from clip_callbacks.core.reduction import Reduction
from clip_callbacks.trainer.compat import FSDP, MODEL_PARALLEL, is_instance

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

Reduce: TypeAlias = Callable[[Sequence[Tensor]], Reduction | None]
"""Function from parameters to the reduction that turns norms of this rank's shards into global norms; None if none is needed."""


def reduction_under(trainer: Trainer) -> Reduce:
    """Return the function that makes reductions under a Trainer's strategy.

    Under plain DDP nothing is reduced. Where some parameters are sharded, all ranks decide together, also about parameters of
    which each rank holds a copy: otherwise ranks would take part in different collectives.
    """
    strategy = trainer.strategy
    if is_instance(strategy, FSDP):
        assert strategy.model is not None
        return partial(Reduction.of_flat, model=strategy.model)
    whole_world = _ignores_parameters(trainer) or _has_communication_hook(trainer) or is_instance(strategy, MODEL_PARALLEL)
    return partial(Reduction.of, whole_world=whole_world)


def data_parallel(trainer: Trainer) -> DistributedDataParallel | None:
    """Return the DDP wrapper, which averages gradients over ranks in the backward pass; None without one."""
    model = trainer.strategy.model
    if isinstance(model, DistributedDataParallel):
        return model
    return None


def averages_plainly(trainer: Trainer) -> bool:
    """Return whether DDP averages all gradients without a communication hook, static graph or bucket views."""
    model = data_parallel(trainer)
    is_special = _has_communication_hook(trainer) or _ignores_parameters(trainer)
    return model is not None and not model.gradient_as_bucket_view and not model.static_graph and not is_special


def _ignores_parameters(trainer: Trainer) -> bool:
    return bool(getattr(trainer.lightning_module, "_ddp_params_and_buffers_to_ignore", ()))


def _has_communication_hook(trainer: Trainer) -> bool:
    # DDPStrategy registers its `ddp_comm_hook` on GPUs only: the wrapper is asked, not the strategy
    return bool(getattr(data_parallel(trainer), "_comm_hooks", ()))
