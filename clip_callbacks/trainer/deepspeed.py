"""DeepSpeed, whose engine holds gradients and takes the optimizer step itself: all that this package knows of it.

Traps, of ZeRO stages 1, 2 and 3 alike. ``parameter.grad`` is None in the hook before a step, and the optimizer of the Trainer is
DeepSpeed's, whose parameter groups hold flat partitions. Lightning calls that hook at every micro-batch; only the engine knows at
which of them it will step. It counts micro-batches on over the end of an epoch, where Lightning begins a new window and sets the
gradients of the open one to zero. Losses are divided by the number of micro-batches twice: by Lightning and by the engine. Nothing
that a hook does keeps the engine from stepping but a gradient that is not finite, which leads it to its overflow path: gradients
dropped, optimizer not called.

The engine averages gradients in the backward pass, so that before its step each rank holds the averaged gradients of its own
partition. They are shown to the rest of the package as gradients of stand-ins: one flat tensor for each parameter, with the entries
that this rank holds. DeepSpeed is not imported; whatever is asked of it is asked of the engine that the strategy has made.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from clip_callbacks.core.reduction import Reduction
from clip_callbacks.core.tensor_table import TensorTable, group_names, without_wrappers
from clip_callbacks.trainer.compat import DEEPSPEED, is_instance

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

NEEDED_VERSION = "0.19.8"
"""The oldest version of DeepSpeed with which the tests of this package have run."""

ATTRIBUTES = {
    "DeepSpeedZeroOptimizer": (
        "averaged_gradients",
        "bit16_groups",
        "check_grad_overflow",
        "clip_grad",
        "get_param_id",
        "grad_partition_insertion_offset",
        "grad_start_offset",
        "params_in_partition",
        "partition_size",
        "single_partition_of_fp32_groups",
    ),
    "DeepSpeedZeroOptimizer_Stage3": (
        "averaged_gradients",
        "clip_grad",
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "grad_partitions_flat_buffer",
        "sub_group_to_group_id",
    ),
}
"""What is asked of DeepSpeed's optimizer of stages 1 and 2, and of that of stage 3, by the name of its class."""


def uses_deepspeed(trainer: Trainer) -> bool:
    """Return whether a Trainer trains with DeepSpeed."""
    return is_instance(trainer.strategy, DEEPSPEED)


# --- what is refused, before anything is trained


@dataclass(frozen=True)
class Refusal:
    """An option of a callback that does not go with DeepSpeed.

    Args:
        option: The name of the option.
        contract: The admitted values, in words.
        is_refused: Function that returns True for a value that is refused.
        reason: The reason, a clause.
        cure: The way out, a sentence.
    """

    option: str
    contract: str
    is_refused: Callable[[Any], bool]
    reason: str
    cure: str

    def check(self, options: Mapping[str, Any]) -> None:
        """Check the options of a callback.

        Raises:
            ValueError: If the option is refused.
        """
        value = options.get(self.option)
        if value is not None and self.is_refused(value):
            raise ValueError(f"`{self.option}` must be {self.contract} under DeepSpeed, got {value!r}: {self.reason}. {self.cure}")


REFUSED = (
    Refusal(
        "policy",
        '"skip", "raise" or "zero"',
        lambda policy: policy in {"ignore", "warn"},
        "its engine takes no step whose gradients are not finite",
        'Use NonFiniteGuard("skip"), which counts, reports and bounds what the engine skips.',
    ),
    Refusal(
        "nonfinite",
        '"skip", "raise" or "zero"',
        lambda policy: policy == "ignore",
        "its engine takes no step whose gradients are not finite",
        'Leave it at "skip".',
    ),
    Refusal(
        "level",
        '"window"',
        lambda level: level != "window",
        "its engine adds a micro-batch to the window within the backward pass",
        "Leave it out: a bad micro-batch then skips its window.",
    ),
    Refusal(
        "rollback",
        "None",
        lambda _: True,
        "its engine keeps weights and moments in partitions of its own, in two precisions",
        "Save checkpoints, and resume from one.",
    ),
    Refusal(
        "trace_forward",
        "False",
        bool,
        "to run a batch again takes all ranks, and gathers parameters while the engine counts its passes",
        "Leave it out; `bundles` keeps the batch, for a run on one device.",
    ),
    Refusal(
        "deferred",
        "None or False",
        bool,
        "the engine takes the step, so that no fused optimizer can skip it on the device",
        "Leave it out.",
    ),
    Refusal(
        "weights",
        '"reference" or "none"',
        lambda weights: weights == "full",
        "no rank has all weights",
        "Save checkpoints.",
    ),
    Refusal(
        "weight",
        "None",
        lambda _: True,
        "its engine divides a window by the number of its micro-batches",
        "Leave it out: AccumulationRescaling() takes micro-batches as equal.",
    ),
    Refusal(
        "divide", "False", bool, "its engine divides the losses of a window itself", "Leave it out, and do not divide your losses."
    ),
    Refusal("log_histograms", "False", bool, "ranks hold parts of the gradients", "Use log_statistics=True, which works on parts."),
)
"""The options that do not go with DeepSpeed, of all callbacks."""


def check_deepspeed(
    trainer: Trainer, module: LightningModule, options: Sequence[Mapping[str, Any]], *, clips: bool, estimates_noise: bool
) -> None:
    """Refuse, at the setup of a fit, what does not go with DeepSpeed. Nothing is refused under other strategies.

    Args:
        trainer: The Trainer.
        module: The module to train.
        options: The options of each gradient callback that some strategy refuses.
        clips: If True, a GradientClipping is among them.
        estimates_noise: If True, a GradientNoiseScale is among them.

    Raises:
        ValueError: If something is refused. The message says what to change.
    """
    if not uses_deepspeed(trainer):
        return
    for each in options:
        for refusal in REFUSED:
            refusal.check(each)
    if estimates_noise:
        raise ValueError(
            "GradientNoiseScale must not be used with DeepSpeed, whose engine adds a micro-batch to the window within the backward "
            "pass. Remove it, and estimate the noise scale in a short run on one device."
        )
    if not module.automatic_optimization:
        raise ValueError(
            "`automatic_optimization` must be True under DeepSpeed beside gradient callbacks, got False: only its engine knows "
            "which backward passes make a window. Use automatic optimization."
        )
    _check_configuration(trainer, clips=clips)


def _check_configuration(trainer: Trainer, *, clips: bool) -> None:
    configuration: Mapping[str, Any] = getattr(trainer.strategy, "config", None) or {}
    clipping = configuration.get("gradient_clipping")
    if clips and clipping:
        raise ValueError(
            f"`gradient_clipping` must not be set in DeepSpeed's configuration beside GradientClipping, got {clipping!r}: "
            "gradients would be clipped twice. Remove it there."
        )
    if trainer.precision not in {"32-true", "bf16-true", "bf16-mixed"}:
        raise ValueError(
            f'`precision` must be "32-true", "bf16-mixed" or "bf16-true" under DeepSpeed, got "{trainer.precision}": its engine '
            "owns the loss scale, and would lower it for each step that is skipped for another reason. Use bf16-mixed."
        )
    zero = configuration.get("zero_optimization")
    if not isinstance(zero, Mapping):
        zero = {}
    stage = zero.get("stage", 0)
    if stage not in {1, 2, 3}:
        raise ValueError(
            f"`stage` must be 1, 2 or 3 under DeepSpeed, got {stage!r}: without ZeRO its engine clips and steps in a way of its "
            "own. Set a stage, or use strategy='ddp', which does the same."
        )
    for name in ("offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_param"):  # the last two are older names
        offload = zero.get(name)
        if isinstance(offload, Mapping) and offload.get("device", "none") == "none":
            offload = None
        if offload:
            raise ValueError(
                f"`{name}` must be off in DeepSpeed's configuration, got {offload}: gradients leave the place where they could be "
                "measured before the step. Remove it, or remove the gradient callbacks and set `gradient_clipping` in DeepSpeed's "
                "configuration."
            )


def _check_optimizer(optimizer: Any) -> None:
    """Refuse optimizers of DeepSpeed whose gradients are not where they are looked for."""
    kind = type(optimizer).__name__
    if kind not in ATTRIBUTES:
        raise ValueError(
            f"DeepSpeed's optimizer must be that of ZeRO stage 1, 2 or 3, got {kind}, which keeps gradients elsewhere. "
            "Remove from DeepSpeed's configuration what has chosen it, such as `data_types.grad_accum_dtype` in stage 1, "
            "`mics_shard_size` or `zenflow`."
        )
    missing = [name for name in ATTRIBUTES[kind] if not hasattr(optimizer, name)]
    if missing:
        version = getattr(sys.modules.get("deepspeed"), "__version__", "an unknown version")
        raise RuntimeError(
            f"DeepSpeed must be of a version in which {kind} has {', '.join(missing)}, got {version}. "
            f"Install deepspeed>={NEEDED_VERSION}."
        )
    inner = type(optimizer.optimizer).__name__
    if "muon" in inner.lower():
        raise ValueError(
            f"`optimizer` must leave gradients as they are until its step under DeepSpeed, got {inner}: the engine replaces "
            "gradients by its updates before they can be clipped. Use another optimizer."
        )
    if getattr(optimizer, "torch_autocast_gradscaler", None) is not None:
        raise ValueError(
            "`torch_autocast` must have the dtype bfloat16 in DeepSpeed's configuration beside gradient callbacks, got float16: "
            "its engine owns the loss scale. Change the dtype, or remove it and set the precision of the Trainer."
        )
    if getattr(optimizer, "has_moe_layers", False):
        raise ValueError(
            "The module must have no experts of DeepSpeed (MoE) beside gradient callbacks: ranks hold gradients of different "
            "parameters. Remove the gradient callbacks, and set `gradient_clipping` in DeepSpeed's configuration."
        )


# --- one fit


@dataclass(eq=False)
class Part:
    """The part of one parameter that this rank holds.

    Args:
        parameter: The parameter of the module.
        group: The name of its parameter group.
        shape: The shape of the whole parameter.
        start: The position of the part's first entry in the flattened parameter.
        stand_in: The entries of the part, flat, a view of the engine's weights; its gradient is set for each step.
    """

    parameter: Tensor
    group: str
    shape: tuple[int, ...]
    start: int
    stand_in: Tensor


class EngineGradients:
    """The averaged gradients that DeepSpeed's engine holds before its step, as gradients of stand-ins of the parameters.

    Args:
        trainer: The Trainer, its engine made.
        clips: If True, this package clips, and the engine must not.

    Raises:
        ValueError, RuntimeError: If the engine keeps its gradients in another way.
    """

    def __init__(self, trainer: Trainer, *, clips: bool = False) -> None:
        self._trainer = trainer
        self._engine = cast("Any", trainer.strategy.model)
        self._optimizer: Any = self._engine.optimizer
        self._rank = trainer.global_rank
        self._clips = clips
        _check_optimizer(self._optimizer)
        self._is_stage_3 = hasattr(self._optimizer, "fp16_groups")
        self._checks_overflow: bool | None = None
        self._parts: list[Part] = []

    def make_table(self, module: LightningModule) -> TensorTable:
        """Make the table of the stand-ins, in the order of the optimizer's parameter groups, which is the same on all ranks."""
        self._parts = list(self._parts_of_stage_3() if self._is_stage_3 else self._parts_of_stages_1_and_2())
        names = {id(parameter): without_wrappers(name) for name, parameter in module.named_parameters()}
        tensors = tuple(part.stand_in for part in self._parts)
        shapes = tuple(part.shape for part in self._parts)
        starts = tuple(part.start for part in self._parts)
        # each entry is held by one rank, so that all parts count
        counts = torch.ones(len(tensors), dtype=torch.float64, device=tensors[0].device)
        count = len(tensors)
        reduction = Reduction((None,), counts, (False,) * count, shapes, (0,) * count, starts)
        return TensorTable(
            tensors, tuple(names[id(part.parameter)] for part in self._parts), tuple(part.group for part in self._parts), reduction
        )

    def _parts_of_stages_1_and_2(self) -> Iterator[Part]:
        optimizer = self._optimizer
        names = group_names(optimizer)
        for index, group in enumerate(optimizer.bit16_groups):
            starts = optimizer.grad_start_offset[index][self._rank]
            places = optimizer.grad_partition_insertion_offset[index][self._rank]
            weights = optimizer.single_partition_of_fp32_groups[index]
            for parameter in group:
                key = optimizer.get_param_id(parameter)
                start, place, size = 0, 0, 0
                if key in starts:
                    start, place = int(starts[key]), int(places[key])
                    size = min(parameter.numel() - start, int(optimizer.partition_size[index]) - place)
                stand_in = _stand_in(weights.narrow(0, place, size))
                yield Part(parameter, names[index], tuple(parameter.shape), start, stand_in)

    def _parts_of_stage_3(self) -> Iterator[Part]:
        optimizer = self._optimizer
        names = group_names(optimizer)
        for index, parameters in enumerate(optimizer.fp16_groups):
            group, place = names[optimizer.sub_group_to_group_id[index]], 0
            for parameter in parameters:
                length = parameter.ds_tensor.numel()
                # the last ranks hold padding, or nothing else
                start = min(length * self._rank, parameter.ds_numel)
                size = min(length, parameter.ds_numel - start)
                stand_in = _stand_in(optimizer.fp32_partitioned_groups_flat[index].narrow(0, place, size))
                place += length
                yield Part(parameter, group, tuple(parameter.ds_shape), start, stand_in)

    def begin_window(self) -> None:
        """Forget the gradients of the window before.

        Stage 3 keeps gradients in one buffer, to which a parameter that no micro-batch of a window uses does not write: its
        gradient of the last window would be applied once more.
        """
        if self._is_stage_3:
            self._optimizer.grad_partitions_flat_buffer.zero_()

    def collect(self) -> bool:
        """Set the gradients of the stand-ins; return False if this micro-batch ends no window.

        Raises:
            RuntimeError: If windows of DeepSpeed and of Lightning no longer end together.
        """
        self._end_skip()
        if not self._ends_window:
            return False
        if self._clips and self._optimizer.clip_grad:
            self._remove_second_clip()
        for part, gradient in zip(self._parts, self._gradients(), strict=True):
            part.stand_in.grad = gradient
        return True

    def check_windows(self, *, rescales: bool) -> None:
        """Refuse epochs that end within a window, where their length is known; called when training starts.

        Args:
            rescales: If True, the second division of the losses is undone; if not, a warning tells of it.

        Raises:
            ValueError: If an epoch ends within a window.
        """
        batches, window = self._trainer.num_training_batches, self._trainer.accumulate_grad_batches
        if window > 1 and not rescales:
            rank_zero_warn(
                f"Lightning and DeepSpeed each divide losses by accumulate_grad_batches={window}, so that gradients and their "
                f"norms are 1/{window} of the mean over a window. Choose limits for such norms, or add AccumulationRescaling(), "
                "which makes gradients the mean."
            )
        if self._trainer.max_epochs == 1 or math.isinf(batches) or not batches % window:
            return
        if 0 <= self._trainer.max_steps * window <= batches:  # the fit ends before the epoch does
            return
        raise ValueError(
            f"An epoch must be a multiple of accumulate_grad_batches={window} batches under DeepSpeed, got {batches}: its engine "
            "goes on with the open window in the next epoch, Lightning begins another one, and micro-batches are lost in between. "
            f"Set limit_train_batches to a multiple of {window}."
        )

    @property
    def _ends_window(self) -> bool:
        is_boundary: bool = self._engine.is_gradient_accumulation_boundary()
        batch, window = self._trainer.fit_loop.batch_idx, self._trainer.accumulate_grad_batches
        if is_boundary != ((batch + 1) % window == 0):
            raise RuntimeError(
                f"A window of {window} micro-batches has ended at another batch for DeepSpeed than for Lightning (batch {batch}): "
                "an epoch or a checkpoint has ended within one, and micro-batches were lost. Set limit_train_batches to a multiple "
                f"of {window}, and save checkpoints after optimizer steps."
            )
        return is_boundary

    def _remove_second_clip(self) -> None:
        # DeepSpeed restores this number from a checkpoint, whatever its configuration says
        rank_zero_warn(
            f"DeepSpeed would clip gradients a second time, at {self._optimizer.clip_grad}, as the run that wrote the checkpoint "
            "did. Its `clip_grad` is set to 0: GradientClipping clips.",
            category=RuntimeWarning,
        )
        self._optimizer.clip_grad = 0.0

    def _gradients(self) -> Iterator[Tensor | None]:
        """Yield the gradient of each part, flat, as a view to which a write reaches the engine; None where a part is empty."""
        optimizer = self._optimizer
        if self._is_stage_3:
            held = [gradient for index in range(len(optimizer.fp16_groups)) for gradient in self._in_float32(index)]
            for part, gradient in zip(self._parts, held, strict=True):
                size = part.stand_in.numel()
                yield gradient.narrow(0, 0, size) if size else None
            return
        for index, group in enumerate(optimizer.bit16_groups):
            held = [gradient for gradient in self._in_float32(index) if not getattr(gradient, "_zero_padding", False)]
            # not strict: padding at the end bears no mark
            pairs = zip(optimizer.params_in_partition[index], held, strict=False)
            found = {id(parameter): gradient.view(-1) for parameter, gradient in pairs}
            for parameter in group:
                yield found.get(id(parameter))

    def _in_float32(self, index: int) -> list[Tensor]:
        """Return the averaged gradients of a group in float32, and with their memory in order.

        The engine casts them to the data type of its weights itself, a moment later. Done before, clipping rounds nothing to bf16.
        """
        gradients: list[Tensor] = self._optimizer.averaged_gradients[index]
        for place, gradient in enumerate(gradients):
            if gradient.dtype != torch.float32 or not gradient.is_contiguous():
                gradients[place] = gradient.to(torch.float32, memory_format=torch.contiguous_format)
                gradients[place]._zero_padding = getattr(gradient, "_zero_padding", False)  # type: ignore[attr-defined]
        return gradients

    def skip(self) -> None:
        """Make the engine skip its coming step: by its own overflow path, on all ranks."""
        for group in self._optimizer.averaged_gradients.values():
            for place, gradient in enumerate(group[:1]):
                # not written into its memory, which stage 3 keeps: where this rank has only padding, it would stay there
                group[place] = torch.full_like(gradient, torch.nan)
        if not self._is_stage_3:  # which looks for overflows in any precision; stages 1 and 2 do not in bf16
            self._checks_overflow, self._optimizer.check_grad_overflow = self._optimizer.check_grad_overflow, True

    def _end_skip(self) -> None:
        if self._checks_overflow is not None:
            self._optimizer.check_grad_overflow, self._checks_overflow = self._checks_overflow, None

    def release(self) -> None:
        """Release the gradients, which the engine frees in its step."""
        for part in self._parts:
            part.stand_in.grad = None

    def detach(self) -> None:
        """Release the gradients, and leave the engine as it was."""
        self.release()
        self._end_skip()


def _stand_in(weights: Tensor) -> Tensor:
    # a leaf of its own, which shares the memory of the weights; it learns, as the parameter does
    return weights.detach().view(-1).requires_grad_()
