"""One call of a module during a replay: the ranges of its inputs, outputs and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from clip_callbacks.replay.ranges import ValueRange


@dataclass(eq=False)
class ModuleCall:
    """One call of a module.

    Args:
        name: Name of the module in ``named_modules``; "" for the LightningModule itself.
        class_name: Name of the module's class.
        number: Number of this call among all calls of the module, counted from 1.
        parent: The call during which this one was made; None if it was made by the training step.
        inputs: Range of the inputs; None without floating-point inputs.
        nonfinite_tensors: Names of the module's own parameters and buffers that were non-finite before the call.
        outputs: Range of the outputs; None while the call runs, or without floating-point outputs.
        end_order: Position in the order in which calls end; None while the call runs, or if it raised.
        grad_output: Range of the gradient of the loss with respect to the outputs.
        grad_input: Range of the part of the inputs' gradient that flows back through this call, without other uses of the inputs.
        nonfinite_since: Time in the backward pass, in recorded gradients, at which the gradient of the call's inputs or own
            parameters was non-finite for the first time; None if it never was.
        is_absorbed: If True, the outputs were infinite, but all modules that took them returned finite outputs.
    """

    name: str
    class_name: str
    number: int = 1
    parent: ModuleCall | None = None
    inputs: ValueRange | None = None
    nonfinite_tensors: tuple[str, ...] = ()
    outputs: ValueRange | None = None
    end_order: int | None = None
    grad_output: ValueRange | None = None
    grad_input: ValueRange | None = None
    nonfinite_since: int | None = None
    is_absorbed: bool = False

    @property
    def label(self) -> str:
        """Name and class of the module, with the number of the call from the second one on."""
        label = self.class_name
        if self.number > 1:
            label += f", call {self.number}"
        if self.name:
            label = f"{self.name} ({label})"
        return label

    @property
    def is_finite(self) -> bool:
        """Whether everything that was recorded is finite, in the forward and in the backward pass."""
        ranges = (self.inputs, self.outputs, self.grad_output, self.grad_input)
        has_finite_tensors = not self.nonfinite_tensors and self.nonfinite_since is None
        return has_finite_tensors and all(values is None or values.is_finite for values in ranges)

    def ancestors(self) -> Iterator[ModuleCall]:
        """Iterate over the calls during which this one was made, from the innermost to the outermost."""
        call = self.parent
        while call is not None:
            yield call
            call = call.parent

    def facts(self) -> dict[str, Any]:
        """Return the call for JSON."""
        ranges = {"inputs": self.inputs, "outputs": self.outputs, "gradient": self.grad_output, "gradient_in": self.grad_input}
        facts = {key: values and values.facts() for key, values in ranges.items()}
        return {"name": self.name, "class": self.class_name, "call": self.number, **facts}
