"""The first module with a non-finite output, found by a second forward pass of a bad batch.

Trap: running ``training_step`` again has side effects: buffers, torchmetrics, random number generators and logged metrics. All of
them are restored, and on several ranks the pass is not run: one rank alone would wait in a collective for the others.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric

from clip_callbacks.core.diagnosis import count_nonfinite
from clip_callbacks.core.nonfinite import all_finite, has_arithmetic

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def trace_forward(trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> str:
    """Run ``training_step`` again on a batch and describe the first module whose output is not finite.

    Nothing is logged and no gradient is kept; buffers, torchmetrics and random number generators are restored. Random numbers,
    as of dropout, differ from those of the first pass.

    Returns:
        The module with counts of its output's non-finite entries, or the reason why none was found.
    """
    if trainer.world_size > 1:
        return "not traced on several ranks: one of them alone would wait for the others"
    found: list[str] = []
    handles = [child.register_forward_hook(_hook(name or type(module).__name__, found)) for name, child in module.named_modules()]
    kwargs = trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, batch_idx)
    try:
        with _without_side_effects(module), torch.enable_grad(), trainer.precision_plugin.train_step_context():
            module.training_step(*kwargs.values())
    except Exception as error:  # a diagnosis must not end the run
        found.append(f"not found, training_step raised {type(error).__name__}: {error}")
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    return "no module's output: look at the loss function and the batch"


def _hook(name: str, found: list[str]) -> Any:
    def check(child: nn.Module, inputs: Any, output: Any) -> None:
        bad = [tensor for tensor in _floats(output) if not all_finite([tensor])]
        if bad and not found:
            whose = "finite" if all_finite(_floats(inputs)) else "non-finite already"
            found.append(f"{name} ({type(child).__name__}), output {count_nonfinite(bad[0])}, inputs {whose}")

    return check


def _floats(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and has_arithmetic(leaf)]


@contextmanager
def _without_side_effects(module: LightningModule) -> Iterator[None]:
    """Restore buffers, torchmetrics and random number generators, and ignore logged metrics."""
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    metrics = [
        (metric, metric._copy_state_dict(), metric._update_count) for metric in module.modules() if isinstance(metric, Metric)
    ]
    ignored = dict.fromkeys(("log", "log_dict"), lambda *_, **__: None)
    hidden = {name: module.__dict__[name] for name in ignored if name in module.__dict__}
    module.__dict__.update(ignored)  # on the instance, before the class's methods
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for name in ignored:
            del module.__dict__[name]
        module.__dict__.update(hidden)
        with torch.no_grad():
            for buffer, kept in buffers:
                buffer.copy_(kept)
        for metric, state, count in metrics:
            metric.__dict__.update(state)
            metric._update_count, metric._computed = count, None
