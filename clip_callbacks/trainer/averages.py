"""Running averages of the weights that other callbacks of the Trainer, or the module itself, hold."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from clip_callbacks.trainer.compat import STOCHASTIC_WEIGHT_AVERAGING, WEIGHT_AVERAGING, is_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

Place: TypeAlias = tuple[int, str]
"""A callback's number and its attribute."""


def live_averages(trainer: Trainer) -> dict[Place, dict[str, Any]]:
    """The tensors of every ``AveragedModel`` that a callback holds, as WeightAveraging does, and of SWA's once it has begun."""
    found: dict[Place, dict[str, Any]] = {}
    for number, callback in enumerate(trainer.callbacks):  # type: ignore[attr-defined]
        models = {name: value for name, value in vars(callback).items() if isinstance(value, AveragedModel)}
        found |= {(number, name): _tensors(model) for name, model in models.items()}
        if is_of(callback, STOCHASTIC_WEIGHT_AVERAGING) and callback.n_averaged is not None:
            assert callback._average_model is not None
            found[number, "_average_model"] = {"n_averaged": callback.n_averaged, **_tensors(callback._average_model)}
    return found


def begin_anew(trainer: Trainer, module: LightningModule, places: Collection[Place]) -> None:
    """Let SWA begin with the weights as they are now where it has begun since a copy was made: it has averaged what is gone."""
    for number, _ in places:
        callback = trainer.callbacks[number]  # type: ignore[attr-defined]
        if is_of(callback, STOCHASTIC_WEIGHT_AVERAGING):
            assert callback.n_averaged is not None
            assert callback._average_model is not None
            callback.n_averaged.zero_()
            callback.update_parameters(callback._average_model, module, callback.n_averaged, callback._avg_fn)


def _tensors(model: nn.Module) -> dict[str, Any]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


class AveragingHold:
    """WeightAveraging callbacks, which average as if skipped steps had not been taken.

    After each batch they compare ``global_step`` with its value when they averaged last, and ask their ``should_update`` with the
    number of the last step; both count skipped steps. The first is told at a skip, whichever comes first in the Trainer's list. The
    second, which may say "every n steps", is from the first skip on asked with the number less the steps skipped.

    Args:
        trainer: The Trainer.
        skipped_steps: How many optimizer steps of the run were skipped, those before a resume too.
    """

    def __init__(self, trainer: Trainer, skipped_steps: Callable[[], int]) -> None:
        self._trainer = trainer
        self._skipped_steps = skipped_steps
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        self._callbacks = [callback for callback in callbacks if is_of(callback, WEIGHT_AVERAGING)]
        if skipped_steps():
            self.renumber()

    @property
    def holds(self) -> bool:
        """Whether there is any callback that a skipped step holds."""
        return bool(self._callbacks)

    def hold(self) -> None:
        """Leave the batch out: its step is about to be skipped. A step that is taken later in the batch counts all the same."""
        for callback in self._callbacks:
            callback._latest_update_step = self._trainer.global_step + 1

    def renumber(self) -> None:
        """Leave skipped steps out of the numbers of steps."""
        for callback in self._callbacks:
            if not isinstance(callback.should_update, _Renumbered):
                callback.should_update = _Renumbered(callback.should_update, self._skipped_steps)

    def release(self) -> None:
        """Leave nothing on the callbacks."""
        for callback in self._callbacks:
            renumbered = callback.should_update
            if isinstance(renumbered, _Renumbered):
                del callback.should_update
                if callback.should_update != renumbered.original:  # somebody else has hung it there
                    callback.should_update = renumbered.original


class _Renumbered:
    """A callback's ``should_update``, which does not count skipped steps; in a copy of the callback, its own.

    Args:
        original: The method.
        skipped_steps: How many steps were skipped.
    """

    def __init__(self, original: Callable[..., bool], skipped_steps: Callable[[], int]) -> None:
        self.original = original
        self._skipped_steps = skipped_steps

    def __call__(self, step_idx: int | None = None, **options: Any) -> bool:
        if step_idx is not None:
            options["step_idx"] = step_idx - self._skipped_steps()
        return self.original(**options)

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.original,)


def _itself(method: Callable[..., bool]) -> Callable[..., bool]:
    return method


def weights_apart(trainer: Trainer, module: LightningModule) -> dict[str, list[Tensor]]:
    """What looks like weights and is trained by no optimizer of the Trainer, by a name for the user.

    Of the module: every ``AveragedModel``, and the largest submodules, and single parameters, that no optimizer trains. Of the
    module's and the callbacks' attributes: modules, and lists and dictionaries of tensors of the shapes of the module's parameters.
    Buffers are none of it, but those of an ``AveragedModel``.
    """
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    trained = {id(tensor) for group in groups for tensor in group["params"] if tensor.requires_grad}
    found = {name: [tensor for tensor in tensors if not is_lazy(tensor)] for name, tensors in _apart(module, trained, "")}
    known = set(map(id, (*module.parameters(), *module.buffers())))
    outlines = _outlines(module, trained)
    for holder in (module, *trainer.callbacks):  # type: ignore[attr-defined]
        for name, value in vars(holder).items():
            tensors = [tensor for tensor in _weights_in(value, outlines) if id(tensor) not in known and not is_lazy(tensor)]
            found.setdefault(f"{type(holder).__name__}.{name}", []).extend(tensors)
    return {name: tensors for name, tensors in found.items() if tensors}


def _apart(module: nn.Module, trained: set[int], name: str) -> Iterator[tuple[str, list[Tensor]]]:
    tensors: list[Tensor] = list(module.parameters())
    if isinstance(module, AveragedModel):  # in an optimizer too, where that was given all parameters
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
        yield from _apart(child, trained, prefix + key)


Outline: TypeAlias = list[tuple[int, ...]]
"""The shapes of tensors, sorted."""


def _outlines(module: nn.Module, trained: set[int]) -> list[Outline]:
    """Those of all parameters, of the trained ones, and of parameters and buffers."""
    parameters, buffers = list(module.parameters()), list(module.buffers())
    kinds = (parameters, [tensor for tensor in parameters if id(tensor) in trained], [*parameters, *buffers])
    return [_outline(kind) for kind in kinds if not any(map(is_lazy, kind))]


def _outline(tensors: Collection[Tensor]) -> Outline:
    return sorted(tuple(tensor.shape) for tensor in tensors)


def _weights_in(value: object, outlines: Collection[Outline]) -> list[Tensor]:
    """The weights that an attribute holds, if it holds any."""
    if isinstance(value, AveragedModel):
        return [*value.parameters(), *value.buffers()]
    if isinstance(value, nn.Module):
        return list(value.parameters())
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, (list, tuple)) or not any(len(value) == len(outline) for outline in outlines):
        return []
    if not all(isinstance(each, Tensor) and not is_lazy(each) for each in value):
        return []
    return list(value) if _outline(value) in outlines else []
