"""Optimizers with bookkeeping of their own: a skipped step leaves no trace in it, or a warning names the trace."""

from __future__ import annotations

import math
import re
import warnings
from collections import deque
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from clip_callbacks import GradientClipping, NonFiniteGuard
from clip_callbacks.guard.contents import MAX_COPIED_ENTRIES
from tests.helpers.exact_skip import differences
from tests.helpers.members import OPTIMIZERS
from tests.helpers.training import EitherWay, data, make_trainer, scaled

pytestmark = pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning", "ignore:.*lr_scheduler.step.*:UserWarning")

OWN_WARNING = "keeps something of its own that a skipped step has changed"


class Counting(torch.optim.Optimizer):
    """Sign descent whose step size falls with a count; subclasses say where they keep it. No gradient, no move."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.begin()

    def begin(self) -> None:
        """Make the count."""

    def count(self) -> float:
        """Count one more step."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure:
            with torch.enable_grad():
                loss = closure()
        count = self.count()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign(), alpha=float(group["lr"]) / count)
        return loss


class InGroup(Counting):
    def begin(self):
        self.param_groups[0]["step"] = 0

    def count(self):
        self.param_groups[0]["step"] += 1
        return self.param_groups[0]["step"]


class InGroupTensor(Counting):
    def begin(self):
        self.param_groups[0] |= {"step": torch.zeros(()), "lr": torch.tensor(self.defaults["lr"])}

    def count(self):
        group = self.param_groups[0]
        group["step"] += 1
        group["lr"].mul_(0.9)
        return group["step"].item()


class InGroupReplacedTensor(InGroupTensor):
    def count(self):
        self.param_groups[0]["lr"] = self.param_groups[0]["lr"] * 0.9
        return super().count()


class InGroupContainers(Counting):
    def begin(self):
        self.param_groups[0] |= {"seen": [], "last": deque(maxlen=3), "nested": {"pair": (torch.ones(2), [0])}, "known": set()}

    def count(self):
        group = self.param_groups[0]
        group["seen"].append(len(group["seen"]))
        group["last"].append(len(group["seen"]))
        group["known"].add(len(group["seen"]))
        tensor, numbers = group["nested"]["pair"]
        tensor += 1
        numbers[0] += 1
        return len(group["seen"]) + tensor[0].item() + numbers[0] + sum(group["last"]) + len(group["known"])


class AddedToGroup(Counting):
    def count(self):
        self.param_groups[0].setdefault("step", torch.zeros(()))
        self.param_groups[0]["step"] = self.param_groups[0]["step"] + 1
        return self.param_groups[0]["step"].item()


class InStateOfAll(Counting):
    def count(self):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["step"] = state.get("step", 0) + 1
            state.setdefault("clock", torch.zeros(())).add_(1)
        return state["step"] + state["clock"].item()


class InGlobalState(Counting):
    def begin(self):
        self.state["all"] = {"step": 0, "history": [torch.zeros(3)]}

    def count(self):
        self.state["all"]["step"] += 1
        self.state["all"]["history"][0].add_(1)
        self.state["tokens"] = self.state["all"]["step"] * 7
        return self.state["tokens"] + self.state["all"]["history"][0].sum().item()


class RemovedFromState(Counting):
    def begin(self):
        self.state["left"] = dict.fromkeys(range(100), 1.0)

    def count(self):
        self.state["left"].popitem()
        return 101.0 - len(self.state["left"])


class CallsSuper(torch.optim.AdamW):
    """torch's step hooks run when the parent's step is over, and again at the very end."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            group["after"] = group.get("after", 0) + 1
            group["lr"] *= 0.8
        return loss


class Wrapper:
    """Holds another optimizer, whose groups are its own; no optimizer of torch itself, so that it has no step hooks."""

    def __init__(self, params, lr):
        self.base = InStateOfAll(params, lr)
        self.param_groups, self.defaults = self.base.param_groups, self.base.defaults
        self.state = {"slow": {"step": 0}}

    def zero_grad(self):
        self.base.zero_grad()

    def state_dict(self):
        return self.base.state_dict()

    def load_state_dict(self, state):
        self.base.load_state_dict(state)

    def step(self, closure=None):
        loss = self.base.step(closure)
        self.state["slow"]["step"] += 1
        self.param_groups[0]["lr"] *= 0.8
        return loss


class Wrapped(torch.optim.Optimizer):
    """Groups of its own beside those of two that it holds in a list."""

    def __init__(self, params, lr):
        params = list(params)
        super().__init__(params, {"lr": lr})
        self.each = [InGroup(params[:2], lr), InGlobalState(params[2:], lr)]

    def step(self, closure=None):
        loss = closure()
        for optimizer in self.each:
            optimizer.step()
        return loss


KEEPERS = [
    InGroup,
    InGroupTensor,
    InGroupReplacedTensor,
    InGroupContainers,
    AddedToGroup,
    InStateOfAll,
    InGlobalState,
    RemovedFromState,
    CallsSuper,
    Wrapper,
    Wrapped,
]


class Subject(EitherWay):
    """Trained in either way; what the batch says is NaN is NaN."""

    def __init__(self, optimizer, *, automatic=True, **options):
        super().__init__(optimizer, **options)
        self.automatic_optimization = automatic

    def loss(self, batch, batch_idx):
        loss = super().loss(batch, batch_idx)
        return loss * math.nan if bool(batch[2]) else loss


def books(optimizer):
    """Groups and state of an optimizer and of those that it holds, flat."""
    each = [optimizer, *getattr(optimizer, "each", ()), *filter(None, [getattr(optimizer, "base", None)])]
    flat = {}
    for place, part in enumerate(each):
        for number, group in enumerate(part.param_groups):
            flat |= {f"{place}.group.{number}.{key}": value for key, value in group.items() if key != "params"}
        for number, (key, state) in enumerate(part.state.items()):
            items = state.items() if isinstance(state, dict) else [(key, state)]
            flat |= {f"{place}.state.{number}.{name}": value for name, value in items}
    return {key: plain(value) for key, value in flat.items()}


def plain(value):
    if isinstance(value, dict):
        return [item for pair in value.items() for item in map(plain, pair)]
    return [plain(item) for item in value] if isinstance(value, (list, tuple, deque, set)) else value


def train(tmp_path, optimizer, bad, *, without=(), automatic=True, callbacks=(), batches=9, **options):
    each = [(*batch, torch.tensor(number in bad)) for number, batch in enumerate(data(batches))]
    torch.manual_seed(0)
    module = Subject(optimizer, automatic=automatic)
    fit = make_trainer(tmp_path, GradientClipping(1.0), *callbacks, **options)
    fit.fit(module, DataLoader([batch for number, batch in enumerate(each) if number not in without], batch_size=None))
    return {f"module.{key}": value for key, value in module.state_dict().items()} | books(fit.optimizers[0])


@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
@pytest.mark.parametrize("keeper", KEEPERS)
def test_a_skipped_step_leaves_no_trace_in_the_books(tmp_path, keeper, automatic):
    bad = {0, 4, 5}
    guarded = train(tmp_path, keeper, bad, automatic=automatic)
    clean = train(tmp_path, keeper, (), without=bad, automatic=automatic)
    assert differences(guarded, clean) == []


@pytest.mark.parametrize("keeper", [InGroup, InGlobalState, Wrapper])
def test_nor_under_a_scaler_which_calls_the_closure_before_the_step(tmp_path, keeper):
    bad = {0, 4, 5}
    options = {"init_scale": 1.0, "growth_interval": 1000}
    guarded = train(tmp_path, keeper, bad, **scaled(**options))
    clean = train(tmp_path, keeper, (), without=bad, **scaled(**options))
    assert differences(guarded, clean) == []


@pytest.mark.parametrize("keeper", KEEPERS)
def test_without_the_resource_the_books_differ(tmp_path, keeper, monkeypatch):
    monkeypatch.setattr("clip_callbacks.guard.restore.RESOURCES", ())
    guarded = train(tmp_path, keeper, {0, 4, 5})
    clean = train(tmp_path, keeper, (), without={0, 4, 5})
    broken = differences(guarded, clean)
    assert any("group" in key or "state" in key for key in broken)
    assert any("module" in key for key in broken), "weights follow"


def test_a_tensor_learning_rate_stays_the_same_tensor(tmp_path):
    seen = []

    class Watched(InGroupTensor):
        def step(self, closure=None):
            seen.append(self.param_groups[0]["lr"])
            return super().step(closure)

    train(tmp_path, Watched, {0, 4})
    assert len({id(tensor) for tensor in seen}) == 1


def test_schedules_go_on_from_what_they_have_set(tmp_path):
    def run(bad, without):
        class Scheduled(Subject):
            def configure_optimizers(self):
                optimizer = super().configure_optimizers()
                schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        each = [(*batch, torch.tensor(number in bad)) for number, batch in enumerate(data(9))]
        torch.manual_seed(0)
        module, fit = Scheduled(InGroup), make_trainer(tmp_path, NonFiniteGuard(hold_schedulers=not without))
        fit.fit(module, DataLoader([batch for number, batch in enumerate(each) if number not in without], batch_size=None))
        return fit.optimizers[0].param_groups[0]

    held, free = run({0, 4}, {0, 4}), run({0, 4}, ())
    assert held["step"] == free["step"] == 7
    assert held["lr"] == free["lr"] == 0.05 * 0.5**7


class OnItself(Counting):
    def begin(self):
        self.taken, self.sizes, self.fixed = 0, [1.0], {"a": (1, 2.0)}

    def count(self):
        self.taken += 1
        self.sizes[0] += 1.0
        self.fixed = dict(self.fixed)  # made anew, and the same
        self.function = lambda: None
        return float(self.taken)


class WrapsOneThatCounts(Wrapper):
    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.base = OnItself(self.param_groups, lr)


class LargeState(Counting):
    """Decays a large tensor without looking at gradients."""

    def begin(self):
        self.state["all"] = {"large": torch.ones(MAX_COPIED_ENTRIES + 1), "small": torch.ones(MAX_COPIED_ENTRIES)}

    def count(self):
        self.state["all"]["large"].data.mul_(0.5)
        self.state["all"]["small"].data.mul_(0.5)
        return 2.0 - self.state["all"]["small"][0].item()


class Replaces(Counting):
    """Replaces a large tensor by another one: the old one can be restored."""

    def begin(self):
        self.state["all"] = {"large": torch.ones(MAX_COPIED_ENTRIES + 1)}

    def count(self):
        self.state["all"]["large"] = self.state["all"]["large"] * 0.5
        return 2.0 - self.state["all"]["large"][0].item()


def told(tmp_path, optimizer, bad, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(tmp_path, optimizer, bad, **options)
    each = [warning for warning in caught if OWN_WARNING in str(warning.message)]
    assert all(warning.category is RuntimeWarning for warning in each)
    return [str(warning.message) for warning in each]


@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
@pytest.mark.parametrize(
    ("optimizer", "named"),
    [
        (OnItself, "OnItself keeps .* restored: function, sizes, taken. "),
        (WrapsOneThatCounts, "WrapsOneThatCounts keeps .* restored: base.function, base.sizes, base.taken. "),
        (LargeState, "LargeState keeps .* restored: 'large' in its state. "),
    ],
)
def test_a_warning_names_once_what_cannot_be_restored(tmp_path, optimizer, named, automatic):
    assert told(tmp_path, optimizer, set(), automatic=automatic) == []
    (message,) = told(tmp_path, optimizer, {0, 3, 4}, automatic=automatic)
    assert re.match(named, message)


def test_a_large_tensor_that_is_replaced_is_restored(tmp_path):
    guarded = train(tmp_path, Replaces, {0, 4, 5})
    assert differences(guarded, train(tmp_path, Replaces, (), without={0, 4, 5})) == []


@pytest.mark.parametrize("keeper", [keeper for keeper in KEEPERS if keeper is not InGroupReplacedTensor])
def test_there_is_no_warning_of_what_is_restored(tmp_path, keeper):
    assert told(tmp_path, keeper, {0, 4}) == []


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in {"SparseAdam", "Muon"}])
def test_nothing_is_told_of_optimizers_of_torch(tmp_path, name):
    member = OPTIMIZERS[name]
    assert told(tmp_path, lambda params, lr: member.make(params, lr=lr, **member.options), {0, 4}) == []


def test_a_step_that_raises_undoes_nothing_later(tmp_path):
    class Raises(InGroup):
        def count(self):
            super().count()
            if self.param_groups[0]["step"] == 3:
                raise ArithmeticError
            return 1.0

    class Catches(Subject):
        def training_step(self, batch, batch_idx):
            try:
                super().training_step(batch, batch_idx)
            except ArithmeticError:
                self.caught = batch_idx

    each = [(*batch, torch.tensor(number == 2)) for number, batch in enumerate(data(6))]
    module, fit = Catches(Raises, automatic=False), make_trainer(tmp_path, GradientClipping(1.0))
    fit.fit(module, DataLoader(each, batch_size=None))
    assert module.caught == 2
    assert fit.optimizers[0].param_groups[0]["step"] == 6, "the step that raised is not undone, nor any after it"


def test_a_healthy_step_records_nothing(tmp_path, monkeypatch):
    def refuse(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("clip_callbacks.guard.optimizer_bookkeeping._OptimizerBefore", refuse)
    train(tmp_path, InGroup, ())


class SeveralClosureCalls(InGroup):
    """Calls its closure twice, as sharpness-aware ones do."""

    def step(self, closure=None):
        if closure:
            closure()
        return super().step(closure)


def test_the_first_of_several_verdicts_is_what_a_skip_goes_back_to(tmp_path):
    bad = {0, 4}
    guarded = train(tmp_path, SeveralClosureCalls, bad)
    assert differences(guarded, train(tmp_path, SeveralClosureCalls, (), without=bad)) == []


# what tensors and containers hold


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bool], ids=str)
def test_frozen_weights_without_a_norm_may_be_among_the_parameters(tmp_path, dtype):
    class Frozen(Subject):
        def __init__(self):
            super().__init__(torch.optim.AdamW)
            self.base = nn.Parameter((torch.rand(4, 4) * 30).to(dtype), requires_grad=False)

    each = [(*batch, torch.tensor(number == 2)) for number, batch in enumerate(data(5))]
    module, fit = Frozen(), make_trainer(tmp_path, GradientClipping(1.0))
    fit.fit(module, DataLoader(each, batch_size=None))
    assert fit.global_step == 5
