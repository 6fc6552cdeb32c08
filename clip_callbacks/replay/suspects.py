"""Suspect modules: calls whose output or gradient was the first to be non-finite, or to explode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from clip_callbacks.replay.module_calls import ModuleCall
from clip_callbacks.replay.ranges import ValueRange

Fault: TypeAlias = Literal["output", "gradient", "output explodes", "gradient explodes"]

TITLES: dict[Fault, str] = {
    "output": "First non-finite output",
    "gradient": "First non-finite gradient",
    "output explodes": "First exploding output",
    "gradient explodes": "First exploding gradient",
}


@dataclass(frozen=True)
class SuspectModule:
    """A module call that made non-finite values from finite ones, or values much larger than those it was given.

    Args:
        fault: The values concerned, the output or the gradient, and whether they explode or are non-finite.
        call: The call.
        text: The ranges of the values before and after the call, in words.
    """

    fault: Fault
    call: ModuleCall
    text: str

    def facts(self) -> dict[str, Any]:
        """Return the suspect for JSON."""
        return {"fault": self.fault, **self.call.facts(), "text": self.text}

    def __str__(self) -> str:
        """Return one line."""
        return f"{TITLES[self.fault]}: {self.call.label}: {self.text}"


def find_suspects(calls: Sequence[ModuleCall], factor: float) -> list[SuspectModule]:
    """Find the first suspect of each fault; among nested calls, the innermost.

    Args:
        calls: All calls, in the order in which they began.
        factor: Ratio of the largest value after a call to the largest one before it, above which values explode.
    """
    # a call that contains one with non-finite parameters must return non-finite values: it is no suspect
    excused = {ancestor for call in calls if call.nonfinite_tensors for ancestor in call.ancestors()}
    ended = [call for call in calls if call.end_order is not None and call not in excused]
    forward = sorted(ended, key=lambda call: call.end_order or 0)
    backward = sorted(calls, key=lambda call: call.nonfinite_since or 0)
    names_with_bad_output_gradient = {call.name for call in calls if call.grad_output and not call.grad_output.is_finite}
    suspects = [
        _first("output", forward, _makes_nonfinite_output, lambda call: _describe_output(call, calls)),
        _first(
            "gradient",
            backward,
            lambda call: _makes_nonfinite_gradient(call, names_with_bad_output_gradient),
            _describe_gradient,
        ),
        _first("output explodes", forward, lambda call: _explodes(call.inputs, call.outputs, factor), _describe_output_growth),
        _first(
            "gradient explodes",
            reversed(forward),
            lambda call: _explodes(call.grad_output, call.grad_input, factor),
            _describe_gradient_growth,
        ),
    ]
    return [suspect for suspect in suspects if suspect]


def _first(
    fault: Fault, calls: Iterable[ModuleCall], is_suspect: Callable[[ModuleCall], bool], describe: Callable[[ModuleCall], str]
) -> SuspectModule | None:
    suspects = [call for call in calls if is_suspect(call)]
    outer = {ancestor for call in suspects for ancestor in call.ancestors()}
    innermost = next((call for call in suspects if call not in outer), None)
    if innermost is None:
        return None
    return SuspectModule(fault, innermost, describe(innermost))


def _makes_nonfinite_output(call: ModuleCall) -> bool:
    """Return whether a call made NaN, or infinities from finite inputs; inputs such as masks may hold -inf."""
    if call.outputs is None or call.nonfinite_tensors or call.is_absorbed:
        return False
    if call.inputs is None:
        return not call.outputs.is_finite
    return not call.inputs.nan and (bool(call.outputs.nan) or (bool(call.outputs.inf) and not call.inputs.inf))


def _makes_nonfinite_gradient(call: ModuleCall, names_with_bad_output_gradient: AbstractSet[str]) -> bool:
    """Return whether a finite gradient at the output became non-finite at the inputs or own parameters.

    Under autocast all calls of a module share one cast of its parameters, and the gradient of that cast. So a module's parameters
    do not count if the gradient at the output of any of its calls is non-finite.
    """
    if call.nonfinite_since is None or call.grad_output is None or not call.grad_output.is_finite:
        return False
    if call.grad_input and not call.grad_input.is_finite:
        return True
    return call.name not in names_with_bad_output_gradient


def _explodes(before: ValueRange | None, after: ValueRange | None, factor: float) -> bool:
    if before is None or after is None or not before.is_finite or not after.is_finite:
        return False
    return 0 < before.largest * factor < after.largest


def _describe_output(call: ModuleCall, calls: Sequence[ModuleCall]) -> str:
    assert call.outputs is not None
    if call.inputs is None:
        inputs = "it has no floating-point inputs"
    elif call.inputs.is_finite:
        inputs = f"its inputs are finite, in {call.inputs}"
    else:
        inputs = f"its inputs are {call.inputs}, and no module made these infinities: look at the batch, masks and code before it"
    text = f"its output has {call.outputs.describe_nonfinite()}, {inputs}"
    inside = [inner for inner in calls if inner.parent is call]
    if not inside:
        return text
    received = next((inner for inner in inside if inner.inputs and not inner.inputs.is_finite), None)
    where = f"after it has called {inside[-1].label}"
    if received:
        where = f"before it calls {received.label}"
    return f"{text}; its own forward made them, not a module inside it: {where}"


def _describe_gradient(call: ModuleCall) -> str:
    if call.grad_input and not call.grad_input.is_finite:
        what = f"the gradient at its input has {call.grad_input.describe_nonfinite()}"
    else:
        what = "the gradients of its own parameters are non-finite"
    text = f"{what}, the gradient at its output is finite, in {call.grad_output}"
    if call.inputs and call.inputs.nan:
        text += "; its inputs already have NaN"
    return text


def _describe_output_growth(call: ModuleCall) -> str:
    assert call.inputs is not None
    assert call.outputs is not None
    times = call.outputs.largest / call.inputs.largest
    return f"its output, in {call.outputs}, is {times:.3g} times as large as its inputs, in {call.inputs}"


def _describe_gradient_growth(call: ModuleCall) -> str:
    assert call.grad_output is not None
    assert call.grad_input is not None
    times = call.grad_input.largest / call.grad_output.largest
    return f"the gradient at its input, in {call.grad_input}, is {times:.3g} times as large as at its output, in {call.grad_output}"
