"""Frozen parameters that are no numbers to torch: quantized weights, packed codes, classes that leave functions out."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from clip_callbacks import ClipRule, GradientClipping, GradientNormMonitor, NonFiniteGuard, RatioLimit, Rollback
from clip_callbacks.core.nonfinite import has_arithmetic
from clip_callbacks.replay.module_recorder import _nonfinite_tensors
from tests.helpers.exotic import frozen_tensors
from tests.helpers.rollback import rollback
from tests.helpers.training import Poisoned, assert_same_bits, data, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.quantize_per_:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]
KINDS = (
    "uint8",
    "int8",
    "int32",
    "bool",
    "float8_e4m3fn",
    "float8_e5m2",
    "uint4",
    "qint8",
    "per channel",
    "packed float32",
    "packed bfloat16",
    "coded",
    "cloned",
    "opaque",
)


class Adapted(Poisoned):
    """A layer with a frozen base beside its weights; the optimizer holds it, or does not."""

    def __init__(self, kind, *, held, bad=()):
        torch.manual_seed(0)
        super().__init__(dict.fromkeys(bad, math.nan), optimizer=torch.optim.AdamW, lr=0.01)
        self.net[0].base = nn.Parameter(frozen_tensors()[kind], requires_grad=False)
        self.held = held

    def learning(self):
        return [parameter for parameter in self.net.parameters() if parameter.requires_grad]

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters() if self.held else self.learning(), lr=0.01)


def test_what_has_arithmetic():
    assert {kind for kind, tensor in frozen_tensors().items() if has_arithmetic(tensor)} == {"packed float32", "packed bfloat16"}
    numbers = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)
    assert all(has_arithmetic(torch.ones(2, dtype=dtype)) for dtype in numbers)
    assert all(map(has_arithmetic, (nn.Parameter(torch.ones(2)), torch.eye(2).to_sparse(), torch.ones(2).as_subclass(nn.Buffer))))
    assert not has_arithmetic(nn.UninitializedParameter())


@pytest.mark.parametrize("kind", KINDS)
def test_limits_and_metrics_are_those_of_the_parameters_that_learn(trainer, tmp_path, kind):
    seen, learned = [], []
    for held in (True, False):
        module, rules = Adapted(kind, held=held), [ClipRule(RatioLimit(0.01), "layer"), ClipRule(RatioLimit(0.1))]
        options = dict.fromkeys(
            ("log_update_ratio", "log_weight_norm", "log_statistics", "log_histograms", "log_contributions"), True
        )
        monitor = GradientNormMonitor(**options)
        fit = trainer(GradientClipping(rules=rules), monitor, logger=TensorBoardLogger(tmp_path))
        fit.fit(module, data(6))
        seen.append({key: float(value) for key, value in fit.callback_metrics.items()})
        learned.append([it.detach() for it in module.learning()])
    assert_same_bits(*learned)
    assert seen[0] == seen[1]
    assert "update_ratio/net.0" in seen[0]


@pytest.mark.parametrize("scope", ["global", "group", "parameter", "unit"])
@pytest.mark.parametrize("kind", ["uint8", "packed float32", "coded"])
def test_any_scope(trainer, kind, scope):
    learned = []
    for held in (True, False):
        module = Adapted(kind, held=held)
        trainer(GradientClipping(RatioLimit(0.01), scope=scope)).fit(module, data(6))
        learned.append([it.detach() for it in module.learning()])
    assert_same_bits(*learned)


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_batch_is_skipped_and_reported(trainer, kind, held):
    module = Adapted(kind, held=held, bad=[3])
    with pytest.warns(RuntimeWarning, match="Non-finite gradients") as said:
        trainer(guard := NonFiniteGuard()).fit(module, data(6))
    assert guard.skipped_steps == 1
    (report,) = [str(each.message) for each in said if "Non-finite gradients" in str(each.message)]
    assert "Stage: the loss is non-finite" in report
    assert "net.0.base" not in report
    assert all(bool(parameter.isfinite().all()) for parameter in module.learning())


@pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_the_run_goes_back(trainer, kind):
    module, clean = Adapted(kind, held=True, bad=[3, 4]), Adapted(kind, held=False)
    trainer(guard := rollback(max_consecutive=2, every_n_steps=2)).fit(module, data(7))
    assert guard.rollbacks == 1
    loader = list(data(7))
    trainer().fit(clean, torch.utils.data.DataLoader([*loader[:2], *loader[5:]], batch_size=None))
    assert_same_bits([it.detach() for it in module.learning()], [it.detach() for it in clean.learning()])


@pytest.mark.parametrize("kind", [*KINDS, "meta"])
def test_a_replay_takes_no_frozen_weights_for_numbers(kind):
    layer = nn.Linear(4, 2)
    layer.base = nn.Parameter(frozen_tensors()[kind], requires_grad=False)
    layer.register_buffer("codes", frozen_tensors()["float8_e5m2"])
    assert _nonfinite_tensors(layer) == ()
    layer.bias.data.fill_(math.nan)
    assert _nonfinite_tensors(layer) == ("bias",)


class TwoAdapted(Adapted):
    """Another optimizer holds the base: what it holds must be good before a copy is made."""

    automatic_optimization = False

    def __init__(self, kind):
        super().__init__(kind, held=True, bad=[3, 4])
        self.automatic_optimization = False
        self.head = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        for optimizer, net in zip(self.optimizers(), (self.net, self.head), strict=True):
            optimizer.zero_grad()
            factor = self.factors.get(batch_idx, 1.0)
            self.manual_backward(nn.functional.mse_loss(net(batch[0]), batch[1]) * factor)
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.AdamW(self.net.parameters(), lr=0.01), torch.optim.SGD(self.head.parameters(), lr=0.01)]


@pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning")
@pytest.mark.parametrize("kind", ["uint8", "packed float32", "opaque"])
def test_a_base_that_another_optimizer_holds_keeps_no_copy_from_being_made(trainer, kind):
    module = TwoAdapted(kind)
    trainer(guard := rollback(max_consecutive=2, every_n_steps=2)).fit(module, data(7))
    assert guard.rollbacks >= 1
    assert all(bool(it.isfinite().all()) for it in (*module.learning(), *weights(module.head)))


@pytest.mark.parametrize("callbacks", [[GradientClipping(1.0)], [NonFiniteGuard(rollback=Rollback(every_n_steps=1))]])
def test_tensors_made_in_inference_mode_have_no_version_to_ask_for(trainer, callbacks):
    """As frozen weights that were loaded there: torch raises where their version counter is read."""
    module = Poisoned({2: math.nan})
    with torch.inference_mode():
        module.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        module.register_buffer("table", torch.randn(3))
    with pytest.warns(RuntimeWarning, match="Non-finite gradients"):
        trainer(*callbacks).fit(module, data(5))
    assert callbacks[0].skipped_steps == 1
