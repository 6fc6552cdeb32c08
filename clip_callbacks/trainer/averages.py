"""Running averages of the weights, held by callbacks of the Trainer or by the module itself.

Trap: a skipped step leaves the weights as they are, but advances ``trainer.global_step``, by which WeightAveraging and
EMAWeightAveraging decide in ``on_train_batch_end`` whether to average. They would average the same weights once more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from clip_callbacks.trainer.compat import STOCHASTIC_WEIGHT_AVERAGING, WEIGHT_AVERAGING, is_instance
from clip_callbacks.trainer.deepspeed import uses_deepspeed

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

Place: TypeAlias = tuple[int, str]
"""The position of a callback in the Trainer's list, and the name of one of its attributes."""


def live_averages(trainer: Trainer) -> dict[Place, dict[str, Any]]:
    """Return the tensors of each ``AveragedModel`` that a callback holds, and of SWA's average once SWA has begun."""
    found: dict[Place, dict[str, Any]] = {}
    for number, callback in enumerate(trainer.callbacks):  # type: ignore[attr-defined]
        models = {name: value for name, value in vars(callback).items() if isinstance(value, AveragedModel)}
        found |= {(number, name): _tensors(model) for name, model in models.items()}
        if is_instance(callback, STOCHASTIC_WEIGHT_AVERAGING) and callback.n_averaged is not None:
            assert callback._average_model is not None  # a plain module, and no AveragedModel
            found[number, "_average_model"] = {"n_averaged": callback.n_averaged, **_tensors(callback._average_model)}
    return found


def restart_swa(trainer: Trainer, module: LightningModule, places: Collection[Place]) -> None:
    """Restart SWA from the present weights where it has begun since a rollback's copy: the averaged weights are gone.

    Args:
        trainer: The Trainer.
        module: The module in training.
        places: The averages that exist now and did not when the copy was made.
    """
    for number, _ in places:
        callback = trainer.callbacks[number]  # type: ignore[attr-defined]
        if is_instance(callback, STOCHASTIC_WEIGHT_AVERAGING):
            assert callback.n_averaged is not None
            assert callback._average_model is not None
            callback.n_averaged.zero_()
            callback.update_parameters(callback._average_model, module, callback.n_averaged, callback._avg_fn)


def _tensors(model: nn.Module) -> dict[str, Any]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


class AveragingHold:
    """Makes WeightAveraging callbacks average as if skipped steps did not exist.

    After each batch they compare ``global_step`` with its value at the last average, and pass the number of the last step to
    ``should_update``; both count skipped steps. The first value is set at a skip, whatever the order of callbacks. The second may
    be used as in "every n steps": from the first skip on, ``should_update`` is passed the number without the skipped steps.

    Args:
        trainer: The Trainer.
        skipped_steps: Function that returns the number of skipped optimizer steps of the run, including those before a resume.
    """

    def __init__(self, trainer: Trainer, skipped_steps: Callable[[], int]) -> None:
        self._trainer = trainer
        self._skipped_steps = skipped_steps
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        self._callbacks = [callback for callback in callbacks if is_instance(callback, WEIGHT_AVERAGING)]
        if skipped_steps():
            self.renumber()

    @property
    def holds(self) -> bool:
        """True if there is a callback that leaves skipped steps out."""
        return bool(self._callbacks)

    def hold(self) -> None:
        """Leave this batch out of averages, because its step is about to be skipped.

        A later step of the same batch, of another optimizer, raises ``global_step`` further and is averaged.
        """
        for callback in self._callbacks:
            callback._latest_update_step = self._trainer.global_step + 1

    def renumber(self) -> None:
        """Leave skipped steps out of the step numbers that ``should_update`` is passed."""
        for callback in self._callbacks:
            if not isinstance(callback.should_update, _ShouldUpdateOnTakenSteps):
                callback.should_update = _ShouldUpdateOnTakenSteps(callback.should_update, self._skipped_steps)

    def release(self) -> None:
        """Restore the callbacks' own ``should_update``."""
        for callback in self._callbacks:
            renumbered = callback.should_update
            if isinstance(renumbered, _ShouldUpdateOnTakenSteps):
                del callback.should_update
                if callback.should_update != renumbered.original:  # it was an attribute of the instance, set by other code
                    callback.should_update = renumbered.original


class _ShouldUpdateOnTakenSteps:
    """A callback's ``should_update``, which does not count skipped steps. Its copy is the callback's own method.

    Args:
        original: The method.
        skipped_steps: Function that returns the number of skipped steps.
    """

    def __init__(self, original: Callable[..., bool], skipped_steps: Callable[[], int]) -> None:
        self.original = original
        self._skipped_steps = skipped_steps

    def __call__(self, step_idx: int | None = None, **options: Any) -> bool:
        if step_idx is not None:
            options["step_idx"] = step_idx - self._skipped_steps()
        return self.original(**options)

    def __reduce__(self) -> tuple[Any, ...]:
        return _identity, (self.original,)


def _identity(method: Callable[..., bool]) -> Callable[..., bool]:
    return method


def untrained_weights(trainer: Trainer, module: LightningModule) -> dict[str, list[Tensor]]:
    """Find tensors that look like weights but are in no optimizer of the Trainer: they may be averages that the user maintains.

    From the module these are every ``AveragedModel``, the largest submodules without trained parameters, and single untrained
    parameters. From attributes of the module and the callbacks these are modules, and lists and dictionaries of tensors with the
    shapes of the module's parameters. Buffers are left out, except those of an ``AveragedModel``.

    Returns:
        The tensors by a name for messages, such as ``"target"`` or ``"Module.shadow"``.
    """
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    trained = {id(tensor) for group in groups for tensor in group["params"] if tensor.requires_grad}
    if uses_deepspeed(trainer):  # whose optimizer holds partitions of them
        trained |= {id(tensor) for tensor in module.parameters() if tensor.requires_grad}
    submodules = _untrained_submodules(module, trained, "")
    found = {name: [tensor for tensor in tensors if not is_lazy(tensor)] for name, tensors in submodules}
    known = set(map(id, (*module.parameters(), *module.buffers())))
    shape_lists = _shape_lists(module, trained)
    for holder in (module, *trainer.callbacks):  # type: ignore[attr-defined]
        for name, value in vars(holder).items():
            tensors = [tensor for tensor in _weights_in(value, shape_lists) if id(tensor) not in known and not is_lazy(tensor)]
            found.setdefault(f"{type(holder).__name__}.{name}", []).extend(tensors)
    return {name: tensors for name, tensors in found.items() if tensors}


def _untrained_submodules(module: nn.Module, trained: set[int], name: str) -> Iterator[tuple[str, list[Tensor]]]:
    tensors: list[Tensor] = list(module.parameters())
    if isinstance(module, AveragedModel):  # its parameters are in the optimizer too if that was given module.parameters()
        yield name, [*tensors, *module.buffers()]
        return
    if trained.isdisjoint(map(id, tensors)) and name:
        yield name, tensors
        return
    prefix = name and f"{name}."
    for key, parameter in module.named_parameters(recurse=False):
        if id(parameter) not in trained:
            yield prefix + key, [parameter]
    for key, child in module.named_children():
        yield from _untrained_submodules(child, trained, prefix + key)


ShapeList: TypeAlias = list[tuple[int, ...]]
"""The sorted shapes of some tensors."""


def _shape_lists(module: nn.Module, trained: set[int]) -> list[ShapeList]:
    """Return the shapes of all parameters, of the trained parameters, and of parameters and buffers."""
    parameters, buffers = list(module.parameters()), list(module.buffers())
    kinds = (parameters, [tensor for tensor in parameters if id(tensor) in trained], [*parameters, *buffers])
    return [_shapes(kind) for kind in kinds if not any(map(is_lazy, kind))]


def _shapes(tensors: Collection[Tensor]) -> ShapeList:
    return sorted(tuple(tensor.shape) for tensor in tensors)


def _weights_in(value: object, shape_lists: Collection[ShapeList]) -> list[Tensor]:
    """Return the weights that an attribute holds; an empty list if it holds none."""
    if isinstance(value, AveragedModel):
        return [*value.parameters(), *value.buffers()]
    if isinstance(value, nn.Module):
        return list(value.parameters())
    if isinstance(value, dict):
        value = list(value.values())
    # the cheap comparison of lengths first: attributes may hold long lists
    if not isinstance(value, (list, tuple)) or not any(len(value) == len(shapes) for shapes in shape_lists):
        return []
    if not all(isinstance(each, Tensor) and not is_lazy(each) for each in value):
        return []
    return list(value) if _shapes(value) in shape_lists else []
