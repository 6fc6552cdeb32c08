"""Optimizer steps, and clips, that go around Lightning's hooks: found out and named; and what only looks like them."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.plugins import Precision
from torch import nn

from clip_callbacks import ClipRule, GradientClipping, GradientNormMonitor, NonFiniteGuard
from tests.helpers.training import Poisoned, Regression, assert_same_bits, data, scaled, weights

UNSEEN = "No optimizer step"


class Sam(torch.optim.SGD):
    @torch.no_grad()
    def first_step(self):
        there = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.before = [(parameter, parameter.clone()) for parameter in there]
        for parameter in there:
            parameter.add_(0.05 * parameter.grad / (parameter.grad.norm() + 1e-12))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for parameter, value in self.before:
            parameter.copy_(value)
        torch.optim.SGD.step(self)
        self.zero_grad()


class SamInOneStep(torch.optim.SGD):
    """The same as Lightning is to call it."""

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            closure()
        there = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [parameter.clone() for parameter in there]
        for parameter in there:
            parameter.add_(0.05 * parameter.grad / (parameter.grad.norm() + 1e-12))
        with torch.enable_grad():
            closure()
        for parameter, value in zip(there, before, strict=True):
            parameter.copy_(value)
        super().step()


class ThroughData(torch.optim.SGD):
    """One that goes around version counters, as many of other packages do."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(group["lr"] * parameter.grad)


class ByHand(Regression):
    """Manual optimization, each batch stepped in its own way."""

    def __init__(self, way, optimizer=torch.optim.SGD):
        super().__init__(optimizer)
        self.automatic_optimization = False
        self.way = way

    def training_step(self, batch, batch_idx):
        self.way(self, self.optimizers(), lambda: self.manual_backward(self.loss(batch, batch_idx)))


def two_steps(module, optimizer, backward):
    backward()
    optimizer.first_step()
    backward()
    optimizer.second_step()


def bare_step(module, optimizer, backward):
    backward()
    optimizer.optimizer.step()
    optimizer.zero_grad()


def in_the_backward_pass(module, optimizer, backward):
    def step(parameter):
        with torch.no_grad():
            parameter.sub_(0.01 * parameter.grad)
        parameter.grad = None

    handles = [parameter.register_post_accumulate_grad_hook(step) for parameter in module.parameters()]
    backward()
    for handle in handles:
        handle.remove()


def of_an_optimizer_that_nobody_knows(module, optimizer, backward):
    backward()
    torch.optim.SGD(module.parameters(), lr=0.01).step()
    module.zero_grad()


AROUND = {
    "two steps of SAM": (two_steps, Sam),
    "the bare optimizer": (bare_step, torch.optim.SGD),
    "the bare optimizer, through data": (bare_step, ThroughData),
    "the bare optimizer, fused": (bare_step, lambda params, lr: torch.optim.Adam(params, lr, fused=True)),
    "in the backward pass": (in_the_backward_pass, torch.optim.SGD),
    "no optimizer configured": (of_an_optimizer_that_nobody_knows, lambda params, lr: None),
}


def said_of(run, module, batches=6):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(module, data(batches))
    return [str(warning.message) for warning in caught if issubclass(warning.category, RuntimeWarning)]


@pytest.mark.parametrize("how", AROUND)
def test_steps_that_go_around_are_told_of_once(trainer, how):
    way, optimizer = AROUND[how]
    guard = NonFiniteGuard()
    said = said_of(trainer(guard, GradientClipping(0.1), GradientNormMonitor(), max_epochs=3), ByHand(way, optimizer))
    assert len(said) == 1
    assert UNSEEN in said[0]
    assert "step(closure)" in said[0]
    assert "clip_step(optimizer)" in said[0]
    assert guard.last_report is None


def test_they_are_told_of_at_the_first_epochs_end(trainer):
    class Until(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            assert trainer.current_epoch == 0

    with pytest.raises(RuntimeWarning, match=UNSEEN):  # warnings are errors here
        trainer(Until(), GradientClipping(0.1), max_epochs=3).fit(ByHand(bare_step), data(6))


class InBackward(Regression):
    def on_train_start(self):
        for parameter in self.parameters():
            parameter.register_post_accumulate_grad_hook(self.step)

    @staticmethod
    @torch.no_grad()
    def step(parameter):
        parameter.sub_(0.01 * parameter.grad)
        parameter.grad = None


class OwnStep(Regression):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer_closure()
        optimizer.optimizer.step()


@pytest.mark.parametrize("kind", [InBackward, OwnStep])
def test_they_are_told_of_in_automatic_optimization(trainer, kind):
    said = said_of(trainer(GradientClipping(0.1)), kind())
    assert len(said) == 1
    assert UNSEEN in said[0]


def test_the_optimizer_among_several_is_named(trainer):
    class Two(Regression):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.other = nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            for net, step in ((self.net, first.step), (self.other, second.optimizer.step)):
                self.zero_grad()
                self.manual_backward(nn.functional.mse_loss(net(batch[0]), batch[1]))
                step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net.parameters(), lr=0.01), torch.optim.Adam(self.other.parameters(), lr=0.01)]

    said = said_of(trainer(GradientClipping(0.1)), Two())
    assert len(said) == 1
    assert f"{UNSEEN} of Adam-Adam was seen" in said[0]


def test_sam_in_one_step_with_a_closure_is_seen(trainer):
    clipping = GradientClipping(0.1)
    trainer(clipping).fit(Regression(SamInOneStep), data(6))
    assert clipping.state_dict()["history"][0]["steps"] == 6


@pytest.mark.parametrize("passes", [{4}, {5}, {4, 5}], ids=["the first", "the second", "both"])
def test_a_bad_pass_of_sam_skips_its_step(trainer, passes):
    class Bad(Regression):
        count, states = 0, []

        def on_train_batch_start(self, batch, batch_idx):
            self.states = [*self.states, weights(self)]

        def loss(self, batch, batch_idx):
            self.count += 1
            return super().loss(batch, batch_idx) * (math.nan if self.count - 1 in passes else 1.0)

    module, guard = Bad(SamInOneStep), NonFiniteGuard()
    with pytest.warns(RuntimeWarning, match="Non-finite gradients"):
        trainer(guard, GradientClipping(0.1)).fit(module, data(4))
    assert guard.skipped_steps == 1
    assert_same_bits(module.states[2], module.states[3])


# --- what has no step, and is right


def after_two_epochs(module, optimizer, backward):
    backward()
    if module.trainer.current_epoch == 1 and module.trainer.is_last_batch:
        optimizer.step()
        optimizer.zero_grad()


def rewriting_its_prototypes(module, optimizer, backward):
    with torch.no_grad():
        module.net[0].weight.div_(module.net[0].weight.norm(dim=1, keepdim=True))
    after_two_epochs(module, optimizer, backward)


@pytest.mark.parametrize("way", [after_two_epochs, rewriting_its_prototypes])
def test_windows_longer_than_an_epoch_are_no_steps_around_us(trainer, way):
    assert said_of(trainer(NonFiniteGuard(), GradientClipping(0.1), max_epochs=2), ByHand(way)) == []


def test_batches_without_a_loss_are_no_steps_around_us(trainer):
    assert said_of(trainer(GradientClipping(0.1)), Poisoned(dict.fromkeys(range(6)))) == []


def test_the_epoch_of_batch_statistics_is_none(trainer):
    module = Regression(net=nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)))
    averaging = StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=1)
    assert said_of(trainer(averaging, GradientClipping(0.1), max_epochs=2), module) == []


def test_an_optimizer_whose_turn_comes_later_is_none(trainer):
    class Late(ByHand):
        def __init__(self):
            super().__init__(None)
            self.other = nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            turns = zip((self.net, self.other), self.optimizers(), strict=True)
            for net, optimizer in list(turns)[: 1 + self.trainer.current_epoch]:
                optimizer.zero_grad()
                self.manual_backward(net(batch[0]).square().mean())
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(net.parameters(), lr=0.01) for net in (self.net, self.other)]

    assert said_of(trainer(GradientClipping(0.1), max_epochs=2), Late()) == []


class Stages(ByHand):
    """Several optimizers, of which some wait for their turn while others train what they share, or something follows."""

    def __init__(self, turns, holds):
        super().__init__(None)
        self.target, self.head, self.other_head = (nn.Linear(4, 1) for _ in range(3))
        self.turns = turns
        self.holds = holds

    def training_step(self, batch, batch_idx):
        for number in self.turns:
            optimizer = self.optimizers()[number]
            optimizer.zero_grad()
            self.manual_backward((self.head(batch[0]) + self.net(batch[0])).square().mean())
            optimizer.step()
        with torch.no_grad():
            for parameter in self.target.parameters():
                parameter.mul_(0.9)

    def configure_optimizers(self):
        made = [[p for name in names for p in getattr(self, name).parameters()] for names in self.holds]
        return [torch.optim.Adam(parameters, lr=0.01) for parameters in made]


@pytest.mark.parametrize(
    ("turns", "holds"),
    [
        ([0], [["net", "head"], ["net", "other_head"]]),
        ([1], [["net", "other_head"], ["net", "head"]]),
        ([0], [["net", "head"], ["target"]]),
        ([0], [["net", "head"], ["other_head", "target"]]),
    ],
    ids=["the later one shares", "the earlier one shares", "clamped", "with a target"],
)
def test_an_optimizer_that_waits_while_its_parameters_change_is_none(trainer, turns, holds):
    assert said_of(trainer(GradientClipping(0.1), max_epochs=2), Stages(turns, holds)) == []


def test_a_target_that_follows_before_the_first_step_is_none(trainer):
    class WarmingUp(ByHand):
        def __init__(self):
            super().__init__(None, torch.optim.Adam)
            self.target = copy.deepcopy(self.net)

        def training_step(self, batch, batch_idx):
            if self.trainer.current_epoch == 1:
                self.manual_backward(self.loss(batch, batch_idx))
                self.optimizers().step()
            with torch.no_grad():
                for followed, parameter in zip(self.target.parameters(), self.net.parameters(), strict=True):
                    followed.lerp_(parameter + 1.0, 0.1)

    assert said_of(trainer(GradientClipping(0.1), max_epochs=2), WarmingUp()) == []


def test_weights_that_are_normalized_without_a_loss_are_none(trainer):
    class Normalized(Regression):
        def training_step(self, batch, batch_idx):
            for parameter in self.parameters():
                parameter.data.mul_(0.9)

    assert said_of(trainer(GradientClipping(0.1)), Normalized()) == []


def test_embeddings_that_are_renormalized_are_none(trainer):
    class Words(ByHand):
        def __init__(self):
            super().__init__(after_two_epochs)
            self.net = nn.Embedding(4, 1, max_norm=0.1)

        def loss(self, batch, batch_idx):
            return self.net(batch[0][:, 0].gt(0).long()).square().mean()

    assert said_of(trainer(GradientClipping(0.1), max_epochs=2), Words()) == []


# --- clipped twice


def clipping_itself(module, optimizer, backward):
    optimizer.zero_grad()
    backward()
    module.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
    optimizer.step()


@pytest.mark.parametrize("options", [{}, scaled()], ids=["32", "16-mixed"])
def test_a_module_that_clips_itself_is_told_of_once(trainer, options):
    module = ByHand(clipping_itself)
    said = said_of(trainer(NonFiniteGuard(), GradientClipping(0.1), max_epochs=2, **options), module)
    assert len(said) == 1
    assert "clipped twice: ByHand calls self.clip_gradients(gradient_clip_val=0.5) beside GradientClipping" in said[0]
    assert "clip_gradients" not in vars(module)


class ByKeyword(Precision):
    """A plugin that names the argument."""

    def clip_gradients(self, optimizer, clip_val=0.0, gradient_clip_algorithm="norm"):
        if clip_val:
            self.clip_grad_by_norm(optimizer, clip_val=clip_val)


def test_a_plugin_that_clips_by_keyword_is_told_of(trainer):
    said = said_of(trainer(GradientClipping(0.1), max_epochs=2, plugins=[ByKeyword()]), ByHand(clipping_itself))
    assert len(said) == 1
    assert "gradient_clip_val=0.5" in said[0]


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_epoch_start"])
def test_a_value_that_the_trainer_is_given_later_is_told_of_as_the_trainers(trainer, hook):
    module = Regression()
    setattr(module, hook, lambda: setattr(module.trainer, "gradient_clip_val", 0.5))
    said = said_of(trainer(GradientClipping(0.1), max_epochs=2), module)
    assert len(said) == 1
    assert "clipped twice: trainer.gradient_clip_val was set to 0.5 after the setup" in said[0]
    assert "self.clip_gradients" not in said[0]


def test_it_may_clip_itself_beside_the_others(trainer):
    assert said_of(trainer(NonFiniteGuard(), GradientNormMonitor(), GradientClipping(None)), ByHand(clipping_itself)) == []


class TwoOptimizers(LightningModule):
    """It clips what one of its optimizers holds."""

    automatic_optimization = False

    def __init__(self, clipped):
        super().__init__()
        self.a, self.b, self.clipped = nn.Linear(4, 1), nn.Linear(4, 1), clipped

    def training_step(self, batch, batch_idx):
        for net, optimizer in zip((self.a, self.b), self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(net(batch[0]).square().mean())
            if net is getattr(self, self.clipped):
                self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.1) for net in (self.a, self.b)]


@pytest.mark.parametrize(("clipped", "count"), [("a", 1), ("b", 0)])
def test_it_may_clip_what_no_rule_holds_for(trainer, clipped, count):
    said = said_of(trainer(GradientClipping(rules=[ClipRule(1.0, include="^a")])), TwoOptimizers(clipped))
    assert len(said) == count


@pytest.mark.filterwarnings("ignore:.*this fit will run with no optimizer:UserWarning")
def test_who_has_no_optimizer_is_not_asked_for_gradients(trainer):
    class Still(Regression):
        def configure_optimizers(self):
            return None

    with pytest.warns(UserWarning, match="No optimizer holds a parameter: GradientClipping has nothing to clip"):
        trainer(GradientClipping(1.0)).fit(Still(), data(3))  # other warnings are errors


def test_the_module_has_its_own_method_again_after_an_error(trainer):
    module = ByHand(clipping_itself)
    module.factors = {}
    module.loss = lambda batch, batch_idx: math.nan
    with pytest.raises(AttributeError):
        trainer(GradientClipping(0.1)).fit(module, data(2))
    assert not {"clip_gradients", "on_train_start", "on_before_optimizer_step"} & vars(module).keys()
