from __future__ import annotations

import json
import random
import shutil
import warnings
import weakref

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from clip_callbacks import NonFiniteGradientError
from clip_callbacks.bundles.bundle import UnusableBundleError
from clip_callbacks.bundles.random_states import RandomStates, restore
from tests.helpers.bundles import NAN, bundles_in, guard_to
from tests.helpers.training import Poisoned, Regression, assert_same_bits, data

pytestmark = [
    pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Spike at:RuntimeWarning"),
]


def test_a_skipped_step_leaves_one_folder_with_its_window_and_where_it_was(trainer, tmp_path):
    fit = trainer(guard_to(tmp_path), accumulate_grad_batches=3, max_epochs=2)
    fit.fit(Poisoned({16: NAN}), data(12))
    (bundle,) = bundles_in(tmp_path / "bad")
    assert bundle.place == {"step": 5, "epoch": 1, "batch": 5, "rank": 0}
    assert bundle.path.name == "step-0000005_batch-0000005_epoch-1_rank-0"
    assert bundle.facts["kind"] == "nonfinite"
    assert bundle.facts["report"]["stage"] == "loss"
    assert bundle.facts["trainer"]["accumulate_grad_batches"] == 3
    assert bundle.facts["module"]["class"] == "tests.helpers.training.Poisoned"
    assert bundle.facts["module"]["state"]["net.0.weight"] == ["float32", [8, 4]]
    assert bundle.facts["versions"]["torch"] == torch.__version__
    rows = bundle.micro_batches()
    assert [row["batch_idx"] for row in rows] == [3, 4, 5]
    for row, batch in zip(rows, list(data(12))[3:6], strict=True):
        assert_same_bits(row["batch"], batch)
    assert [bool(row["loss"].isfinite()) for row in rows] == [True, False, True]
    assert bundle.weights() is None


def test_a_raised_step_a_zeroed_one_and_a_spike_leave_theirs(trainer, tmp_path):
    with pytest.raises(NonFiniteGradientError, match="Bundle: .*step-0000004"):
        trainer(guard_to(tmp_path, policy="raise")).fit(Poisoned({4: NAN}), data())
    trainer(guard_to(tmp_path, policy="zero")).fit(Poisoned({5: NAN}), data())
    trainer(guard_to(tmp_path, skip_above=1e4)).fit(Poisoned({6: 1e6}), data())
    raised, zeroed, spike = bundles_in(tmp_path / "bad")
    assert [bundle.place["step"] for bundle in (raised, zeroed, spike)] == [4, 5, 6]
    assert [bundle.facts["report"]["policy"] for bundle in (raised, zeroed, spike)] == ["raise", "zero", "skip"]
    assert spike.facts["kind"] == "spike"
    assert spike.facts["report"]["total_norm"] > spike.facts["report"]["limit"] == 1e4


def test_good_steps_and_a_policy_that_ignores_leave_nothing(trainer, tmp_path):
    trainer(guard_to(tmp_path)).fit(Regression(), data())
    trainer(guard_to(tmp_path, policy="ignore")).fit(Poisoned({3: NAN}), data(5))
    assert list((tmp_path / "bad").iterdir()) == []


def test_a_dropped_micro_batch_is_alone_in_its_bundle(trainer, tmp_path):
    trainer(guard_to(tmp_path, level="microbatch"), accumulate_grad_batches=4).fit(Poisoned({5: NAN, 6: NAN}), data(12))
    first, second = bundles_in(tmp_path / "bad")
    for bundle, number in ((first, 5), (second, 6)):
        assert bundle.facts["level"] == "microbatch"
        (row,) = bundle.micro_batches()
        assert row["batch_idx"] == bundle.place["batch"] == number


def test_batches_are_kept_by_reference_until_their_step_and_no_longer(trainer, tmp_path):
    seen, kept = [], []

    class Look(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            seen.append(id(pl_module.batch))

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            windows, (context,) = guard._engine.windows, guard._engine.contexts
            kept.append([id(it.kept.batch) for it in windows.of_step(context)[0]])

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if (batch_idx + 1) % 4 == 0:
                assert not guard._engine.windows.of_step(guard._engine.contexts[0])[0]

    class Keeps(Regression):
        def loss(self, batch, batch_idx):
            self.batch = batch
            return super().loss(batch, batch_idx)

    guard = guard_to(tmp_path)
    trainer(Look(), guard, accumulate_grad_batches=4).fit(Keeps(), data(8))
    assert kept == [seen[:4], seen[4:]], "the same objects, no copies"


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(8), nn.Dropout(0.5)], ids=["batch_norm", "dropout"])
def test_full_weights_random_numbers_and_batch_give_the_same_gradients_again(trainer, tmp_path, layer):
    def net():
        return nn.Sequential(nn.Linear(4, 8), layer, nn.Tanh(), nn.Linear(8, 1))

    class Look(Callback):
        """Keeps the weights before the step, and the gradients that a replay must have."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 6:
                self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            self.gradients = [parameter.grad.clone() for parameter in pl_module.parameters() if parameter.grad is not None]

        def on_after_backward(self, trainer, pl_module):
            if trainer.fit_loop.batch_idx == 6:
                self.gradients = [parameter.grad.clone() for parameter in pl_module.parameters()]
                self.momentum = [dict(state) for state in trainer.optimizers[0].state.values()]

    look = Look()
    module = Poisoned({6: 1e9}, net=net(), momentum=0.9)
    guard = guard_to(tmp_path, weights="full", skip_above=1e6)
    trainer(look, guard, max_steps=7).fit(module, data())
    (bundle,) = bundles_in(tmp_path / "bad")
    (row,) = bundle.micro_batches()
    again = Regression(net=net())
    again.load_state_dict(bundle.weights()["module"])
    assert_same_bits(list(bundle.weights()["module"].values()), list(look.state.values()))
    restore(row["rng"], again)
    (again.loss(row["batch"], 6) * 1e9).backward()
    assert_same_bits([parameter.grad for parameter in again.parameters()], look.gradients)
    (state,) = torch.load(bundle.path / "optimizers.pt", weights_only=True)
    assert_same_bits(
        [entry["momentum_buffer"] for entry in state["state"].values()], [entry["momentum_buffer"] for entry in look.momentum]
    )


def test_generators_of_all_kinds_go_on_where_they_were():
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = nn.Identity()
            self.child.dice = torch.Generator().manual_seed(3)
            self.numpy = np.random.default_rng(4)
            self.python = random.Random(5)

        def draw(self):
            own = [torch.rand(3, generator=self.child.dice).tolist(), self.numpy.random(), self.python.random()]
            return own, torch.rand(2).tolist(), np.random.rand(), random.random()

    module = Module()
    module.draw()
    states = RandomStates(module).capture()
    drawn = module.draw()
    module.draw()
    assert restore(states, module) == []
    assert module.draw() == drawn
    assert restore(states, nn.Identity()) == [
        f"the module has no generator `{name}`, which the bundle has" for name in ("numpy", "python", "child.dice")
    ]


def test_a_reference_names_the_last_checkpoint_and_its_step(trainer, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=4, save_top_k=-1)
    options = {"enable_checkpointing": True}
    trainer(guard_to(tmp_path), checkpoint, **options).fit(Poisoned({9: NAN}), data())
    (bundle,) = bundles_in(tmp_path / "bad")
    weights = bundle.facts["weights"]
    assert weights == {"kind": "reference", "checkpoint": str(tmp_path / "checkpoints" / "epoch=0-step=8.ckpt"), "step": 8}
    shutil.rmtree(tmp_path / "bad")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`", UserWarning)
        trainer(guard_to(tmp_path), max_epochs=2).fit(Poisoned({12: NAN}), data(), ckpt_path=weights["checkpoint"])
    (bundle,) = bundles_in(tmp_path / "bad")
    assert bundle.facts["weights"] == {"kind": "reference", "checkpoint": weights["checkpoint"], "step": None}
    shutil.rmtree(tmp_path / "bad")
    trainer(guard_to(tmp_path, weights="none")).fit(Poisoned({2: NAN}), data())
    assert bundles_in(tmp_path / "bad")[0].facts["weights"] == {"kind": "none"}


def test_the_message_and_the_journal_tell_where_the_bundle_is(trainer, tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    with pytest.warns(RuntimeWarning, match=r"Bundle: .*step-0000003(.|\n)*Run it again: clip-callbacks replay .*step-0000003"):
        trainer(guard_to(tmp_path), logger=logger).fit(Poisoned({3: NAN}), data(5))
    (line,) = (tmp_path / "nonfinite_steps.jsonl").read_text().splitlines()
    assert json.loads(line)["bundle"] == str(bundles_in(tmp_path / "bad")[0].path)


def test_deferred_steps_leave_bundles_of_their_own_batch(trainer, tmp_path):
    options = {"optimizer": torch.optim.AdamW, "fused": True}
    guard = guard_to(tmp_path, deferred=True, weights="full", hold_schedulers=False)
    trainer(guard, log_every_n_steps=50).fit(Poisoned({4: NAN, 11: NAN}, **options), data())
    first, last = bundles_in(tmp_path / "bad")
    assert [first.place["step"], last.place["step"]] == [4, 11]
    for bundle, number in ((first, 4), (last, 11)):
        assert bundle.facts["trainer"]["global_step"] == number
        assert_same_bits(bundle.micro_batches()[0]["batch"], list(data())[number])


class SeldomSteps(LightningModule):
    """Steps its second network at batch 39 only, and clears its gradients before each pass if asked to."""

    def __init__(self, *, clears):
        super().__init__()
        self.automatic_optimization, self.clears = False, clears
        self.first, self.second, self.batches, self.alive = nn.Linear(4, 1), nn.Linear(4, 1), [], []

    def training_step(self, batch, batch_idx):
        self.batches.append(weakref.ref(batch[0]))
        first, second = self.optimizers()
        first.zero_grad()
        if self.clears:
            second.zero_grad()
        loss = (self.first(batch[0]) + self.second(batch[0])).square().mean()
        self.manual_backward(loss * NAN if batch_idx == 39 else loss)
        first.step()
        if batch_idx == 39:
            second.step()
        self.alive.append(sum(batch() is not None for batch in self.batches))

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.01) for net in (self.first, self.second)]


@pytest.mark.parametrize(("clears", "most"), [(True, 3), (False, 18)])
def test_an_optimizer_that_seldom_steps_does_not_keep_every_batch(trainer, tmp_path, clears, most):
    module = SeldomSteps(clears=clears)
    trainer(guard_to(tmp_path)).fit(module, data(40))
    assert max(module.alive) <= most
    of_second = next(bundle for bundle in bundles_in(tmp_path / "bad") if bundle.place["optimizer"] == "SGD-1")
    assert [row["batch_idx"] for row in of_second.micro_batches()] == ([39] if clears else list(range(24, 40)))


def test_a_training_step_that_takes_the_iterator_leaves_no_wrong_batch(trainer, tmp_path):
    class Iterates(Regression):
        def training_step(self, dataloader_iter):
            batch, batch_idx, _ = next(dataloader_iter)
            loss = self.loss(batch, batch_idx)
            return loss * NAN if batch_idx == 3 else loss

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*dataloader_iter.*")
        trainer(guard_to(tmp_path)).fit(Iterates(), data(6))
    (bundle,) = bundles_in(tmp_path / "bad")
    with pytest.raises(UnusableBundleError, match="holds no batches: training_step takes the dataloader's iterator"):
        bundle.micro_batches()


def test_a_backward_pass_that_lightning_is_not_told_of_leaves_a_bundle_that_says_so(trainer, tmp_path):
    class ByItself(SeldomSteps):
        def manual_backward(self, loss):
            loss.backward()

    trainer(guard_to(tmp_path)).fit(ByItself(clears=True), data(40))
    bundles = bundles_in(tmp_path / "bad")
    assert bundles
    for bundle in bundles:
        with pytest.raises(UnusableBundleError, match=r"or calls loss.backward\(\) and not self.manual_backward"):
            bundle.micro_batches()


def test_random_numbers_are_those_of_the_closure_call_that_was_bad(trainer, tmp_path):
    class Noisy(Regression):
        calls = 0

        def loss(self, batch, batch_idx):
            self.calls += 1
            self.drawn = torch.rand(())
            loss = super().loss(batch, batch_idx)
            if self.calls == 3:
                self.bad = self.drawn
                return loss * NAN
            return loss

    module = Noisy(torch.optim.LBFGS, lr=0.1, max_iter=4)
    trainer(guard_to(tmp_path)).fit(module, data(1))
    (bundle,) = bundles_in(tmp_path / "bad")
    restore(bundle.micro_batches()[-1]["rng"], module)
    assert torch.equal(torch.rand(()), module.bad)


def test_odd_hyperparameters_sparse_and_lazy_tensors_are_no_obstacle(trainer, tmp_path):
    class Odd(Poisoned):
        def __init__(self):
            super().__init__({1: NAN})
            self.save_hyperparameters({"grid": {(1, 2): [torch.ones(1), {3}]}})
            self.register_buffer("sparse", torch.eye(3).to_sparse())
            self.unused = nn.LazyLinear(3)

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    trainer(guard_to(tmp_path)).fit(Odd(), data(3))
    (bundle,) = bundles_in(tmp_path / "bad")
    assert bundle.facts["module"]["hparams"] == {"grid": {"(1, 2)": ["tensor([1.])", "{3}"]}}
    assert "unused.weight" not in bundle.facts["module"]["state"]


def test_full_weights_are_written_before_other_optimizers_step(trainer, tmp_path):
    class Fused(SeldomSteps):
        def configure_optimizers(self):
            return [torch.optim.SGD(net.parameters(), lr=0.01, fused=True) for net in (self.first, self.second)]

    with pytest.raises(ValueError, match="`deferred` cannot be True here: bundles of the weights"):
        trainer(guard_to(tmp_path, deferred=True, weights="full")).fit(Fused(clears=True), data(2))


class Configured(Poisoned):
    def __init__(self, size: float = 1.0):
        super().__init__({1: NAN})
        self.size = size

    def train_dataloader(self):
        return data(3, size=self.size)


def test_configuration_of_the_command_line_goes_along(tmp_path):
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    quiet = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
    guard = ["--trainer.callbacks+=clip_callbacks.NonFiniteGuard", f"--trainer.callbacks.bundles={tmp_path / 'bad'}"]
    where = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}"]
    LightningCLI(Configured, args=["fit", "--model.size=2.5", *quiet, *where, *guard])
    (bundle,) = bundles_in(tmp_path / "bad")
    assert "size: 2.5" in (bundle.path / "config.yaml").read_text()
