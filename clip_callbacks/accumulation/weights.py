"""Weights of micro-batches: the number of labels or samples that a loss is a mean over."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

from torch import Tensor

from clip_callbacks.bundles.batch_tensors import tensors_in
from clip_callbacks.core.arguments import as_flag

Weight: TypeAlias = Callable[[Any], Any]
"""Function from the batch that ``training_step`` gets to a weight of at least 0: a Python number, or a tensor of one entry."""


@dataclass(frozen=True)
class LabelTokens:
    r"""Weighs a micro-batch by its number of labels that count in the loss: :math:`w = \#\{j : y_j \ne \text{ignore\_index}\}`.

    For losses that are means over labels, such as ``torch.nn.functional.cross_entropy`` with its default reduction.

    Args:
        key: Place of the labels in the batch: a key of a dict, an index of a tuple or list, or the name of an attribute; for nested
            batches several of them, separated by dots, as in ``"target.labels"`` or ``"1.labels"``.
        ignore_index: The label that the loss ignores.
        shifted: If True, the first label of each sequence is not counted, because the model predicts each label from those before
            it. Causal language models of Hugging Face do so when they compute the loss.

    Raises:
        ValueError: If ``ignore_index`` is not a whole number.

    Example::

        >>> LabelTokens("labels")({"labels": torch.tensor([[5, 7, -100], [1, -100, -100]])})
        tensor(3)
        >>> LabelTokens(1)((torch.zeros(2, 3), torch.tensor([4, -100])))
        tensor(1)
    """

    key: str | int = "labels"
    ignore_index: int = -100
    shifted: bool = False

    def __post_init__(self) -> None:
        """Check the label, which torch would compare with any object."""
        if not isinstance(self.ignore_index, int) or isinstance(self.ignore_index, bool):
            raise ValueError(f"`ignore_index` must be a whole number, such as -100, got {self.ignore_index!r}.")
        object.__setattr__(self, "shifted", as_flag(self.shifted, "shifted"))

    def __call__(self, batch: Any) -> Tensor:
        """Count the labels, without a host sync.

        Returns:
            Number of labels, int64, 0-dim, on the device of the labels.

        Raises:
            ValueError: If the batch has no labels at ``key``; it describes the batch.
        """
        labels = batch
        for part in str(self.key).split("."):
            labels = _item(labels, part, self.key)
        if not isinstance(labels, Tensor):
            raise ValueError(f"`key` must lead to a tensor of labels, got {self.key!r}, where the batch has {_described(labels)}.")
        if self.shifted:
            labels = labels[..., 1:]
        return (labels != self.ignore_index).sum()


@dataclass(frozen=True)
class BatchSize:
    """Weighs a micro-batch by its number of samples: the length of its tensors along their first dimension.

    For losses that are means over samples, if micro-batches differ in size, as the last one of an epoch often does.

    Example::

        >>> BatchSize()({"image": torch.zeros(3, 8, 8), "label": torch.zeros(3)})
        3
    """

    def __call__(self, batch: Any) -> int:
        """Return the length.

        Raises:
            ValueError: If the batch has no tensors, or tensors of different lengths.
        """
        # 0-dim tensors, such as a temperature for the whole batch, have no length
        lengths = {len(tensor) for tensor in tensors_in(batch) if tensor.ndim}
        if len(lengths) != 1:
            raise ValueError(
                f"the batch must hold tensors of one length, got {_described(batch)} with lengths {sorted(lengths)}. "
                "Pass a function from the batch to its size as `weight`."
            )
        return lengths.pop()


def count_samples(batch: Any) -> int | None:
    """Return the length of a batch's tensors along their first dimension; None if there are none, or their lengths differ."""
    try:
        return BatchSize()(batch)
    except ValueError:
        return None


def checked(weight: Any, source: Weight, batch_idx: int) -> float:
    """Return a weight as a number.

    Raises:
        ValueError: If it is not a finite number of at least 0; it names the callable and the batch.
    """
    number = _number(weight)
    if number is None or not 0.0 <= number < math.inf:
        raise ValueError(
            f"`weight` must return a finite number of at least 0, got {weight!r} from {name_of(source)} for batch {batch_idx}."
        )
    return number


def name_of(source: Weight) -> str:
    """Return the name of a callable."""
    return str(getattr(source, "__qualname__", None) or repr(source))


def _number(weight: Any) -> float | None:
    # bool is a Real, but True is most likely a comparison that was not summed
    is_number = isinstance(weight, Real) and not isinstance(weight, bool)
    if is_number or (isinstance(weight, Tensor) and weight.numel() == 1 and not weight.is_complex()):
        return float(weight)
    return None


def _item(batch: Any, part: str, key: str | int) -> Any:
    if isinstance(batch, Mapping) and part in batch:
        return batch[part]
    # the key was split at its dots, so that integers arrive as text
    if isinstance(batch, Mapping) and part.isdigit() and int(part) in batch:
        return batch[int(part)]
    if (
        isinstance(batch, Sequence)
        and not isinstance(batch, str)
        and part.lstrip("-").isdigit()
        and -len(batch) <= int(part) < len(batch)
    ):
        return batch[int(part)]
    # attributes of a mapping, such as `values`, are no labels
    if part.isidentifier() and hasattr(batch, part) and not isinstance(batch, Mapping):
        return getattr(batch, part)
    raise ValueError(f"`key` must lead to the labels of a batch, got {key!r}: there is no {part!r} in {_described(batch)}.")


def _described(batch: Any) -> str:
    name = type(batch).__name__
    if isinstance(batch, Mapping):
        return f"a {name} with keys {sorted(map(str, batch))}"
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return f"a {name} of {len(batch)}"
    return f"a {name}"
