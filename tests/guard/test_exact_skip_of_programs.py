"""A skipped step never happened, in programs with more state than one optimizer: everything a batch can change, bit for bit.

Kinds of state x one optimizer or two at different rates x loops x places; guards that people write by hand fail it.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.utils.data import DataLoader

from clip_callbacks import GradientClipping, NonFiniteGuard
from tests.helpers.exact_skip import differences
from tests.helpers.matrix import matrix
from tests.helpers.members import FORWARD_WRITES
from tests.helpers.training import make_trainer, scaled

pytestmark = pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning")

BATCHES = 12
RATES = {"one": (1,), "two": (2, 1), "two, the other way": (1, 2)}
PLACES = {"first": {0}, "later": {4}, "two in a row": {4, 6}}
"""Batches that are bad for the first network, whose window is of two batches at most."""


class CountsInGroups(torch.optim.Optimizer):
    """Adam with its step counter in the group."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "step": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            group["step"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    first = state.setdefault("first", torch.zeros_like(parameter)).lerp_(parameter.grad, 0.1)
                    second = state.setdefault("second", torch.zeros_like(parameter)).lerp_(parameter.grad.square(), 0.001)
                    first, second = first / (1 - 0.9 ** group["step"]), second / (1 - 0.999 ** group["step"])
                    parameter.sub_(group["lr"] * first / (second.sqrt() + 1e-8))
        return loss


OTHER_STATE = ("counter in groups", "average", "16-mixed", "16-mixed fused", "16-mixed on the device")


class Program(LightningModule):
    """Networks, each with an optimizer that steps once in so many batches.

    Args:
        state: What the program keeps beside weights.
        rates: Batches in a window of each optimizer.
        bad: Batches that are bad for the first network.
        left_out: Batches that the first network does not see.
    """

    def __init__(self, state: str, rates: tuple[int, ...], bad: set[int], left_out: set[int], *, is_manual: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = FORWARD_WRITES.get(state, nn.LayerNorm)
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), layer(8), nn.Linear(8, 1)) for _ in rates)
        self.state, self.rates, self.bad, self.left_out = state, rates, bad, left_out
        self.automatic_optimization = not is_manual

    def loss(self, index: int, batch: Any) -> torch.Tensor:
        inputs, targets, number = batch
        if index == 0 and int(number) in self.bad:
            inputs = inputs * math.nan
        return nn.functional.mse_loss(self.nets[index](inputs).float(), targets)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.automatic_optimization:
            return self.loss(0, batch)
        number, optimizers = int(batch[2]), self.optimizers()
        for index, optimizer in enumerate(optimizers if isinstance(optimizers, list) else [optimizers]):
            if index == 0 and number in self.left_out:
                continue
            rate = self.rates[index]
            if number % rate == 0:
                optimizer.zero_grad()
            self.manual_backward(self.loss(index, batch) / rate)
            if number % rate == rate - 1:
                optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        if self.state == "counter in groups":
            return [CountsInGroups(net.parameters(), lr=0.05) for net in self.nets]
        fused = {"fused": True} if self.state in {"16-mixed fused", "16-mixed on the device"} else {}
        return [torch.optim.AdamW(net.parameters(), lr=0.05, **fused) for net in self.nets]


class Average(Callback):
    """The final average that a WeightAveraging callback keeps."""

    def __init__(self, callback: Any) -> None:
        self.callback = callback

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.kept = {f"average.{key}": value.clone() for key, value in self.callback._average_model.state_dict().items()}


def fitted(tmp_path: Any, state: str, rates: str, loop: str, bad: set[int], left_out: set[int], guards: list[Callback]) -> Any:
    is_manual, each = loop == "manual", RATES[rates]
    module = Program(state, each, bad, left_out, is_manual=is_manual)
    callbacks, averages = [*guards], []
    if state == "average":
        averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging").EMAWeightAveraging(decay=0.8)
        averages = [Average(averaging)]
        callbacks += [*averages, averaging]
    options = scaled(init_scale=64.0, growth_interval=3) if state.startswith("16") else {}
    fit = make_trainer(tmp_path, *callbacks, **options)
    generator = torch.Generator().manual_seed(1)
    drawn = [
        (torch.randn(6, 4, generator=generator), torch.randn(6, 1, generator=generator), torch.tensor(number))
        for number in range(BATCHES)
    ]
    seen = drawn if is_manual else [batch for batch in drawn if int(batch[2]) not in left_out]
    fit.fit(module, DataLoader(seen, batch_size=None))
    flat: dict[str, Any] = dict(module.state_dict()) | dict(module.named_buffers())
    for place, optimizer in enumerate(fit.optimizers):
        for number, entry in enumerate(optimizer.state.values()):
            flat |= {f"{place}.{number}.{key}": value for key, value in entry.items()}
        flat |= {f"{place}.group.{key}": value for key, value in optimizer.param_groups[0].items() if key != "params"}
    if state.startswith("16"):
        flat |= fit.precision_plugin.scaler.state_dict()
    for average in averages:
        flat |= average.kept
    return flat


def windows(rates: str, place: str) -> set[int]:
    """The batches of the first network's windows that a place makes bad."""
    rate = RATES[rates][0]
    return {number for bad in PLACES[place] for number in range(bad // rate * rate, bad // rate * rate + rate)}


def exists(state: str, rates: str, loop: str, place: str) -> bool:
    if loop == "automatic":
        return rates == "one"
    return True


every_program = matrix(
    exists, state=[*FORWARD_WRITES, *OTHER_STATE], rates=list(RATES), loop=["automatic", "manual"], place=list(PLACES)
)


@every_program
def test_a_skipped_step_never_happened_in_a_program(tmp_path, state, rates, loop, place):
    deferred = True if state == "16-mixed on the device" and loop == "automatic" else None
    guard = NonFiniteGuard(deferred=deferred)
    ours = fitted(tmp_path, state, rates, loop, PLACES[place], set(), [guard, GradientClipping(1.0)])
    gone = windows(rates, place)
    clean = fitted(tmp_path, state, rates, loop, set(), gone, [NonFiniteGuard(deferred=deferred), GradientClipping(1.0)])
    assert guard.skipped_steps == len(PLACES[place])
    assert guard.overflowed_steps == 0
    assert differences(ours, clean) == []


class NoneGuard(Callback):
    """A careful cure by hand."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if not all(parameter.grad.isfinite().all() for parameter in parameters if parameter.grad is not None):
            optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("rates", ["one", pytest.param("two", marks=pytest.mark.slow)])
@pytest.mark.parametrize("state", [*FORWARD_WRITES, *OTHER_STATE[:3]])
def test_the_harness_fails_for_a_guard_written_by_hand(tmp_path, state, rates):
    if state == "average" and rates == "two":
        pytest.skip("the other optimizer has stepped in that batch: the average is due")
    ours = fitted(tmp_path, state, rates, "manual", PLACES["later"], set(), [NoneGuard()])
    clean = fitted(tmp_path, state, rates, "manual", set(), windows(rates, "later"), [NoneGuard()])
    assert differences(ours, clean) != []
