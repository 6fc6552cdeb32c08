"""Hooks on every module that record its calls: ranges of inputs, outputs and gradients, in the order of execution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from clip_callbacks.core.nonfinite import all_finite, has_arithmetic
from clip_callbacks.core.tensor_table import learns, without_wrappers
from clip_callbacks.replay.module_calls import ModuleCall
from clip_callbacks.replay.ranges import ValueRange, float_tensors_in

MAX_OPERATIONS = 6
"""Number of autograd operations that are named between the last modules and the loss."""


class ModuleRecorder:
    """Records the calls of all modules in the forward and backward pass of one micro-batch.

    Args:
        module: The root of the modules.
    """

    def __init__(self, module: nn.Module) -> None:
        self.calls: list[ModuleCall] = []
        self.notes: list[str] = []
        self.is_backward = False
        self._module = module
        self._handles: list[Any] = []
        self._running: list[tuple[ModuleCall, set[Any]] | None] = []
        self._call_counts: Counter[str] = Counter()
        self._recomputed_counts: Counter[str] = Counter()
        self._ended_count = 0
        self._backward_time = 0
        self._output_nodes: set[Any] = set()
        self._infinite_outputs: list[tuple[Tensor, ModuleCall, list[ModuleCall]]] = []

    def attach(self) -> None:
        """Register the hooks."""
        for name, child in _modules_to_record(self._module, self.notes):
            make_call = partial(ModuleCall, name, type(child).__name__, nonfinite_tensors=_nonfinite_tensors(child))
            self._handles += [
                child.register_forward_pre_hook(partial(self._start_call, make_call), with_kwargs=True),
                child.register_forward_hook(partial(self._end_call, name), with_kwargs=True, always_call=True),
            ]

    def detach(self) -> None:
        """Remove the hooks, and release the autograd graph."""
        for handle in self._handles:
            handle.remove()
        for _, call, users in self._infinite_outputs:
            call.is_absorbed = bool(users) and all(user.outputs is not None and user.outputs.is_finite for user in users)
        self._handles.clear()
        self._output_nodes.clear()
        self._infinite_outputs.clear()

    def operations(self, loss: Tensor) -> list[str]:
        """Return the names of the autograd operations between the last modules and the loss, from the loss backwards.

        Args:
            loss: The loss with its autograd graph.
        """
        names: list[str] = []
        nodes: list[Any] = [loss.grad_fn]
        seen = {None, *self._output_nodes}
        while nodes and len(names) < MAX_OPERATIONS:
            node = nodes.pop(0)
            if node in seen or node.name().endswith("AccumulateGrad"):
                continue
            seen.add(node)
            names.append(node.name())
            nodes += [below for below, _ in node.next_functions]
        return names

    def _start_call(self, make_call: Callable[..., ModuleCall], _: nn.Module, args: Any, kwargs: Any) -> None:
        if self.is_backward:  # activation checkpointing runs the forward again
            self._running.append(None)
            return
        parent = next((entry[0] for entry in reversed(self._running) if entry), None)
        call = make_call(parent=parent, inputs=ValueRange.of((args, kwargs)))
        self._call_counts[call.name] += 1
        call.number = self._call_counts[call.name]
        self.calls.append(call)
        tensors = _unique_float_tensors((args, kwargs))
        self._running.append((call, _graph_edges(tensors)))  # now, because a module that works in place changes them
        for infinite, _maker, users in self._infinite_outputs:
            if any(tensor is infinite for tensor in tensors):
                users.append(call)

    def _end_call(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        entry = None
        if self._running:
            entry = self._running.pop()
        if entry is None:
            self._hook_recomputed(name, module, (args, kwargs), output)
            return
        if output is None:  # the module returned nothing, or raised
            return
        call, edges = entry
        call.outputs, call.end_order = ValueRange.of(output), self._ended_count
        self._ended_count += 1
        tensors = _unique_float_tensors(output)
        if call.outputs and call.outputs.inf:
            self._infinite_outputs += [(tensor, call, []) for tensor in tensors if bool(tensor.detach().isinf().any())]
        self._output_nodes |= {tensor.grad_fn for tensor in tensors}
        self._hook_gradients(module, tensors, edges, call)

    def _hook_recomputed(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """Record the gradients of a call that activation checkpointing has run again.

        Reentrant checkpointing differentiates the graph of the second run, and runs the last call of a module again first.
        """
        self._recomputed_counts[name] += 1
        calls = [call for call in self.calls if call.name == name]
        if self._recomputed_counts[name] <= len(calls):
            call = calls[-self._recomputed_counts[name]]
            self._hook_gradients(module, _unique_float_tensors(output), _graph_edges(_unique_float_tensors(inputs)), call)

    def _hook_gradients(self, module: nn.Module, outputs: list[Tensor], edges: set[Any], call: ModuleCall) -> None:
        """Register hooks on the gradients of the outputs, and on those that this call's graph sends to inputs and parameters."""
        for tensor in outputs:
            if tensor.requires_grad:
                tensor.register_hook(partial(self._record_gradient, call, "grad_output"))  # type: ignore[no-untyped-call]
        own = {id(parameter) for parameter in module.parameters(recurse=False) if parameter.requires_grad}
        if not edges and not own:
            return
        nodes: list[Any] = [tensor.grad_fn for tensor in outputs]
        seen = {None, *(node for node, _ in edges)}
        while nodes:
            node = nodes.pop()
            if node in seen:
                continue
            seen.add(node)
            below = [child for child, _ in node.next_functions]
            to_inputs = [index for index, edge in enumerate(node.next_functions) if edge in edges]
            to_parameters = [index for index, child in enumerate(below) if id(getattr(child, "variable", None)) in own]
            if to_inputs or to_parameters:
                node.register_hook(partial(self._record_edges, call, to_inputs, to_parameters))
            nodes += below

    def _record_edges(
        self, call: ModuleCall, to_inputs: list[int], to_parameters: list[int], gradients: tuple[Tensor | None, ...], _: object
    ) -> None:
        for index in to_inputs:
            if (gradient := gradients[index]) is not None:
                self._record_gradient(call, "grad_input", gradient)
        ranges = [ValueRange.of(gradients[index]) for index in to_parameters]
        self._backward_time += 1
        if call.nonfinite_since is None and any(values and not values.is_finite for values in ranges):
            call.nonfinite_since = self._backward_time

    def _record_gradient(self, call: ModuleCall, key: Literal["grad_output", "grad_input"], gradient: Tensor) -> None:
        self._backward_time += 1
        values = ValueRange.of(gradient)
        if values is None:
            return
        joined = values
        if known := getattr(call, key):
            joined = ValueRange.joined([known, values])
        setattr(call, key, joined)
        if key == "grad_input" and not values.is_finite and call.nonfinite_since is None:
            call.nonfinite_since = self._backward_time


def _modules_to_record(module: nn.Module, notes: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over the modules that get hooks: all but metrics, and modules inside compiled ones, where hooks do not run."""
    skipped_prefixes: list[str] = []
    for name, child in module.named_modules():
        shown = without_wrappers(f"{name}.").rstrip(".")
        if any(name.startswith(prefix) for prefix in skipped_prefixes):
            continue
        if isinstance(child, Metric):
            skipped_prefixes.append(f"{name}.")
            continue
        is_compiled = hasattr(child, "_orig_mod") or getattr(child, "_compiled_call_impl", None) is not None
        if is_compiled or isinstance(child, torch.jit.ScriptModule):
            notes.append(
                f"{shown or type(child).__name__} is compiled: hooks do not run inside it, so its modules are not shown "
                "(TORCH_COMPILE_DISABLE=1 switches torch.compile off)"
            )
            skipped_prefixes.append(f"{name}." if name else "")
            if not hasattr(child, "_orig_mod"):
                continue
        yield shown, child


def _nonfinite_tensors(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's own non-finite parameters, and of buffers with NaN: a buffer may be a mask of -inf."""
    parameters = [
        name
        for name, tensor in module.named_parameters(recurse=False)
        if learns(tensor) and has_arithmetic(tensor) and not all_finite([tensor.detach()])
    ]
    buffers = module.named_buffers(recurse=False)
    return (*parameters, *(name for name, tensor in buffers if has_arithmetic(tensor) and bool(tensor.isnan().any())))


def _graph_edges(tensors: list[Tensor]) -> set[Any]:
    """Return the positions of tensors in the autograd graph, in the form of ``next_functions``."""
    return {(tensor.grad_fn, tensor.output_nr) for tensor in tensors if tensor.grad_fn is not None}


def _unique_float_tensors(value: Any) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in float_tensors_in(value)}.values())
