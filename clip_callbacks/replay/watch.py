"""Hooks on every module: what goes in, what comes out, and the gradients that flow back, in the order in which it happens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from clip_callbacks.parameters import WRAPPERS
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
        gradient_in: Of the loss, at the inputs: all that flows back into them, also from their other uses.
        first_bad: When, in the backward pass, a gradient at its inputs or of its own parameters was first not finite.
        absorbed: Whether what was infinite in the outputs went into other modules, and came out of all of them finite.
    """

    name: str
    kind: str
    number: int
    parent: Call | None
    inputs: Range | None
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


@dataclass
class Watch:
    """Hooks on the modules of one micro-batch's pass; enter it before, leave it after.

    Args:
        module: The root.
    """

    module: nn.Module
    calls: list[Call] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    is_backward: bool = False

    def __post_init__(self) -> None:
        self._handles: list[Any] = []
        self._running: list[Call | None] = []
        self._numbers: Counter[str] = Counter()
        self._ended = 0
        self._clock = 0
        self._nodes: dict[Any, Call] = {}
        self._infinite: list[tuple[Tensor, Call, list[Call]]] = []
        self._repeated: Counter[str] = Counter()

    def __enter__(self) -> Watch:
        """Put hooks on."""
        for name, child in _watched(self.module, self.notes):
            bad = tuple(
                own for own, tensor in _own(child) if tensor.is_floating_point() and not bool(tensor.detach().isfinite().all())
            )
            before, after = self._hooks(name, type(child).__name__, bad)
            self._handles += [
                child.register_forward_pre_hook(before, with_kwargs=True),
                child.register_forward_hook(after, with_kwargs=True, always_call=True),
            ]
            for parameter in child.parameters(recurse=False):
                if parameter.requires_grad and parameter.is_leaf:
                    self._handles.append(parameter.register_post_accumulate_grad_hook(self._parameter_hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        """Take them off, and let go of the graph."""
        for handle in self._handles:
            handle.remove()
        for _, call, consumers in self._infinite:
            call.absorbed = bool(consumers) and all(user.outputs is not None and user.outputs.is_finite for user in consumers)
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
        nodes, seen = [loss.grad_fn], set()
        while nodes and len(names) < most:
            node = nodes.pop(0)
            if node is None or node in seen or node in self._nodes or node.name().endswith("AccumulateGrad"):
                continue
            seen.add(node)
            names.append(node.name())
            nodes += [below for below, _ in node.next_functions]
        return names

    def _hooks(self, name: str, kind: str, bad: tuple[str, ...]) -> tuple[Any, Any]:
        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            if self.is_backward:  # activation checkpointing runs it again
                self._running.append(None)
                return
            self._numbers[name] += 1
            parent = next((call for call in reversed(self._running) if call), None)
            call = Call(name, kind, self._numbers[name], parent, Range.of((args, kwargs)), bad)
            self.calls.append(call)
            self._running.append(call)
            for tensor in _each_once((args, kwargs)):
                for other, _, consumers in self._infinite:
                    if other is tensor:
                        consumers.append(call)
                if tensor.requires_grad:
                    tensor.register_hook(self._gradient_hook(call, "gradient_in"))

        def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call = self._running.pop() if self._running else None
            if call is None:
                self._hook_repeated(name, output)
                return
            if output is None:  # it returned nothing, or raised
                return
            call.outputs, call.done = Range.of(output), self._ended
            self._ended += 1
            for tensor in _each_once(output):
                if call.outputs and call.outputs.inf and bool(tensor.detach().isinf().any()):
                    self._infinite.append((tensor, call, []))
                if tensor.requires_grad:
                    tensor.register_hook(self._gradient_hook(call, "gradient"))
                    self._nodes[tensor.grad_fn] = call

        return before, after

    def _hook_repeated(self, name: str, output: Any) -> None:
        """Under reentrant checkpointing the graph is that of the second run; the last call is the first to be run again."""
        self._repeated[name] += 1
        calls = [call for call in self.calls if call.name == name]
        if self._repeated[name] <= len(calls):
            for tensor in _each_once(output):
                if tensor.requires_grad:
                    tensor.register_hook(self._gradient_hook(calls[-self._repeated[name]], "gradient"))

    def _gradient_hook(self, call: Call, key: str) -> Any:
        def hook(gradient: Tensor) -> None:
            self._clock += 1
            span = Range.of(gradient)
            if span is None:
                return
            known = getattr(call, key)
            setattr(call, key, Range.joined([known, span]) if known else span)
            if key == "gradient_in" and not span.is_finite and call.first_bad is None:
                call.first_bad = self._clock

        return hook

    def _parameter_hook(self, name: str) -> Any:
        def hook(parameter: Tensor) -> None:
            self._clock += 1
            gradient = parameter.grad
            if gradient is not None and (span := Range.of(gradient)) and not span.is_finite:
                for call in self.calls:
                    if call.name == name and call.first_bad is None:
                        call.first_bad = self._clock

        return hook


def _watched(module: nn.Module, notes: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """The modules that are hooked: not torchmetrics, nor what is inside of compiled modules."""
    shut: list[str] = []
    for name, child in module.named_modules():
        shown = _shown(name)
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


def _shown(name: str) -> str:
    dotted = f"{name}."
    for wrapper in WRAPPERS:
        dotted = dotted.replace(wrapper, "")
    return dotted.rstrip(".")


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _each_once(value: Any) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in floats_in(value)}.values())
