"""Hooks on every module: what goes in, what comes out, and the gradients that flow back, in the order in which it happens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from clip_callbacks.core.nonfinite import all_finite, has_arithmetic
from clip_callbacks.core.tensor_table import learns, without_wrappers
from clip_callbacks.replay.ranges import Range, floats_in


@dataclass(eq=False)
class Call:
    """One call of a module.

    Args:
        name: Of the module, as ``named_modules`` has it; "" is the LightningModule itself.
        kind: Its class.
        number: Which of its calls this is, from 1.
        parent: The call that it was made in.
        inputs: What went in; None without a floating-point tensor.
        parameters: Names of the module's own parameters and buffers that were not finite already.
        outputs: What came out; None while it is running, or without a floating-point tensor.
        done: Its place in the order in which calls end; None while it is running, or if it raised.
        gradient: Of the loss, at the outputs.
        gradient_in: Of the loss, at the inputs: what flows back into them from this call, not from their other uses.
        first_bad: When, in the backward pass, what flows from this call to its inputs or its own parameters was first not finite.
        absorbed: Whether what was infinite in the outputs went into other modules, and came out of all of them finite.
    """

    name: str
    kind: str
    number: int = 1
    parent: Call | None = None
    inputs: Range | None = None
    parameters: tuple[str, ...] = ()
    outputs: Range | None = None
    done: int | None = None
    gradient: Range | None = None
    gradient_in: Range | None = None
    first_bad: int | None = None
    absorbed: bool = False

    @property
    def label(self) -> str:
        """Name and class, and which call if it is not the first."""
        number = f", call {self.number}" if self.number > 1 else ""
        return f"{self.name} ({self.kind}{number})" if self.name else f"{self.kind}{number}"

    @property
    def is_finite(self) -> bool:
        """Whether nothing in it was found to be otherwise, forward or backward."""
        spans = (self.inputs, self.outputs, self.gradient, self.gradient_in)
        return not self.parameters and self.first_bad is None and all(span is None or span.is_finite for span in spans)

    def above(self) -> Iterator[Call]:
        """The calls that it was made in, from the inside."""
        call = self.parent
        while call is not None:
            yield call
            call = call.parent

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        spans = {key: getattr(self, key) for key in ("inputs", "outputs", "gradient", "gradient_in")}
        return {"name": self.name, "class": self.kind, "call": self.number} | {
            key: span and span.facts() for key, span in spans.items()
        }


class Watch:
    """Hooks on the modules, for one micro-batch's pass: :meth:`start` before, :meth:`stop` after.

    Args:
        module: The root.
    """

    def __init__(self, module: nn.Module) -> None:
        self.calls: list[Call] = []
        self.notes: list[str] = []
        self.is_backward = False
        self._module = module
        self._handles: list[Any] = []
        self._running: list[tuple[Call, set[Any]] | None] = []
        self._numbers: Counter[str] = Counter()
        self._repeated: Counter[str] = Counter()
        self._ended = 0
        self._clock = 0
        self._nodes: set[Any] = set()
        self._infinite: list[tuple[Tensor, Call, list[Call]]] = []

    def start(self) -> None:
        """Put hooks on."""
        for name, child in _watched(self._module, self.notes):
            blank = partial(Call, name, type(child).__name__, parameters=_not_finite(child))
            begin, end = partial(self._begin, blank), partial(self._end, name)
            self._handles += [
                child.register_forward_pre_hook(begin, with_kwargs=True),
                child.register_forward_hook(end, with_kwargs=True, always_call=True),
            ]

    def stop(self) -> None:
        """Take them off, and let go of the graph."""
        for handle in self._handles:
            handle.remove()
        for _, call, users in self._infinite:
            call.absorbed = bool(users) and all(user.outputs is not None and user.outputs.is_finite for user in users)
        self._handles.clear()
        self._nodes.clear()
        self._infinite.clear()

    def operations(self, loss: Tensor, most: int = 6) -> list[str]:
        """Names of the autograd operations between the last modules and the loss, from the loss backwards.

        Args:
            loss: With its graph.
            most: How many to name.
        """
        names: list[str] = []
        nodes: list[Any] = [loss.grad_fn]
        seen = {None, *self._nodes}
        while nodes and len(names) < most:
            node = nodes.pop(0)
            if node in seen or node.name().endswith("AccumulateGrad"):
                continue
            seen.add(node)
            names.append(node.name())
            nodes += [below for below, _ in node.next_functions]
        return names

    def _begin(self, blank: Callable[..., Call], _: nn.Module, args: Any, kwargs: Any) -> None:
        if self.is_backward:  # activation checkpointing runs it again
            self._running.append(None)
            return
        parent = next((entry[0] for entry in reversed(self._running) if entry), None)
        call = blank(parent=parent, inputs=Range.of((args, kwargs)))
        self._numbers[call.name] += 1
        call.number = self._numbers[call.name]
        self.calls.append(call)
        tensors = _each_once((args, kwargs))
        self._running.append((call, _edges_to(tensors)))  # a module that works in place changes them
        for made, _made_by, users in self._infinite:
            if any(tensor is made for tensor in tensors):
                users.append(call)

    def _end(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        entry = self._running.pop() if self._running else None
        if entry is None:
            self._hook_repeated(name, module, (args, kwargs), output)
            return
        if output is None:  # it returned nothing, or raised
            return
        call, edges = entry
        call.outputs, call.done = Range.of(output), self._ended
        self._ended += 1
        tensors = _each_once(output)
        if call.outputs and call.outputs.inf:
            self._infinite += [(tensor, call, []) for tensor in tensors if bool(tensor.detach().isinf().any())]
        self._nodes |= {tensor.grad_fn for tensor in tensors}
        self._hook_gradients(module, tensors, edges, call)

    def _hook_repeated(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """Under reentrant checkpointing the graph is that of the second run; the last call is the first to be run again."""
        self._repeated[name] += 1
        calls = [call for call in self.calls if call.name == name]
        if self._repeated[name] <= len(calls):
            call = calls[-self._repeated[name]]
            self._hook_gradients(module, _each_once(output), _edges_to(_each_once(inputs)), call)

    def _hook_gradients(self, module: nn.Module, outputs: list[Tensor], edges: set[Any], call: Call) -> None:
        """See the gradients at the outputs, and those that go from the graph behind them to the inputs and to own parameters."""
        for tensor in outputs:
            if tensor.requires_grad:
                tensor.register_hook(partial(self._see, call, "gradient"))  # type: ignore[no-untyped-call]
        own = {id(parameter) for parameter in module.parameters(recurse=False) if parameter.requires_grad}
        nodes: list[Any] = [tensor.grad_fn for tensor in outputs] if edges or own else []
        seen = {None, *(node for node, _ in edges)}
        while nodes:
            node = nodes.pop()
            if node in seen:
                continue
            seen.add(node)
            below = [child for child, _ in node.next_functions]
            to_inputs = [place for place, edge in enumerate(node.next_functions) if edge in edges]
            to_own = [place for place, child in enumerate(below) if id(getattr(child, "variable", None)) in own]
            if to_inputs or to_own:
                node.register_hook(partial(self._see_edges, call, to_inputs, to_own))
            nodes += below

    def _see_edges(
        self, call: Call, to_inputs: list[int], to_own: list[int], flowing: tuple[Tensor | None, ...], _: object
    ) -> None:
        for place in to_inputs:
            if (gradient := flowing[place]) is not None:
                self._see(call, "gradient_in", gradient)
        spans = [Range.of(flowing[place]) for place in to_own]
        self._clock += 1
        if call.first_bad is None and any(span and not span.is_finite for span in spans):
            call.first_bad = self._clock

    def _see(self, call: Call, key: str, gradient: Tensor) -> None:
        self._clock += 1
        span, known = Range.of(gradient), getattr(call, key)
        if span is None:
            return
        setattr(call, key, Range.joined([known, span]) if known else span)
        if key == "gradient_in" and not span.is_finite and call.first_bad is None:
            call.first_bad = self._clock


def _watched(module: nn.Module, notes: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """The modules that are hooked: not torchmetrics, nor what is inside of compiled modules."""
    shut: list[str] = []
    for name, child in module.named_modules():
        shown = without_wrappers(f"{name}.").rstrip(".")
        if any(name.startswith(prefix) for prefix in shut):
            continue
        if isinstance(child, Metric):
            shut.append(f"{name}.")
            continue
        is_compiled = hasattr(child, "_orig_mod") or getattr(child, "_compiled_call_impl", None) is not None
        if is_compiled or isinstance(child, torch.jit.ScriptModule):
            notes.append(f"{shown or type(child).__name__} is compiled: hooks do not fire inside, what happens there is not seen.")
            shut.append(f"{name}." if name else "")
            if not hasattr(child, "_orig_mod"):
                continue
        yield shown, child


def _not_finite(module: nn.Module) -> tuple[str, ...]:
    """Names of a module's own tensors that are not; masks of -inf are buffers, and no fault."""
    parameters = [
        name
        for name, tensor in module.named_parameters(recurse=False)
        if learns(tensor) and has_arithmetic(tensor) and not all_finite([tensor.detach()])
    ]
    buffers = module.named_buffers(recurse=False)
    return (*parameters, *(name for name, tensor in buffers if has_arithmetic(tensor) and bool(tensor.isnan().any())))


def _edges_to(tensors: list[Tensor]) -> set[Any]:
    """The places in the graph at which tensors stand, as edges name them."""
    return {(tensor.grad_fn, tensor.output_nr) for tensor in tensors if tensor.grad_fn is not None}


def _each_once(value: Any) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in floats_in(value)}.values())
