"""GradientClipping in a Trainer: the bits of gradient_clip_val, several optimizers, LBFGS, manual optimization."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from clip_callbacks import AccumulationRescaling, ClipRule, GradientClipping, GradientNormMonitor, NonFiniteGuard
from tests.helpers.records import record_of
from tests.helpers.training import GradientTape, Poisoned, Regression, TwoNetworks, assert_same_bits, data, weights


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 1))

    def forward(self, x):
        return self.net(x.view(-1, 1, 8, 8))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.lstm(x.view(-1, 16, 4))[0][:, -1])


@pytest.mark.parametrize(("net", "max_norm"), [(Convolutional, 2.0), (Recurrent, 0.5)])
@pytest.mark.parametrize(
    ("optimizer", "options"), [(torch.optim.SGD, {"momentum": 0.9, "lr": 0.01}), (torch.optim.AdamW, {"lr": 0.01})]
)
def test_same_bits_as_gradient_clip_val_over_100_steps(trainer, net, max_norm, optimizer, options):
    def train(*callbacks, **trainer_options):
        torch.manual_seed(0)
        module = Regression(optimizer, net(), **options)
        fit = trainer(*callbacks, max_steps=100, max_epochs=-1, **trainer_options)
        fit.fit(module, data(25, size=1.0, features=64))
        return module, fit

    theirs, _ = train(gradient_clip_val=max_norm)
    ours, fit = train(GradientClipping(max_norm))
    assert fit.global_step == 100
    assert 0 < fit.callback_metrics["grad/clip_fraction_epoch"] < 1, "some steps clipped, some not"
    assert_same_bits(weights(ours), weights(theirs))
    unclipped, _ = train()
    assert any(not torch.equal(a, b) for a, b in zip(weights(ours), weights(unclipped), strict=True))


def test_same_bits_as_clipping_by_value(trainer):
    results = []
    for callbacks, options in (
        ([], {"gradient_clip_val": 0.3, "gradient_clip_algorithm": "value"}),
        ([GradientClipping(None, clip_value=0.3)], {}),
    ):
        torch.manual_seed(0)
        module = Regression()
        trainer(*callbacks, **options).fit(module, data())
        results.append(weights(module))
    assert_same_bits(*results)


@pytest.mark.parametrize("max_norm", [None, math.inf, "inf"])
def test_no_limit_changes_nothing(trainer, max_norm):
    results = []
    for callbacks in ([], [GradientClipping(max_norm), GradientNormMonitor(), NonFiniteGuard(), AccumulationRescaling()]):
        torch.manual_seed(0)
        module = Regression()
        trainer(*callbacks).fit(module, data())
        results.append(weights(module))
    assert_same_bits(*results)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_members_work_as_one_pass_in_any_order(trainer, order):
    def train(shift):
        torch.manual_seed(0)
        members = [GradientClipping(0.5, scope="layer"), AccumulationRescaling(), NonFiniteGuard("zero"), GradientNormMonitor()]
        module = Poisoned({4: math.nan})
        fit = trainer(*members[shift:], *members[:shift], accumulate_grad_batches=5)
        with pytest.warns(RuntimeWarning, match="Non-finite gradients"):
            fit.fit(module, data(12))
        reports = {member.last_report for member in members}
        assert len(reports) == 1
        return weights(module)

    assert_same_bits(train(order), train(0))


def test_report_of_three_four(trainer):
    callback = GradientClipping(1.0)
    trainer(callback).fit(GradientTape(torch.tensor([[3.0, 4.0]])))
    report = callback.last_report
    assert report.total_norm == 5.0
    torch.testing.assert_close(report.clip_coef, torch.tensor(0.2))
    torch.testing.assert_close(report.clipped_norm, torch.tensor(1.0))
    assert report.max_norm == 1.0
    assert report.names == ("global",)
    assert report.outcome == "taken"
    assert not report.skipped
    assert callback.skipped_steps == 0


def test_several_optimizers_are_kept_apart(trainer):
    module, callback = TwoNetworks(), GradientClipping(1.0)
    fit = trainer(callback)
    fit.fit(module, data())
    assert all(module.held), "the other network's stale gradients are not touched"
    metrics = fit.callback_metrics
    assert metrics["grad/total_norm-SGD-1"] > 10 * metrics["grad/total_norm-SGD"]
    assert metrics["grad/clipped_norm-SGD-1"] == pytest.approx(1.0, rel=1e-5)
    expected = torch.stack([p.grad.norm() for p in module.discriminator.parameters()]).norm()
    torch.testing.assert_close(metrics["grad/clipped_norm-SGD-1"], expected)


def test_one_rule_for_each_network(trainer):
    rules = [ClipRule(1e-3, include="^generator"), ClipRule(2.0, include="^discriminator")]
    callback, fit = GradientClipping(rules=rules), None
    fit = trainer(callback)
    fit.fit(TwoNetworks(), data())
    assert fit.callback_metrics["grad/max_norm-SGD"] == pytest.approx(1e-3)
    assert fit.callback_metrics["grad/max_norm-SGD-1"] == 2.0
    assert fit.callback_metrics["grad/clipped_norm-SGD"] <= 1e-3


def test_one_networks_bad_step_does_not_stop_the_other(trainer):
    module, callback = TwoNetworks({3: math.nan}), GradientClipping(1.0)
    fit = trainer(callback)
    with pytest.warns(RuntimeWarning, match="optimizer SGD"):
        fit.fit(module, data())
    assert fit.callback_metrics["grad/skipped_steps-SGD"] == 1
    assert fit.callback_metrics["grad/skipped_steps-SGD-1"] == 0
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


def test_same_bits_as_a_hand_written_loop_in_manual_optimization(trainer):
    ours = TwoNetworks()
    theirs = TwoNetworks()
    theirs.load_state_dict(ours.state_dict())
    trainer(GradientClipping(1.0)).fit(ours, data())
    first, second = theirs.configure_optimizers()
    for batch in data():
        fake = theirs.generator(batch[0])
        first.zero_grad()
        theirs.discriminator(fake).mean().backward()
        nn.utils.clip_grad_norm_(theirs.generator.parameters(), 1.0)
        first.step()
        second.zero_grad()
        (-theirs.discriminator(fake.detach()).mean() * 100 + theirs.discriminator(batch[0]).mean() * 50).backward()
        nn.utils.clip_grad_norm_(theirs.discriminator.parameters(), 1.0)
        second.step()
    assert_same_bits(weights(ours), weights(theirs))


def test_lbfgs_clips_every_closure_call_and_counts_one_step(trainer):
    results = []
    calls = []
    for callbacks, options in (([GradientClipping(0.5)], {}), ([], {"gradient_clip_val": 0.5})):
        torch.manual_seed(0)
        module = Regression(torch.optim.LBFGS, lr=0.5, max_iter=4)
        module.register_full_backward_hook(lambda *_: calls.append(1))
        fit = trainer(*callbacks, **options)
        fit.fit(module, data(6))
        results.append(weights(module))
        if callbacks:
            assert callbacks[0].state_dict()["history"][0]["steps"] == 6
    assert_same_bits(*results)


def test_lbfgs_bad_closure_counts_once(trainer):
    torch.manual_seed(0)
    module, callback = Poisoned({2: math.nan}, optimizer=torch.optim.LBFGS, lr=0.5, max_iter=4), GradientClipping(0.5)
    with pytest.warns(RuntimeWarning, match="bad step 1 in a row"):
        trainer(callback).fit(module, data(6))
    assert callback.skipped_steps == 1
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


def test_parameters_added_in_mid_run_are_clipped(trainer):
    from lightning.pytorch.callbacks import BaseFinetuning

    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.05)

    class HeadFirst(Regression):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)

    callback = GradientClipping(rules=[ClipRule(0.5), ClipRule(1e-3, include=r"net\.0")])
    with pytest.warns(UserWarning, match="The rule with include=.* holds for no parameter that an optimizer holds now"):
        trainer(callback, Unfreeze(), max_epochs=2).fit(HeadFirst(), data())
    assert record_of(callback.last_report).parameter_norms.shape == (4,)
    assert len(record_of(callback.last_report).outcomes) == 2


def test_no_gradients_warns_once(trainer):
    class Detached(Regression):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.optimizers().step()

    callback = GradientClipping(1.0)
    with pytest.warns(UserWarning, match="No parameter has a gradient") as caught:
        trainer(callback).fit(Detached(), data(4))
    assert len([w for w in caught if "No parameter" in str(w.message)]) == 1
    assert callback.last_report.total_norm == 0
    assert callback.last_report.clip_coef == 1


def test_an_optimizer_replaced_in_mid_run_is_taken_up(trainer):
    class Replacing(Regression):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.trainer.optimizers = [torch.optim.SGD(self.parameters(), lr=0.01)]

    callback = GradientClipping(0.5)
    fit = trainer(callback, max_epochs=3)
    fit.fit(Replacing(), data(12))
    assert fit.global_step == 36
    assert callback.state_dict()["history"][0]["steps"] == 36


def test_a_foreign_optimizer_is_refused(trainer):
    class Foreign(Regression):
        def on_fit_start(self):
            from lightning.pytorch.core.optimizer import LightningOptimizer

            self.foreign = LightningOptimizer._to_lightning_optimizer(
                torch.optim.SGD(self.parameters(), lr=0.1), self.trainer.strategy
            )

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(self.loss(batch, batch_idx))
            self.foreign.step()

    with pytest.raises(RuntimeError, match=r"`optimizer` must be one of trainer\.optimizers, got a SGD that is not"):
        trainer(GradientClipping(0.5)).fit(Foreign(), data(2))


def test_a_parameter_replaced_in_mid_run_is_clipped_and_guarded(trainer):
    class Growing(Regression):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.net[2] = nn.Linear(8, 1)
                self.trainer.optimizers[0].param_groups[0]["params"][:] = list(self.parameters())

    module, callback = Growing(), GradientClipping(1e-3)
    trainer(callback, max_epochs=2).fit(module, data())
    true_norm = torch.stack([parameter.grad.norm() for parameter in module.parameters()]).norm()
    torch.testing.assert_close(true_norm, callback.last_report.clipped_norm)


def test_lbfgs_reports_where_each_step_begins(trainer):
    callback = GradientClipping(None)
    fit = trainer(callback)
    reported = []
    module = Regression(torch.optim.LBFGS, lr=0.5, max_iter=4)
    module.on_train_batch_end = lambda *_: reported.append(float(callback.last_report.total_norm))
    fit.fit(module, data(7))
    assert fit.callback_metrics["grad/total_norm_p50"] == pytest.approx(sorted(reported)[3])


def test_callbacks_let_go_of_the_run(trainer):
    import gc

    from clip_callbacks.engine.engine import StepEngine
    from clip_callbacks.trainer.optimizer_context import OptimizerContext

    callbacks = [GradientClipping(0.5), NonFiniteGuard(), AccumulationRescaling(), GradientNormMonitor()]
    trainer(*callbacks).fit(Regression(), data(4))
    gc.collect()  # the module itself Lightning holds on to: it hangs its own `log` on every callback
    assert [thing for thing in gc.get_objects() if type(thing) in {OptimizerContext, StepEngine}] == []


@pytest.mark.parametrize("size", [1e-7, 1.0])
def test_a_norm_of_zero_has_coefficient_one(size):
    from clip_callbacks import clip_step

    weight, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    for scope in ("global", "parameter"):
        weight.grad, other.grad = torch.zeros(2), torch.zeros(2)
        report, _ = clip_step([weight, other], rules=[ClipRule(size * 1e-3, scope)])
        assert (report.coefficients == 1).all()
        assert report.clip_coef == 1


def test_a_skipped_steps_report_names_the_bad_block():
    from clip_callbacks import clip_step

    weight, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    weight.grad, other.grad = torch.ones(2), torch.tensor([math.nan, 1.0])
    report, _ = clip_step({"good": weight, "bad": other}, rules=[ClipRule(1.0, "parameter")])
    assert report.names == ("good", "bad")
    assert report.norms.isnan().tolist() == [False, True]
