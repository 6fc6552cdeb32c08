from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from clip_callbacks import GradientClipping, NonFiniteGradientError, NonFiniteGuard
from tests.helpers.matrix import matrix
from tests.helpers.training import Iterating, Poisoned, Regression, assert_same_bits, data, weights

pytestmark = pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning")


def optimizer_state(fit):
    return [value for state in fit.optimizers[0].state.values() for value in state.values() if isinstance(value, torch.Tensor)]


@matrix(
    bad={"first": {0: math.nan}, "later": {5: math.inf}, "two in a row": {3: math.nan, 4: -math.inf}},
    guard={"guard": NonFiniteGuard, "clipping": GradientClipping},
    optimizer={
        "AdamW": (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
        "SGD": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
        "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        "RMSprop": (torch.optim.RMSprop, {"momentum": 0.5}),
        "Adagrad": (torch.optim.Adagrad, {}),
        "fused": (torch.optim.AdamW, {"fused": True}),
    },
)
def test_weights_and_optimizer_state_are_as_if_the_batch_had_not_come(trainer, bad, guard, optimizer):
    optimizer, options = optimizer

    def train(module, loader):
        fit = trainer(guard())
        fit.fit(module, loader)
        return weights(module), optimizer_state(fit)

    good = [batch for i, batch in enumerate(data()) if i not in bad]
    torch.manual_seed(0)
    poisoned = train(Poisoned(bad, optimizer=optimizer, **options), data())
    torch.manual_seed(0)
    clean = train(Regression(optimizer, **options), DataLoader(good, batch_size=None))
    assert_same_bits(poisoned[0], clean[0])
    assert_same_bits(poisoned[1], clean[1])


def test_without_a_guard_one_nan_is_the_end(trainer):
    module = Poisoned({3: math.nan})
    trainer().fit(module, data())
    assert any(parameter.isnan().all() for parameter in module.parameters()), "or the tests above could not fail"


def test_warning_names_place_offenders_and_stage(trainer):
    class Backward(Regression):
        def loss(self, batch, batch_idx):
            hidden = self.net[0](batch[0])
            if batch_idx == 2:
                hidden = hidden + torch.sqrt(hidden * 0)  # finite, but its derivative is 0/0
            return self.net[2](torch.tanh(hidden)).square().mean()

    with pytest.warns(RuntimeWarning) as caught:
        trainer(NonFiniteGuard()).fit(Backward(), data(4))
    (message,) = [str(w.message) for w in caught if "Non-finite" in str(w.message)]
    assert "step 2, epoch 0, batch 2, rank 0" in message
    assert "the loss is finite, its gradients are not" in message
    assert "Non-finite gradients in 2 of 4 parameters" in message
    assert "net.0.weight [8, 4]: 32 NaN" in message
    assert "Nearest finite gradients: net.2.weight (after)" in message
    assert len(message.splitlines()) <= 20


def test_report_tells_a_bad_loss_and_bad_parameters(trainer):
    with pytest.warns(RuntimeWarning, match="Stage: the loss is non-finite"):
        trainer(NonFiniteGuard()).fit(Poisoned({1: math.nan}), data(3))
    module = Regression()
    with torch.no_grad():
        module.net[2].bias.fill_(math.nan)
    with pytest.warns(RuntimeWarning, match=r"Stage: parameters were non-finite(.|\n)*net\.2\.bias \[1\]: 1 NaN"):
        trainer(NonFiniteGuard()).fit(module, data(3))


def test_many_offenders_are_capped(trainer):
    module = Poisoned({0: math.nan}, net=torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(15)], torch.nn.Linear(4, 1)))
    with pytest.warns(RuntimeWarning, match=r"and 24 more") as caught:
        trainer(NonFiniteGuard()).fit(module, data(2))
    assert all(len(str(w.message).splitlines()) <= 20 for w in caught)


def test_raise(trainer):
    module = Poisoned({2: math.nan})
    guard = NonFiniteGuard("raise")
    with pytest.raises(NonFiniteGradientError, match=r"step 2, epoch 0, batch 2(.|\n)*net\.0\.weight"):
        trainer(guard).fit(module, data())
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


def test_max_consecutive(trainer):
    torch.manual_seed(0)
    guard = NonFiniteGuard(max_consecutive=3)
    trainer(guard).fit(Poisoned({1: math.nan, 2: math.nan, 4: math.nan, 5: math.nan}), data())
    assert guard.skipped_steps == 4
    guard = NonFiniteGuard(max_consecutive=3)
    with pytest.raises(NonFiniteGradientError, match=r"bad step 3 in a row \(max_consecutive=3\)") as caught:
        trainer(guard).fit(Poisoned({1: math.nan, 2: math.nan, 3: math.nan}), data())
    assert "Look at the batch" in str(caught.value), "clipping does not cure a loss that is not finite"


def test_zero_takes_the_step_with_the_finite_entries(trainer):
    module = Poisoned({0: math.inf}, lr=1.0)
    before = weights(module)
    guard = NonFiniteGuard("zero")
    trainer(guard).fit(module, data(1))
    assert guard.zeroed_steps == 1
    assert guard.skipped_steps == 0
    assert_same_bits(weights(module), before)  # every entry was non-finite: SGD without decay stands still


def test_ignore_lets_everything_through(trainer):
    module, guard = Poisoned({0: math.nan}), NonFiniteGuard("ignore")
    trainer(guard, GradientClipping(1.0)).fit(module, data(2))
    assert all(parameter.isnan().any() for parameter in module.parameters())
    assert guard.skipped_steps == 0


def test_a_guard_takes_the_place_of_the_shorthand(trainer):
    clipping, guard = GradientClipping(1.0), NonFiniteGuard("skip")
    trainer(clipping, guard).fit(Poisoned({2: math.nan}), data())
    assert guard.skipped_steps == clipping.skipped_steps == 1
    clipping, guard = GradientClipping(1.0), NonFiniteGuard("zero")
    trainer(clipping, guard).fit(Poisoned({2: math.nan}), data())
    assert (guard.zeroed_steps, guard.skipped_steps) == (1, 0)


@pytest.mark.parametrize("policy", ["raise", "zero", "ignore"])
@pytest.mark.parametrize("guard", [NonFiniteGuard, lambda: NonFiniteGuard("zero")])
def test_a_shorthand_that_a_guard_would_overrule_is_refused(trainer, policy, guard):
    module = Regression()
    message = rf'`nonfinite` must be "skip" beside a NonFiniteGuard, got \'{policy}\'.*NonFiniteGuard\(\'{policy}\'\)'
    with pytest.raises(ValueError, match=message):
        trainer(GradientClipping(1.0, nonfinite=policy), guard()).fit(module, data(2))
    assert module.trainer.global_step == 0


def test_a_line_tells_what_the_table_at_the_end_does_not(trainer, said):
    trainer(NonFiniteGuard("zero")).fit(Poisoned({2: math.nan}), data())
    assert said[1:] == ["NonFiniteGuard: optimizer steps: 12, taken with non-finite entries set to 0: 1."]
    said.clear()
    trainer(GradientClipping(1.0)).fit(Poisoned({2: math.nan}), data())
    assert len(said) == 1, "skipped steps are in the table"


@pytest.mark.usefixtures("never_examined")
def test_a_healthy_step_does_not_walk(trainer):
    trainer(NonFiniteGuard(), GradientClipping(1.0)).fit(Regression(), data())


def facts(logger):
    return [json.loads(line) for line in (Path(logger.log_dir) / "nonfinite_steps.jsonl").read_text().splitlines()]


def test_journal_has_the_facts_of_each_bad_step(trainer, tmp_path):
    csv = CSVLogger(tmp_path)
    trainer(GradientClipping(1.0), logger=csv, max_epochs=2).fit(Poisoned({2: math.nan, 9: math.inf}), data(6))
    first, second = facts(csv)
    assert {key: first[key] for key in ("step", "epoch", "batch", "rank")} == {"step": 2, "epoch": 0, "batch": 2, "rank": 0}
    assert {key: second[key] for key in ("step", "epoch", "batch", "rank")} == {"step": 9, "epoch": 1, "batch": 3, "rank": 0}
    assert first["stage"] == "loss"
    assert first["gradients"][0] == {"name": "net.0.weight", "shape": [8, 4], "nan": 32, "inf": 0}
    trainer(GradientClipping(1.0), logger=CSVLogger(tmp_path, version="clean")).fit(Regression(), data(3))
    assert not (tmp_path / "lightning_logs/clean/nonfinite_steps.jsonl").exists()


def test_a_step_that_made_parameters_bad_is_told_from_bad_ones_before(trainer):
    class Huge(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 3:  # a finite gradient, a learning rate beyond all bounds
                self.trainer.optimizers[0].param_groups[0]["lr"] = 1e38

    with pytest.warns(RuntimeWarning) as caught:
        trainer(NonFiniteGuard(max_consecutive=3)).fit(Huge(), data(6))
    first, second = [str(w.message) for w in caught if "Non-finite" in str(w.message)]
    assert "step 4" in first
    assert "the optimizer step before made parameters non-finite, from finite gradients" in first
    assert "parameters were non-finite before this step" in second


@pytest.mark.parametrize("bad_layer", ["net.0", "net.2"])
def test_trace_names_the_first_module_with_a_bad_output(trainer, tmp_path, bad_layer):
    class Breaking(torch.nn.Linear):
        """NaN for large inputs."""

        def forward(self, x):
            return torch.where(x.abs().amax() > 100, math.nan, 1.0) * super().forward(x)

    class Large(Regression):
        def loss(self, batch, batch_idx):
            return super().loss([batch[0] * 1e3 if batch_idx == 2 else batch[0], batch[1]], batch_idx)

    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8, affine=False), torch.nn.Linear(8, 1))
    if bad_layer == "net.0":
        net[0] = Breaking(4, 8)
    else:
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), Breaking(8, 1))
    csv = CSVLogger(tmp_path)
    module = Large(net=net)
    with pytest.warns(RuntimeWarning, match=rf"First non-finite output: {bad_layer} \(Breaking\), output .* NaN, inputs finite"):
        trainer(NonFiniteGuard(trace_forward=True), logger=csv).fit(module, data(5, size=0.1))
    assert facts(csv)[0]["traced"].startswith(bad_layer)
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
def test_trace_says_why_it_names_no_module_where_training_step_draws_its_batches(trainer):
    with pytest.warns(RuntimeWarning, match=r"First non-finite output: not traced with training_step\(dataloader_iter\)"):
        trainer(NonFiniteGuard(trace_forward=True)).fit(Iterating({1: math.nan}), data(3))


def test_trace_leaves_the_run_as_it_was(trainer, tmp_path):
    results = []
    for trace in (True, False):
        torch.manual_seed(0)
        csv = CSVLogger(tmp_path, version=str(trace))
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
        module = Poisoned({2: math.nan}, net=net)
        trainer(NonFiniteGuard("zero", trace_forward=trace), logger=csv).fit(module, data(6, size=0.1))
        results.append([*module.state_dict().values()])
        assert facts(csv)[0]["traced"] == ("no module's output: look at the loss function and the batch" if trace else None)
    assert_same_bits(*results)
    tables = [(tmp_path / f"lightning_logs/{trace}/metrics.csv").read_text() for trace in (True, False)]
    assert tables[0] == tables[1]


def test_a_nan_that_no_scale_cures_is_told_from_an_overflow(trainer):
    from tests.helpers.training import scaled

    guard = NonFiniteGuard(max_consecutive=3)
    module = Poisoned({4: math.nan, 6: math.nan}, optimizer=torch.optim.AdamW, lr=0.01)
    fit = trainer(guard, **scaled(init_scale=2.0**30))
    fit.fit(module, data(24, size=1.0))
    assert guard.skipped_steps == 2
    assert guard.overflowed_steps > 0
    assert fit.precision_plugin.scaler.get_scale() == 2.0 ** (30 - guard.overflowed_steps), "a loss that is NaN is not its fault"

    class Backward(Regression):
        def loss(self, batch, batch_idx):
            hidden = self.net[0](batch[0])
            return self.net[2](torch.tanh(hidden + torch.sqrt(hidden * 0))).square().mean()

    guard = NonFiniteGuard(max_consecutive=3)
    with pytest.raises(NonFiniteGradientError, match="bad step 3 in a row"):
        trainer(guard, **scaled(init_scale=16.0)).fit(Backward(), data(24))
    assert guard.overflowed_steps == 4, "at 16, 8, 4 and 2 a lower scale might have cured it"


def test_nan_that_the_scaler_cannot_see_counts(trainer):
    from lightning.pytorch import Callback

    from tests.helpers.training import scaled

    class After(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step >= 2:
                next(pl_module.parameters()).grad.fill_(math.nan)

    guard = NonFiniteGuard(max_consecutive=3)
    with pytest.raises(NonFiniteGradientError, match="bad step 3 in a row"):
        trainer(After(), guard, **scaled(init_scale=1024.0)).fit(Regression(), data())
    assert guard.overflowed_steps == 0


def test_a_half_precision_loss_that_overflows_by_its_scale_is_an_overflow(trainer):
    from tests.helpers.training import scaled

    class Half(Regression):
        def loss(self, batch, batch_idx):
            return super().loss(batch, batch_idx).half()

    guard = NonFiniteGuard("raise")
    trainer(guard, **scaled(init_scale=2.0**17)).fit(Half(lr=0.001), data(size=1.0))
    assert guard.overflowed_steps > 0


def test_trace_never_ends_a_run_and_leaves_metrics_alone(trainer, tmp_path):
    from torchmetrics import MeanMetric

    class Penalized(Poisoned):
        def __init__(self, *, fails):
            super().__init__({2: math.nan})
            self.fails, self.seen = fails, MeanMetric()

        def loss(self, batch, batch_idx):
            inputs = batch[0].clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.net(inputs).sum(), inputs, create_graph=True)
            self.seen.update(1.0)
            if self.fails and self.seen.update_count == 4 and batch_idx == 2:
                raise ValueError("not twice")
            return super().loss(batch, batch_idx) + slope.square().mean()

    for fails, traced in ((False, "no module's output"), (True, "not found, training_step raised ValueError: not twice")):
        csv = CSVLogger(tmp_path, version=str(fails))
        module = Penalized(fails=fails)
        trainer(NonFiniteGuard(trace_forward=True), logger=csv).fit(module, data(6))
        assert facts(csv)[0]["traced"].startswith(traced)
        assert module.seen.weight == 6


def test_each_of_several_optimizers_is_judged_by_its_own_losses(trainer):
    from tests.helpers.training import TwoNetworks, scaled

    guard = NonFiniteGuard()
    fit = trainer(guard, **scaled(init_scale=16.0))
    fit.fit(TwoNetworks({3: math.nan}), data(8))
    assert (guard.skipped_steps, guard.overflowed_steps) == (1, 0), "one of two networks had a loss that is NaN"
    assert fit.precision_plugin.scaler.get_scale() == 16.0


def test_a_journal_that_cannot_be_written_does_not_stop_the_run(trainer, tmp_path):
    class Block(Callback):
        def on_train_start(self, trainer, pl_module):
            (Path(trainer.log_dir) / "nonfinite_steps.jsonl").mkdir(parents=True)

    guard = NonFiniteGuard()
    with pytest.warns(UserWarning, match="cannot be written") as caught:
        trainer(guard, Block(), logger=CSVLogger(tmp_path)).fit(Poisoned({1: math.nan, 3: math.nan}), data(6))
    assert guard.skipped_steps == 2
    assert len([warning for warning in caught if "cannot be written" in str(warning.message)]) == 1
