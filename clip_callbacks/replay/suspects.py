"""Which of the calls began it: the rules, and what is said."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from clip_callbacks.replay.module_recorder import Call
from clip_callbacks.replay.ranges import Range

Guilt: TypeAlias = Literal["output", "gradient", "output explodes", "gradient explodes"]

TITLES: dict[Guilt, str] = {
    "output": "First non-finite output",
    "gradient": "First non-finite gradient",
    "output explodes": "First output that explodes",
    "gradient explodes": "First gradient that explodes",
}


@dataclass(frozen=True)
class Culprit:
    """A call that has made of finite numbers others, or of numbers much larger ones.

    Args:
        guilt: Of what.
        call: Which.
        text: What it made of what.
    """

    guilt: Guilt
    call: Call
    text: str

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {"guilt": self.guilt, **self.call.facts(), "text": self.text}

    def __str__(self) -> str:
        """One line."""
        return f"{TITLES[self.guilt]}: {self.call.label}: {self.text}"


def find_culprits(calls: Sequence[Call], factor: float) -> list[Culprit]:
    """The first of each kind that there is; of calls within each other, the innermost.

    Args:
        calls: In the order in which they began.
        factor: How many times larger than what comes in is an explosion.
    """
    around = {above for call in calls if call.parameters for above in call.above()}  # what comes out of those is no wonder
    forward = sorted((call for call in calls if call.done is not None and call not in around), key=lambda call: call.done or 0)
    backward = sorted(calls, key=lambda call: call.first_bad or 0)
    infected = {call.name for call in calls if call.gradient and not call.gradient.is_finite}
    receding = list(reversed(forward))
    found = [
        _first("output", forward, _makes_nonfinite, lambda call: _forward_text(call, calls)),
        _first("gradient", backward, lambda call: _breaks_gradient(call, infected), _backward_text),
        _first("output explodes", forward, lambda call: _explodes(call.inputs, call.outputs, factor), _growth_text),
        _first(
            "gradient explodes", receding, lambda call: _explodes(call.gradient, call.gradient_in, factor), _gradient_growth_text
        ),
    ]
    return [culprit for culprit in found if culprit]


def _first(guilt: Guilt, calls: Iterable[Call], is_guilty: Callable[[Call], bool], text: Callable[[Call], str]) -> Culprit | None:
    guilty = [call for call in calls if is_guilty(call)]
    outer = {above for call in guilty for above in call.above()}
    innermost = [call for call in guilty if call not in outer]
    return Culprit(guilt, innermost[0], text(innermost[0])) if innermost else None


def _makes_nonfinite(call: Call) -> bool:
    """Whether NaN, or infinite numbers, come out that have not gone in; masks of -inf go in and are no fault."""
    if call.outputs is None or call.parameters or call.absorbed:
        return False
    nan_in, inf_in = (call.inputs.nan, call.inputs.inf) if call.inputs else (0, 0)
    return not nan_in and (bool(call.outputs.nan) or (bool(call.outputs.inf) and not inf_in))


def _breaks_gradient(call: Call, infected: AbstractSet[str]) -> bool:
    """Whether it does; under autocast calls of one module share the cast of its parameters, and what flows back into that."""
    if call.first_bad is None or call.gradient is None or not call.gradient.is_finite:
        return False
    return bool(call.gradient_in and not call.gradient_in.is_finite) or call.name not in infected


def _explodes(before: Range | None, after: Range | None, factor: float) -> bool:
    if before is None or after is None or not before.is_finite or not after.is_finite:
        return False
    return 0 < before.largest * factor < after.largest


def _forward_text(call: Call, calls: Sequence[Call]) -> str:
    assert call.outputs is not None
    if call.inputs is None:
        inputs = "inputs without floating-point numbers"
    elif call.inputs.is_finite:
        inputs = f"inputs finite in {call.inputs}"
    else:
        inputs = f"inputs {call.inputs} (what is infinite there is of no module: a mask, the batch, or code before it)"
    text = f"output {call.outputs.faults()}, {inputs}"
    inside = [inner for inner in calls if inner.parent is call]
    if not inside:
        return text
    received = next((inner for inner in inside if inner.inputs and not inner.inputs.is_finite), None)
    where = f"before it calls {received.label}" if received else f"after it has called {inside[-1].label}"
    return f"{text}; no module inside did it: it is in its own forward, {where}"


def _backward_text(call: Call) -> str:
    bad = call.gradient_in if call.gradient_in and not call.gradient_in.is_finite else None
    what = f"gradient at its input {bad.faults()}" if bad else "gradients of its own parameters non-finite"
    already = "; NaN went into it already" if call.inputs and call.inputs.nan else ""
    return f"{what}, finite in {call.gradient} at its output{already}"


def _growth_text(call: Call) -> str:
    assert call.inputs is not None
    assert call.outputs is not None
    return f"output {call.outputs}, {call.outputs.largest / call.inputs.largest:.3g} times its inputs {call.inputs}"


def _gradient_growth_text(call: Call) -> str:
    assert call.gradient is not None
    assert call.gradient_in is not None
    times = call.gradient_in.largest / call.gradient.largest
    return f"gradient at its input {call.gradient_in}, {times:.3g} times that at its output, {call.gradient}"
