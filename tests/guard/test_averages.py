"""Averages of the weights do not count a skipped step, or are named."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset

from clip_callbacks import GradientClipping, NonFiniteGuard
from clip_callbacks.trainer.averages import untrained_weights
from tests.helpers.averaging import AVERAGES, BATCHES, Subject, ema, loader, weight_averaging
from tests.helpers.exact_skip import PLACES, differences
from tests.helpers.matrix import matrix
from tests.helpers.training import TRUSTING, Regression, TwoNetworks, data, make_trainer, scaled

pytestmark = pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning", "ignore:.*lr_scheduler.step.*:UserWarning")
MOVED = "moved after a skipped step and before the next one"


class Kept(Callback):
    """Keeps the average before it takes the place of the weights."""

    def __init__(self, average):
        self.average = average

    def on_train_epoch_end(self, *_):
        self.state = copy.deepcopy(self.average._average_model.state_dict())


def averaged(tmp_path, make, batches, order=0, manual=False, guard=GradientClipping, module=Subject, **options):
    torch.manual_seed(0)
    average = make()
    kept = Kept(average)
    make_trainer(tmp_path, *[average, guard(1.0)][:: 1 - 2 * order], kept, **options).fit(module(manual), batches)
    assert "should_update" not in vars(average)
    return kept.state


LOOPS = {"automatic": {}, "accumulated": {"accumulate_grad_batches": 2}, "manual": {"manual": True}, "scaled": {}}


@matrix(average=list(AVERAGES), place=list(PLACES), loop=list(LOOPS), order=[0, 1])
def test_an_average_is_that_of_a_run_without_the_bad_batches(tmp_path, average, place, loop, order):
    each = 2 if loop == "accumulated" else 1

    def run(**batches):
        precision = scaled(init_scale=256.0) if loop == "scaled" else {}
        return averaged(tmp_path, AVERAGES[average], loader(each=each, **batches), order, max_epochs=2, **LOOPS[loop] | precision)

    bad = {each * number for number in PLACES[place]}
    assert differences(run(bad=bad), run(left_out=PLACES[place])) == []


def test_an_overflow_does_not_count(tmp_path):
    guards = []

    def guard(_):
        guards.append(NonFiniteGuard())
        return guards[-1]

    def run(**batches):
        return averaged(tmp_path, AVERAGES["every second step"], loader(1e6, **batches), guard=guard, **scaled(init_scale=256.0))

    assert differences(run(bad={0, 3}), run(left_out={0, 3})) == []
    counters = guards[0].state_dict()["counters"][0]
    assert (counters["skipped"], counters["overflowed"]) == (0, 2)


def test_both_packages_are_the_same(tmp_path):
    pytorch_lightning = pytest.importorskip("pytorch_lightning")
    twin = weight_averaging("pytorch_lightning").EMAWeightAveraging(decay=0.8, update_every_n_steps=2)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}

    class Twin(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            return nn.functional.mse_loss(self.net(batch[0]), batch[1]) * batch[2]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    def run(batches):
        torch.manual_seed(0)
        own, module = copy.deepcopy(twin), Twin()
        fit = pytorch_lightning.Trainer(
            accelerator="cpu", max_epochs=1, log_every_n_steps=1, callbacks=[own, GradientClipping()], **options
        )
        fit.fit(module, batches)
        return module.state_dict()

    assert differences(run(loader(bad={2})), run(loader(left_out={2}))) == []


class Several(TwoNetworks):
    """A batch says which of its two steps are bad."""

    def training_step(self, batch, batch_idx):
        fake = self.generator(batch[0])
        for optimizer, factor in zip(self.optimizers(), batch[2], strict=True):
            optimizer.zero_grad()
            self.manual_backward(self.discriminator(fake).mean() * factor)
            optimizer.step()
            fake = self.generator(batch[0])

    def validation_step(self, batch, batch_idx):
        pass


@pytest.mark.parametrize("average", ["mean", "every second step"])
def test_of_several_steps_of_a_batch_one_that_is_taken_is_enough(trainer, average):
    numbers, callback = [], AVERAGES[average]()
    ask = callback.should_update
    callback.should_update = lambda **given: numbers.append(given.get("step_idx")) or ask(**given)
    own = callback.should_update
    factors = [(1.0, 1.0), (1.0, math.nan), (math.nan, 1.0), (math.nan, math.nan), (1.0, 1.0)]
    batches = [(*batch, torch.tensor(each)) for batch, each in zip(data(5, size=1.0), factors, strict=True)]
    kept = Kept(callback)
    trainer(GradientClipping(), callback, kept).fit(Several(), DataLoader(batches, batch_size=None))
    assert numbers[:-1] == [1, 2, 3, 5]
    assert kept.state["n_averaged"] == (4 if average == "mean" else 1)
    assert callback.should_update is own, "somebody else's"


class Search(Subject):
    """LBFGS, whose first closure call of a batch is always good; the later ones are what the batch says."""

    def __init__(self, manual):
        super().__init__(manual, nn.Linear(4, 1))
        self.make_optimizer, self.options, self.calls = torch.optim.LBFGS, {"lr": 0.05, "max_iter": 3}, {}

    def loss(self, batch, batch_idx):
        self.calls[batch_idx] = self.calls.get(batch_idx, 0) + 1
        return super().loss([*batch[:2], batch[2] if self.calls[batch_idx] > 1 else 1.0], batch_idx)

    def training_step(self, batch, batch_idx):
        if self.automatic_optimization:
            return self.loss(batch, batch_idx)

        def closure():
            optimizer.zero_grad()
            loss = self.loss(batch, batch_idx)
            self.manual_backward(loss)
            return loss

        optimizer = self.optimizers()
        optimizer.step(closure=closure)
        return None


@pytest.mark.parametrize("manual", [False, True])
def test_a_line_search_that_turns_bad_on_its_way_does_not_count(tmp_path, manual):
    run = partial(averaged, tmp_path, AVERAGES["every second step"], manual=manual, module=Search)
    assert differences(run(loader(bad={1, 4, 5})), run(loader(left_out={1, 4, 5}))) == []


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_a_run_that_was_resumed_right_after_a_skipped_step_goes_on_like_one_without_it(tmp_path):
    def run(bad, left_out, stop):
        batches = loader(bad=bad, left_out=left_out, each=2, batches=8)
        torch.manual_seed(0)
        options = {"accumulate_grad_batches": 2}
        first = AVERAGES["every second step"]()
        saving = ModelCheckpoint(tmp_path / str(len(bad)), every_n_train_steps=stop, save_top_k=-1, filename="{step}")
        make_trainer(tmp_path, GradientClipping(1.0), first, saving, enable_checkpointing=True, **options).fit(Subject(), batches)
        rest = DataLoader([*batches.dataset[2 * stop :], *batches.dataset[: 2 * stop]], batch_size=None)
        kept = Kept(AVERAGES["every second step"]())
        path = tmp_path / str(len(bad)) / f"step={stop}.ckpt"
        make_trainer(tmp_path, GradientClipping(1.0), kept.average, kept, **options).fit(
            Subject(), rest, ckpt_path=path, **TRUSTING
        )
        return kept.state

    assert differences(run({8}, (), 5), run((), {4}, 4)) == []


@pytest.mark.parametrize("copied", [lambda callback: pickle.loads(pickle.dumps(callback)), copy.deepcopy])
def test_a_copy_made_in_mid_fit_has_nothing_of_ours(trainer, copied, monkeypatch):
    copies, hung = [], []

    class Copying(Callback):
        def on_train_batch_end(self, *_):
            hung.append("should_update" in vars(average))
            with monkeypatch.context() as patch:
                for name in ("_average_model", "_kwargs", "log", "log_dict"):  # a function of a function, and the module
                    patch.setattr(average, name, None, raising=False)
                copies.append(copied(average))

    average = ema(update_every_n_steps=2)
    trainer(GradientClipping(), average, Copying()).fit(Subject(), loader(bad={2}, batches=5))
    assert hung == [False, False, True, True, True]
    assert [callback.should_update(step_idx=step) for callback in copies for step in (2, 3)] == [True, False] * 5
    assert all(getattr(callback.should_update, "__self__", None) is callback for callback in copies)
    assert [callback._latest_update_step for callback in copies] == [1, 1, 3, 4, 4]


def test_steps_are_not_deferred_beside_an_average(trainer):
    with pytest.raises(ValueError, match="an average of the weights is to leave skipped steps out"):
        trainer(NonFiniteGuard(deferred=True), ema()).fit(Regression(fused=True), loader())


class OfEpochs(IterableDataset):
    def __init__(self, epochs):
        self.epochs = iter(epochs)

    def __iter__(self):
        yield from next(self.epochs)


@pytest.mark.parametrize("epoch", [None, 1, 2, 3])
def test_stochastic_weight_averaging_counts_epochs_and_no_steps(trainer, epoch):
    """In an epoch without a good batch too: an epoch without batches counts as well."""

    def run(is_left_out):
        torch.manual_seed(0)
        epochs = []
        for number in range(4):
            bad = set(range(5)) if number == epoch else {number}
            epochs.append(list(loader(bad=() if is_left_out else bad, left_out=bad if is_left_out else (), batches=5)))
        average = StochasticWeightAveraging(0.05, swa_epoch_start=2)
        module = Subject(net=nn.Linear(4, 1))
        trainer(NonFiniteGuard(max_consecutive=99), average, max_epochs=4).fit(
            module, DataLoader(OfEpochs(epochs), batch_size=None)
        )
        return module.state_dict() | {"n": average.n_averaged}

    assert differences(run(False), run(True)) == []


# --- averages that others keep


class Target(Subject):
    """Has a network that follows the trained one, moved through ``data`` at a place to choose."""

    def __init__(self, where="on_train_batch_end", when=lambda _: True, in_optimizer=False):
        super().__init__()
        self.target = copy.deepcopy(self.net).requires_grad_(False)
        self.where, self.when, self.in_optimizer = where, when, in_optimizer

    def follow(self, where):
        if where == self.where and self.when(self):
            for own, other in zip(self.target.parameters(), self.net.parameters(), strict=True):
                own.data = own.data * 0.9 + other.data * 0.1

    def training_step(self, batch, batch_idx):
        self.follow("training_step")
        return super().training_step(batch, batch_idx)

    def optimizer_step(self, *args, **options):
        super().optimizer_step(*args, **options)
        self.follow("optimizer_step")

    def on_train_batch_end(self, *_):
        self.follow("on_train_batch_end")

    def on_train_epoch_end(self):
        self.follow("on_train_epoch_end")

    def on_validation_start(self):
        self.follow("on_validation_start")

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters() if self.in_optimizer else self.net.parameters(), **self.options)


class Mean(Subject):
    def __init__(self):
        super().__init__()
        self.mean = AveragedModel(self.net)

    def on_train_batch_end(self, *_):
        self.mean.update_parameters(self.net)


class Codebook(Subject):
    """Its forward pass moves a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.book = nn.Module()
        self.book.centre, self.book.other = nn.Parameter(torch.zeros(4), requires_grad=False), nn.Linear(1, 1)

    def loss(self, batch, batch_idx):
        self.book.centre.mul_(0.9).add_(batch[0].mean(0))
        return super().loss(batch, batch_idx) + self.book.other.weight.sum() * 0

    def configure_optimizers(self):
        return self.make_optimizer([each for each in self.parameters() if each.requires_grad], **self.options)


class Following(Callback):
    """A moving average that another package might keep."""

    def __init__(self, kind="model"):
        self.kind = kind

    def on_train_start(self, trainer, module):
        if self.kind == "model":
            self.model = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        if self.kind == "copy":
            self.copy = copy.deepcopy(module.net)
        if self.kind == "shadow":
            self.shadow = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        if self.kind == "list":
            self.list = [parameter.detach().clone() for parameter in module.parameters()]

    @torch.no_grad()
    def on_train_batch_end(self, trainer, module, *_):
        if self.kind == "model":
            self.model.update_parameters(module)
        if self.kind == "copy":
            for own, other in zip(self.copy.parameters(), module.net.parameters(), strict=True):
                own.lerp_(other, 0.1)
        if self.kind == "shadow":
            self.shadow = {name: self.shadow[name] * 0.9 + 0.1 * parameter for name, parameter in module.named_parameters()}
        if self.kind == "list":
            for own, other in zip(self.list, module.parameters(), strict=True):
                own.data.lerp_(other.data, 0.1)


def stubborn():
    class Stubborn(weight_averaging().WeightAveraging):
        def on_train_batch_end(self, trainer, module, *_):
            self._average_model.update_parameters(module)

    return Stubborn()


STRANGERS = {
    "an AveragedModel of the module": (Mean, (), "`mean`"),
    "a target": (Target, (), "`target`"),
    "a target in the optimizer's own parameters": (lambda: Target(in_optimizer=True), (), "`target`"),
    "a target moved in optimizer_step": (lambda: Target("optimizer_step"), (), "`target`"),
    "a target moved in training_step": (lambda: Target("training_step"), (), "`target`"),
    "a parameter that a forward pass moves": (Codebook, (), "`book.centre`"),
    "a callback's AveragedModel": (Subject, (Following,), "`Following.model`"),
    "a callback's copy": (Subject, (partial(Following, "copy"),), "`Following.copy`"),
    "a callback's dictionary": (Subject, (partial(Following, "shadow"),), "`Following.shadow`"),
    "a callback's list": (Subject, (partial(Following, "list"),), "`Following.list`"),
    "a subclass with a hook of its own": (Subject, (stubborn,), "`Stubborn._average_model`"),
    "two of them": (Subject, (partial(Following, "list"), Following), "`Following.list`, `Following.model`"),
}


def moved(trainer, module, callbacks, batches, **options):
    """The warnings about averages."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(*callbacks, **options).fit(module, batches, data(2))
    return [str(warning.message) for warning in caught if MOVED in str(warning.message) and warning.category is RuntimeWarning]


@pytest.mark.parametrize("order", [1, -1], ids=["before", "after"])
@pytest.mark.parametrize("name", STRANGERS)
def test_an_average_that_counts_skipped_steps_is_named_once(trainer, name, order):
    make, strangers, named = STRANGERS[name]
    callbacks = [GradientClipping(), *(each() for each in strangers)][::order]
    (said,) = moved(trainer, make(), callbacks, loader(bad={2, 3, 6}), max_epochs=2)
    assert sorted(said.partition(f" {MOVED}")[0].split(", ")) == named.split(", ")


def test_the_last_batch_of_an_epoch_is_watched_as_far_as_our_own_hook(trainer):
    assert len(moved(trainer, Target("optimizer_step"), [GradientClipping()], loader(bad={BATCHES - 1}))) == 1


@pytest.mark.parametrize("name", STRANGERS)
def test_nothing_is_read_or_said_in_a_healthy_run(trainer, name, monkeypatch):
    def fail(*_):
        pytest.fail("read on a healthy step")

    monkeypatch.setattr("clip_callbacks.guard.averages.sum_of_bits", fail)
    make, strangers, _ = STRANGERS[name]
    assert moved(trainer, make(), [GradientClipping(), *(each() for each in strangers)], loader()) == []


def taken(module):
    """The code that the warning recommends."""
    return not module.trainer.callbacks[0].last_report.outcome.is_skipped


class Frozen(Subject):
    def __init__(self):
        super().__init__(net=nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)))
        self.net[2:4].requires_grad_(False)
        self.register_buffer("codes", torch.zeros(3))
        self.packed = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
        self.sparse = nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False)

    def loss(self, batch, batch_idx):
        self.codes += 1
        return super().loss(batch, batch_idx)

    def configure_optimizers(self):
        return self.make_optimizer(self.net.parameters(), **self.options)


QUIET = {
    "frozen layers and buffers": (Frozen, {}),
    "moved after steps that were taken": (lambda: Target(when=taken), {}),
    "moved at the end of an epoch": (lambda: Target("on_train_epoch_end"), {"max_epochs": 3}),
    "moved in validation": (lambda: Target("on_validation_start"), {"val_check_interval": 3}),
    "Lightning's": (Subject, {}),
}


@pytest.mark.parametrize("name", QUIET)
def test_there_is_no_false_alarm(trainer, name):
    make, options = QUIET[name]
    callbacks = [GradientClipping()]
    if name == "Lightning's":
        callbacks += [ema(), StochasticWeightAveraging(0.05, swa_epoch_start=1)]
    assert moved(trainer, make(), callbacks, loader(bad={0, 2, 3, 8}), **options) == []


def test_an_average_that_follows_a_taken_step_of_the_batch_is_left_alone(trainer):
    class Both(Several):
        def __init__(self):
            super().__init__()
            self.mean = AveragedModel(self.generator)

        def on_train_batch_end(self, *_):
            self.mean.update_parameters(self.generator)

    def run(*factors):
        batches = [(*batch, torch.tensor(each)) for batch, each in zip(data(len(factors), size=1.0), factors, strict=True)]
        return moved(trainer, Both(), [GradientClipping()], DataLoader(batches, batch_size=None))

    good, bad = (1.0, 1.0), (math.nan, math.nan)
    assert run(good, (math.nan, 1.0), good, (1.0, math.nan), good) == []
    assert len(run(good, bad, good)) == 1


def test_weights_apart_are_named_by_the_largest_module(trainer):
    fit = trainer(Following("copy"))
    module = Target()
    fit.strategy.connect(module)
    module.trainer = fit
    fit.strategy.optimizers = [module.configure_optimizers()]
    module.lazy = nn.LazyLinear(3)
    assert list(untrained_weights(fit, module)) == ["target"]
