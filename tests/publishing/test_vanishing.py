"""Blocks that do not learn: which are named, when, and what that costs."""

from __future__ import annotations

import re
import warnings

import pandas as pd
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from clip_callbacks import GradientNormMonitor, NonFiniteGuard
from clip_callbacks.core.tensor_table import TensorTable
from clip_callbacks.stats import vanishing
from clip_callbacks.stats.weight_sample import WeightSample
from tests.helpers.operations import SYNCS, Transfers
from tests.helpers.training import Regression, TwoNetworks, data
from tests.helpers.vanishing import STEPS, WARNING, dead_relu, fit, two_layers, vanished

pytestmark = pytest.mark.usefixtures("short_spans")


# Blocks that vanish


def saturated():
    net = two_layers(nn.Hardtanh())
    nn.init.constant_(net[0].bias, 1e4)
    return Regression(net=net, lr=1e-3), {"net.0": 1.0}


class ZeroLossWeight(Regression):
    def __init__(self):
        super().__init__(lr=1e-3)
        self.head = nn.Linear(4, 3)

    def loss(self, batch, batch_idx):
        return super().loss(batch, batch_idx) + 0.0 * self.head(batch[0]).square().mean()


def zero_loss_weight():
    return ZeroLossWeight(), {"head": 1.0}


class Masked(ZeroLossWeight):
    def loss(self, batch, batch_idx):
        masked = torch.zeros(len(batch[0]), 1, dtype=torch.bool)
        return Regression.loss(self, batch, batch_idx) + torch.where(masked, self.head(batch[0]), 1.0).mean()


def masked_loss():
    return Masked(), {"head": 1.0}


class Complex(Regression):
    def __init__(self):
        super().__init__(lr=1e-3)
        self.phase = nn.Embedding(1, 3, dtype=torch.complex64)

    def loss(self, batch, batch_idx):
        return super().loss(batch, batch_idx) + 0.0 * self.phase.weight.abs().sum()


def complex_weights():
    return Complex(), {"phase": 1.0}


ZERO = [dead_relu, saturated, zero_loss_weight, masked_loss, complex_weights]


@pytest.mark.parametrize("make", ZERO)
def test_blocks_whose_gradients_are_exactly_zero_are_named_once(trainer, make):
    module, expected = make()
    made, texts = fit(trainer, module, max_epochs=2)
    assert vanished(made) == pytest.approx(expected)
    (text,) = texts
    assert text.startswith("GradientNormMonitor: ")
    assert f"as the {STEPS} optimizer steps up to step {STEPS} show" in text
    listed = re.findall(r"^  (\S+): the gradient of .* was exactly 0", text, re.MULTILINE)
    assert listed == list(expected)
    assert "ReLU" in text
    assert text.count("\n") < 20


SMALL = {
    "sgd in bfloat16": ("bf16-true", {"optimizer": torch.optim.SGD, "lr": 1e-8}),
    "adamw in bfloat16": ("bf16-true", {"optimizer": torch.optim.AdamW, "lr": 1e-6}),
    "fused in bfloat16": ("bf16-true", {"optimizer": torch.optim.AdamW, "lr": torch.tensor(1e-6), "fused": True}),
    "sgd in float32": ("32-true", {"optimizer": torch.optim.SGD, "lr": 1e-15}),
}


@pytest.mark.parametrize(("precision", "options"), SMALL.values(), ids=SMALL)
def test_blocks_that_updates_do_not_change_are_named_with_dtype_and_learning_rate(trainer, precision, options):
    module = Regression(**options)
    made, (text,) = fit(trainer, module, precision=precision)
    dtype = "bfloat16" if precision == "bf16-true" else "float32"
    assert set(vanished(made)) == {"net.0", "net.2"}
    assert f"net.0: the updates left 100% of the {dtype} weights unchanged, the learning rate is {float(options['lr']):.2g}" in text
    lost = {"bfloat16": 2**-9, "float32": 2**-25}[dtype]
    assert f"In {dtype}, updates smaller than {lost:.1g} of a weight are rounded away." in text
    assert "exactly 0" not in text


@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_learning_rate_is_that_of_the_steps(trainer, as_tensor):
    class Decayed(Regression):
        def configure_optimizers(self):
            rate = torch.tensor(1e-15) if as_tensor else 1e-15
            optimizer = torch.optim.Adam(self.parameters(), lr=rate, fused=as_tensor)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < STEPS - 1))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    _, (text,) = fit(trainer, Decayed())
    assert "the learning rate is 1e-15" in text


class Quantized(nn.Module):
    """A layer with a frozen weight, larger than the parameters that train."""

    def __init__(self, dtype):
        super().__init__()
        self.codes = nn.Parameter(torch.ones(64, 64).to(dtype), requires_grad=False)
        self.scale = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, inputs):
        return inputs * self.scale


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_a_frozen_weight_does_not_describe_its_block(trainer, dtype, scope):
    module = Regression(net=nn.Sequential(Quantized(dtype), nn.Linear(4, 1)), optimizer=torch.optim.SGD, lr=1e-15)
    made, (text,) = fit(trainer, module, scope=scope)
    assert vanished(made)
    assert "the updates left 100% of the float32 weights unchanged, the learning rate is 1e-15" in text
    assert str(dtype).removeprefix("torch.") not in text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_smaller_update_than_the_message_says_changes_a_weight(dtype):
    weights = torch.rand(10_000).to(dtype).double() + 0.01
    weights = weights.to(dtype)
    lost = torch.finfo(dtype).eps / 4
    for share, is_changed in ((0.99 * lost, False), (2.02 * lost, True)):
        moved = (weights.double() * (1 + share)).to(dtype)
        assert torch.equal(moved != weights, torch.full_like(weights, is_changed, dtype=torch.bool))


class Witness(torch.optim.AdamW):
    """Records gradients and weights of all steps, from which a slow reference computes the share."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.has_gradient, self.changed, self.first = {}, {}, {}

    def step(self, closure=None):
        loss = closure()
        for parameter in self.param_groups[0]["params"]:
            self.first.setdefault(parameter, parameter.detach().clone())
            seen = self.has_gradient.setdefault(parameter, torch.zeros_like(parameter, dtype=torch.bool))
            self.changed.setdefault(parameter, torch.zeros_like(parameter, dtype=torch.bool))
            seen |= parameter.grad != 0
        super().step()
        for parameter in self.param_groups[0]["params"]:
            self.changed[parameter] |= parameter != self.first[parameter]
        return loss


@pytest.mark.parametrize("scope", ["layer", "parameter", "global"])
@pytest.mark.parametrize("lr", [2e-5, 1e-4])
def test_shares_are_those_of_all_entries(trainer, monkeypatch, scope, lr):
    monkeypatch.setattr(vanishing, "MIN_STEPS_BETWEEN_CHECKS", 1)
    module = Regression(optimizer=Witness, lr=lr, net=nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)))
    made, _ = fit(trainer, module, scope=scope, precision="bf16-true", log_every_n_steps=1)
    optimizer = made.optimizers[0]
    blocks = {}
    for name, parameter in module.named_parameters():
        block = {"layer": name.rpartition(".")[0], "parameter": name, "global": "global"}[scope]
        blocks.setdefault(block, []).append(parameter)
    expected = {}
    for block, parameters in blocks.items():
        stalled = sum(float((optimizer.has_gradient[p] & ~optimizer.changed[p]).sum()) for p in parameters)
        expected[block] = stalled / sum(float(optimizer.has_gradient[p].sum()) for p in parameters)
    assert vanished(made) == pytest.approx({block: share for block, share in expected.items() if share > 0.5})


# When blocks are judged


@pytest.mark.parametrize("deferred", [False, True])
def test_steps_decided_on_the_device(trainer, deferred):
    module, expected = dead_relu()
    module.make_optimizer, module.options = torch.optim.AdamW, {"lr": 1e-3, "fused": True}
    made, texts = fit(trainer, module, NonFiniteGuard(deferred=deferred))
    assert len(texts) == 1
    assert vanished(made) == pytest.approx(expected)


def test_short_epochs_are_judged_together(trainer):
    module, expected = dead_relu()
    made, texts = fit(trainer, module, batches=STEPS // 2 + 1, max_epochs=2)
    assert len(texts) == 1
    assert vanished(made) == pytest.approx(expected)


def test_a_long_epoch_is_judged_before_its_end(trainer, monkeypatch):
    monkeypatch.setattr(vanishing, "MAX_STEPS", 30)
    made, (text,) = fit(trainer, dead_relu()[0], batches=70, log_every_n_steps=4)
    assert "as the 32 optimizer steps up to step 32 show" in text
    assert vanished(made), "the last span of the epoch is too short, and the one before it counts"


def test_the_worst_span_of_a_long_epoch_is_logged(trainer, monkeypatch):
    class Waking(ZeroLossWeight):
        def loss(self, batch, batch_idx):
            return Regression.loss(self, batch, batch_idx) + (batch_idx >= 40) * self.head(batch[0]).square().mean()

    monkeypatch.setattr(vanishing, "MAX_STEPS", 30)
    made, (text,) = fit(trainer, Waking(), batches=100)
    assert "up to step 32 show" in text
    assert vanished(made) == {"head": 1.0}, "the head learned in the two spans that followed"


def test_without_logging_steps_nothing_is_judged(trainer):
    made, texts = fit(trainer, dead_relu()[0], log_every_n_steps=STEPS)
    assert not texts
    assert not vanished(made)


def test_a_block_that_learns_again_is_not_in_the_metrics(trainer, tmp_path):
    class Warming(ZeroLossWeight):
        def loss(self, batch, batch_idx):
            return Regression.loss(self, batch, batch_idx) + self.current_epoch * self.head(batch[0]).square().mean()

    csv = CSVLogger(tmp_path)
    _, texts = fit(trainer, Warming(), max_epochs=3, logger=csv)
    assert len(texts) == 1
    frame = pd.read_csv(f"{csv.log_dir}/metrics.csv").set_index("step")
    assert frame["grad_vanished/head"].dropna().to_dict() == {STEPS - 1: 1.0}


def test_a_resumed_run_does_not_name_a_block_again(trainer, tmp_path):
    first, texts = fit(trainer, dead_relu()[0])
    assert len(texts) == 1
    first.save_checkpoint(tmp_path / "first.ckpt")
    again, texts = fit(trainer, dead_relu()[0], max_epochs=2, ckpt_path=tmp_path / "first.ckpt")
    assert again.global_step == 2 * STEPS
    assert not texts
    assert set(vanished(again)) == {"net.0", "net.2"}


def test_several_optimizers(trainer):
    class Half(TwoNetworks):
        def training_step(self, batch, batch_idx):
            for optimizer, loss in zip(
                self.optimizers(), (0.0 * self.generator(batch[0]).sum(), self.discriminator(batch[0]).square().mean()), strict=True
            ):
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

    made, (text,) = fit(trainer, Half())
    assert text.startswith("GradientNormMonitor-SGD: 1 block does not learn")
    assert vanished(made) == {"generator-SGD": 1.0}


def test_an_optimizer_that_steps_in_no_batch_that_is_logged(trainer):
    class Seldom(TwoNetworks):
        def training_step(self, batch, batch_idx):
            if batch_idx % 5 == 0:
                first, _ = self.optimizers()
                first.zero_grad()
                self.manual_backward(0.0 * self.generator(batch[0]).sum())
                first.step()

    _, (text,) = fit(trainer, Seldom(), batches=5 * STEPS, log_every_n_steps=10)
    assert "generator: the gradient of all entries was exactly 0" in text


def test_parameters_that_join_later_begin_a_span(trainer):
    class Joining(ZeroLossWeight):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=1e-3)

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.trainer.optimizers[0].add_param_group({"params": list(self.head.parameters())})

    made, (text,) = fit(trainer, Joining(), max_epochs=2)
    assert f"up to step {2 * STEPS} show" in text
    assert vanished(made) == {"head": 1.0}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"scope": "parameter"}, {"head.weight": 1.0, "head.bias": 1.0}),
        ({"scope": "global"}, {}),
        ({"scope": "group", "include": "head"}, {"pg1": 1.0}),
        ({"scope": "layer", "exclude": "head"}, {}),
        ({"scope": "parameter", "top_k": 1}, {"head.weight": 1.0}),
    ],
)
def test_blocks_are_those_of_the_options(trainer, options, expected):
    made = trainer(GradientNormMonitor(**options), log_every_n_steps=4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f"(?s).*{WARNING}")
        made.fit(ZeroLossWeight(), data(STEPS))
    assert vanished(made) == expected


def test_a_warning_has_at_most_some_twenty_lines(trainer):
    module = Regression(net=nn.Sequential(*[nn.Linear(4, 4) for _ in range(40)], nn.Linear(4, 1)))
    module.loss = lambda batch, _: 0.0 * module.net(batch[0]).sum()
    _, (text,) = fit(trainer, module)
    assert text.startswith("GradientNormMonitor: 41 blocks do not learn")
    assert "and 29 more" in text
    assert text.count("\n") < 20


# Cost


def test_a_check_reads_nothing_on_the_host():
    parameters = [nn.Parameter(torch.zeros(10, dtype=torch.bfloat16)) for _ in range(5)]
    table = TensorTable.of_tensors(parameters)
    gradients = {place: torch.ones(10) for place in range(4)}
    with Transfers() as transfers:
        sample = WeightSample(table, range(5))
        for _ in range(2):
            sample.note_gradients(gradients, [torch.ones(()), 0.1, 0.0, None, 0.1])
            sample.confirm()
            assert sample.compare()
    assert not transfers.waits
    assert not SYNCS & set(transfers.counts)
    with Transfers() as transfers:
        counts = sample.counts()
    assert transfers.counts, "the end of a span reads"
    assert [each.tolist() for each in counts] == [[10, 10, 0, 10, 0]] * 2


@pytest.mark.parametrize("shape", [(), (1,), (7, 1030), (3, 5, 512, 2), (2048, 2048), (1_000_003,)])
def test_a_sample_is_small_and_meets_all_columns(shape):
    parameter = nn.Parameter(torch.zeros(1).expand(shape) if len(shape) > 1 else torch.zeros(shape))
    part = WeightSample(TensorTable.of_tensors([parameter]), [0])._parts[0]
    assert part.sizes[0] <= 1.1 * 256
    entries = torch.arange(parameter.numel()).reshape(shape)
    sampled = entries.reshape(-1)[:: part._strides[0]]
    assert len(sampled) == part.sizes[0]
    columns = shape[-1] if shape else 1
    assert len(set((sampled % columns).tolist())) == min(columns, len(sampled))


def test_weights_of_quantized_and_other_types_are_left_alone():
    class Codes(nn.Parameter):
        """A subclass with arithmetic of its own."""

    parameters = [
        nn.Parameter(torch.zeros(4, dtype=torch.complex64)),
        nn.Parameter(torch.zeros(4).to(torch.float8_e4m3fn)),
        Codes(torch.zeros(4)),
    ]
    sample = WeightSample(TensorTable.of_tensors(parameters), range(3))
    assert not sample._parts
    sample.note_gradients({}, [0.1] * 3)
    sample.confirm()
    assert sample.compare(), "a check all the same: other ranks may have entries"
