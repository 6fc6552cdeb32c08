"""A skipped step restores whatever a forward pass has written to: buffers and parameters of every kind, from the first on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from clip_callbacks import GradientClipping, NonFiniteGuard
from clip_callbacks.guard import restore
from clip_callbacks.trainer import buffer_tracker
from clip_callbacks.trainer.buffer_copies import BufferCopies
from tests.helpers.exact_skip import differences, everything
from tests.helpers.matrix import matrix
from tests.helpers.members import FORWARD_WRITES
from tests.helpers.training import Regression, make_trainer
from tests.helpers.writers import REWRITTEN, WAYS, Rewritten, Writer

pytestmark = pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning", "ignore:.*lr_scheduler.step.*:UserWarning")

BATCHES = 10
PLACES = {"first": {0}, "later": {5}, "two in a row": {3, 4}}


class Subject(Regression):
    def __init__(self, middle: nn.Module, bad: set[int], optimizer: Any = torch.optim.AdamW, **options: Any) -> None:
        super().__init__(optimizer, nn.Sequential(nn.Linear(4, 8), middle, nn.Linear(8, 1)), lr=0.02, **options)
        self.bad = bad

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets, number = batch
        loss = nn.functional.mse_loss(self.net(inputs * math.nan if int(number) in self.bad else inputs), targets)
        if self.automatic_optimization:
            return loss
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()
        return None


def batches(left_out: set[int]) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    drawn = [(torch.randn(6, 4, generator=generator), torch.randn(6, 1, generator=generator), number) for number in range(BATCHES)]
    return DataLoader([batch for batch in drawn if batch[2] not in left_out], batch_size=None)


def fitted(
    tmp_path: Any, middle: Any, bad: set[int], left_out: set[int], guard: Any, *, is_manual: bool = False, **options: Any
) -> Any:
    torch.manual_seed(0)
    module = Subject(middle(), bad, **options)
    module.automatic_optimization = not is_manual
    fit = make_trainer(tmp_path, guard, GradientClipping(1.0))
    fit.fit(module, batches(left_out))
    buffers = {f"buffer.{name}": buffer for name, buffer in module.named_buffers()}
    return everything(module, fit) | buffers


def assert_no_trace(tmp_path: Any, middle: Any, bad: set[int], **options: Any) -> None:
    guard = NonFiniteGuard()
    ours = fitted(tmp_path, middle, bad, set(), guard, **options)
    clean = fitted(tmp_path, middle, set(), bad, NonFiniteGuard(), **options)
    assert guard.skipped_steps == len(bad)
    assert differences(ours, clean) == []


@matrix(way=list(WAYS), bad=list(PLACES), loop=["automatic", "manual"])
def test_buffers_that_forward_writes_to(tmp_path, way, bad, loop):
    assert_no_trace(tmp_path, lambda: Writer(WAYS[way]), PLACES[bad], is_manual=loop == "manual")


@pytest.mark.parametrize("way", [way for way in WAYS if way != "through .data"])
def test_the_first_change_ever_may_be_a_bad_one(tmp_path, way):
    assert_no_trace(tmp_path, lambda: Writer(WAYS[way], start=6), {6})


@pytest.mark.parametrize("way", WAYS)
def test_without_the_guard_it_would_stay(tmp_path, monkeypatch, way):
    """The tests above can fail."""
    others = tuple(make for make in restore.RESOURCES if make is not restore.written_buffers)
    monkeypatch.setattr(restore, "RESOURCES", others)
    ours = fitted(tmp_path, lambda: Writer(WAYS[way]), {5}, set(), NonFiniteGuard())
    clean = fitted(tmp_path, lambda: Writer(WAYS[way]), set(), {5}, NonFiniteGuard())
    assert differences(ours, clean) != []


def test_a_late_write_around_the_counter_is_named_and_undone_as_far_as_it_is_known(tmp_path):
    with pytest.warns(RuntimeWarning, match=r"net\.1\.centre are not finite and were written through `.data`"):
        late = fitted(tmp_path, lambda: Writer(WAYS["through .data"], start=6), {6}, set(), NonFiniteGuard())
    assert late["buffer.net.1.centre"].isfinite().all()


def test_what_was_too_large_to_be_kept_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(buffer_tracker, "INITIAL_COPY_BYTES", 16)
    with pytest.warns(RuntimeWarning, match=r"net\.1\.centre have changed for the first time, in a step that is skipped"):
        fitted(tmp_path, lambda: Writer(WAYS["in place"], start=6), {6}, set(), NonFiniteGuard())
    assert_no_trace(tmp_path, lambda: Writer(WAYS["in place"]), {6})


def test_buffers_that_never_change_are_not_copied_again_and_again(tmp_path):
    written = buffer_tracker.BufferTracker(nn.ModuleList([Writer(WAYS["in place"]), nn.BatchNorm1d(8)]))
    copies = BufferCopies(written)
    for _ in range(5):
        written.begin_window()
        copies.keep()
    assert {name for name, _ in copies.named()} == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


@matrix(way=list(REWRITTEN), bad=list(PLACES), loop=["automatic", "manual"])
def test_parameters_that_forward_rewrites(tmp_path, way, bad, loop):
    assert_no_trace(tmp_path, REWRITTEN[way], PLACES[bad], is_manual=loop == "manual")


def test_a_late_rewriting_is_restored_from_the_next_watched_window_on(tmp_path, monkeypatch):
    passes = []

    def late(weight: torch.Tensor, mean: torch.Tensor) -> None:
        passes.append(1)
        if len(passes) > 4:
            weight.add_(mean, alpha=0.01)

    monkeypatch.setattr("clip_callbacks.guard.rewritten_parameters.WATCH_EVERY_N_WINDOWS", 6)
    with pytest.warns(RuntimeWarning, match=r"net\.1\.weight were rewritten by a forward pass for the first time"):
        fitted(tmp_path, lambda: Rewritten(late), {5}, set(), NonFiniteGuard())


# Any of it together


@st.composite
def networks(draw: Any) -> Any:
    """A maker of random layers, each of which its forward pass writes to in a way of its own."""
    layers = draw(st.lists(st.sampled_from([*WAYS, *REWRITTEN, *FORWARD_WRITES]), min_size=1, max_size=4))

    def layer(name: str) -> nn.Module:
        if name in WAYS:
            return Writer(WAYS[name])
        return REWRITTEN[name]() if name in REWRITTEN else FORWARD_WRITES[name](8)

    return lambda: nn.Sequential(*map(layer, layers))


@settings(max_examples=12, deadline=None)
@given(
    middle=networks(),
    bad=st.sets(st.integers(0, BATCHES - 1), max_size=4),
    optimizer=st.sampled_from([torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop]),
    is_manual=st.booleans(),
)
def test_no_batch_leaves_a_trace_in_any_network(tmp_path_factory, middle, bad, optimizer, is_manual):
    assert_no_trace(tmp_path_factory.mktemp("any"), middle, bad, is_manual=is_manual, optimizer=optimizer)


# Passes without a step


class NoSteps(Subject):
    """Its ``training_step`` returns None where the loss is not finite, as people write."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss if loss.isfinite() else None


@matrix(way=[*(way for way in WAYS if way != "counter"), "batch norm"], windows=[1, 2])
@pytest.mark.filterwarnings("ignore:.*No parameter has a gradient.*", "ignore:.*returned `None`.*")
def test_a_pass_that_led_to_no_step_leaves_no_nan(tmp_path, way, windows):
    middle = nn.BatchNorm1d(8) if way == "batch norm" else Writer(WAYS[way])
    module = NoSteps(middle, {5})
    with pytest.warns(RuntimeWarning, match="Non-finite buffers after a forward pass that led to no step, at epoch 0, batch 5"):
        make_trainer(tmp_path, NonFiniteGuard(), accumulate_grad_batches=windows).fit(module, batches(set()))
    assert all(buffer.isfinite().all() for buffer in module.buffers())


class Leaves(Subject):
    """Leaves its first epoch in the middle of a window."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.current_epoch == 0 and batch_idx == 6 else None


@pytest.mark.filterwarnings("ignore:Non-finite buffers:RuntimeWarning")
def test_an_epoch_left_in_mid_window_leaves_no_trace(tmp_path):
    results = []
    for bad, left_out in (({5}, set()), (set(), {4, 5})):
        torch.manual_seed(0)
        module = Leaves(nn.BatchNorm1d(8), bad)
        trainer = make_trainer(tmp_path, NonFiniteGuard(), max_epochs=1, accumulate_grad_batches=4)
        if left_out:
            module.on_train_batch_start = lambda batch, batch_idx: -1 if batch_idx == 4 else None
        trainer.fit(module, batches(set()))
        results.append(dict(module.named_buffers()))
    assert differences(*results) == []


def test_buffers_of_an_average_belong_to_the_average():
    module = nn.ModuleList([nn.BatchNorm1d(2), AveragedModel(nn.BatchNorm1d(2))])
    written = buffer_tracker.BufferTracker(module)
    copies = BufferCopies(written)
    written.begin_window()
    assert all(name.startswith("0.") for name, _ in copies.named())


# Found by programs of others


class Resizes(nn.Module):
    """Makes room for as many channels as it meets, as an observer of channels does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.zeros(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            now = x.detach().amax(0)
            if len(self.largest) != len(now):
                self.largest.resize_(now.shape).copy_(now)
            else:
                self.largest.copy_(torch.maximum(self.largest, now))
        return x


class Shares(nn.Module):
    """All entries of its buffer share memory, which it writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1).expand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.scale[:1].mul_(0.9)
        return x


class Follows(nn.Module):
    """A frozen parameter of the optimizer that forward writes to, in one way or another."""

    def __init__(self, write: Any) -> None:
        super().__init__()
        self.centre, self.write = nn.Parameter(torch.zeros(8), requires_grad=False), write

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.write(self.centre, x.detach().mean(0))
        return x - x.mean(0)


FOUND = {
    "resized in its place": Resizes,
    "expanded": Shares,
    "a frozen parameter": lambda: Follows(lambda centre, mean: centre.lerp_(mean, 0.1)),
    "a frozen parameter through .data": lambda: Follows(lambda centre, mean: centre.data.lerp_(mean, 0.1)),
    "a parameter through .data": lambda: Rewritten(lambda weight, _: weight.data.mul_(0.99)),
    "another tensor as .data": lambda: Rewritten(lambda weight, _: setattr(weight, "data", weight.data * 0.99)),
}


@matrix(way=list(FOUND), bad=list(PLACES), loop=["automatic", "manual"])
def test_what_others_have_found(tmp_path, way, bad, loop):
    assert_no_trace(tmp_path, FOUND[way], PLACES[bad], is_manual=loop == "manual")


class GrowsLate(nn.Module):
    """Makes a layer with batch statistics in a later batch."""

    def __init__(self) -> None:
        super().__init__()
        self.passes, self.late = 0, nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        if self.passes == 4:
            self.late = nn.BatchNorm1d(8, affine=False)
        return self.late(x)


def test_buffers_that_come_late_are_taken_up(tmp_path, monkeypatch):
    monkeypatch.setattr(buffer_tracker, "SEARCH_EVERY_N_WINDOWS", 3)
    assert_no_trace(tmp_path, GrowsLate, {7})
