"""The findings of replays, from bundles that NonFiniteGuard wrote."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from clip_callbacks.bundles.bundle import BATCHES, FACTS
from clip_callbacks.cli import main
from tests.helpers.replaying import Net, config, fitted, replayed, samples, suspects

pytestmark = [
    pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Spike at:RuntimeWarning"),
]


def test_the_module_that_makes_infinities_of_zeros_is_named(trainer, tmp_path, capsys):
    inputs = samples()
    inputs[9, 3] = 0
    bundle = fitted(trainer, tmp_path, Net("log"), inputs)
    code, found = replayed(capsys, bundle, *config(tmp_path, Net, kind="log"))
    assert code == 0
    assert suspects(found) == {"output": "net.0"}
    assert "its output has 1 inf in 4x8 values, its inputs are finite, in [0, " in found["suspects"][0]["text"]
    (micro,) = found["micro_batches"]
    assert micro["same_loss"]
    assert found["conclusion"] == "Reproduced: a loss or gradient is non-finite again."


def test_text_shows_the_tree_and_names_the_suspect_above_it(trainer, tmp_path, capsys):
    inputs = samples()
    inputs[9, 3] = 0
    bundle = fitted(trainer, tmp_path, Net("log"), inputs)
    capsys.readouterr()
    assert main(["replay", str(bundle), *config(tmp_path, Net, kind="log")]) == 0
    text = capsys.readouterr().out
    assert "First non-finite output: net.0 (Log): its output has 1 inf in 4x8 values" in text
    assert "Weights: from the bundle" in text
    assert "    ├── net.0 (Log): [0, " in text
    assert "◀ first non-finite output" in text
    assert text.endswith("\nReproduced: a loss or gradient is non-finite again.\n")


def test_of_modules_within_each_other_the_innermost_is_named(trainer, tmp_path, capsys):
    inputs = samples()
    inputs[9] = -1e6  # softplus of what is far below zero is zero
    torch.manual_seed(3)
    bundle = fitted(trainer, tmp_path, Net("inner"), inputs)
    _, found = replayed(capsys, bundle, *config(tmp_path, Net, kind="inner"))
    assert suspects(found)["output"] == "net.1.1"


def test_a_derivative_that_is_infinite_is_found_in_the_backward_pass(trainer, tmp_path, capsys):
    torch.manual_seed(0)
    bundle = fitted(trainer, tmp_path, Net("root"), samples(4))
    code, found = replayed(capsys, bundle, *config(tmp_path, Net, kind="root"))
    assert code == 0
    assert suspects(found) == {"gradient": "net.2"}
    assert math.isfinite(found["micro_batches"][0]["loss"])


class Recurrent(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 8, batch_first=True)
        self.head = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        states, _ = self.lstm(batch[0][..., None])
        return self.head(states).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_an_lstm_that_is_given_nan_is_no_suspect_but_its_input_is_named(trainer, tmp_path, capsys):
    inputs = samples()
    inputs[9, 3] = math.nan
    bundle = fitted(trainer, tmp_path, Recurrent(), inputs)
    _, found = replayed(capsys, bundle, *config(tmp_path, Recurrent))
    assert suspects(found) == {}
    assert (
        "the inputs of lstm (LSTM) are already non-finite. Look at the batch, and at the code before this module"
        in found["findings"][0]
    )


class Transformer(LightningModule):
    """A transformer with a harmless mask of -inf, and with one layer whose weights overflow in float16."""

    def __init__(self, size: float = 1.0) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3)
        with torch.no_grad():
            self.encoder.layers[1].linear2.weight.mul_(size)

    def training_step(self, batch, batch_idx):
        mask = nn.Transformer.generate_square_subsequent_mask(batch[0].shape[1], device=self.device)
        return self.encoder(self.embed(batch[0][..., None]), mask=mask).float().square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.mark.filterwarnings("ignore:.*16-mixed.*", "ignore:.*scheduler.*")
def test_an_overflow_in_float16_is_named_under_a_mask_of_infinities_and_float32_cures_it(trainer, tmp_path, capsys):
    bundle = fitted(trainer, tmp_path, Transformer(size=3.5e5), samples(4), options={"precision": "16-true"})
    options = config(tmp_path, Transformer, size=3.5e5)
    code, found = replayed(capsys, bundle, *options)
    assert code == 0
    assert suspects(found)["output"] == "encoder.layers.1.linear2"
    code, found = replayed(capsys, bundle, *options, "--precision", "32-true")
    assert code == 1
    assert "With float32 the step does not fail (the run used 16-true)" in found["conclusion"]


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_precisions_are_tried_on_the_weights_of_the_run(trainer, tmp_path, capsys, precision):
    torch.manual_seed(0)
    bundle = fitted(trainer, tmp_path, Net("spike"), 100 * samples(4), skip_above=1e-3)
    code, found = replayed(capsys, bundle, *config(tmp_path, Net, kind="spike"), "--precision", precision)
    assert code == 0
    assert found["precision"] == precision
    is_overflow = any(micro["bad_gradients"] for micro in found["micro_batches"])
    assert is_overflow == (precision == "16-mixed"), "1e6 is no number of float16"


def test_a_precision_that_the_run_had_not_is_tried_without_a_loss_scale_that_overflows_by_itself(trainer, tmp_path, capsys):
    bundle = fitted(trainer, tmp_path, Net("plain"), samples(4), skip_above=1e-6)
    code, found = replayed(capsys, bundle, *config(tmp_path, Net, kind="plain"), "--precision", "16-mixed")
    assert code == 0
    recorded = float(torch.load(bundle / BATCHES, weights_only=True)[0]["loss"])
    assert found["micro_batches"][0]["loss"] == pytest.approx(recorded, rel=1e-2)  # float16 has three digits
    assert found["total_norm"] == pytest.approx(json.loads((bundle / FACTS).read_text())["report"]["total_norm"], rel=1e-2)
    assert found["notes"] == []


def test_under_a_grad_scaler_the_loss_scale_is_that_of_the_run(trainer, tmp_path, capsys):
    inputs = samples()
    inputs[13] = math.nan
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=512.0))
    bundle = fitted(trainer, tmp_path, Net("plain"), inputs, options={"plugins": [plugin]})
    code, found = replayed(capsys, bundle, *config(tmp_path, Net, kind="plain"))
    assert code == 0
    assert found["precision"] == "16-mixed"
    assert "gradients are shown as the backward pass has them: times the loss scale, 512" in found["notes"]
    assert found["micro_batches"][0]["same_loss"]


def test_a_spike_is_told_with_its_norm_and_what_explodes(trainer, tmp_path, capsys):
    torch.manual_seed(0)
    bundle = fitted(trainer, tmp_path, Net("spike"), samples(4), skip_above=10.0)
    code, found = replayed(capsys, bundle, *config(tmp_path, Net, kind="spike"))
    assert code == 0
    recorded = json.loads((bundle / FACTS).read_text())["report"]["total_norm"]
    assert found["total_norm"] == pytest.approx(recorded, rel=1e-6)  # sums in another order
    assert suspects(found) == {"output explodes": "net.1", "gradient explodes": "net.1"}
    assert any("limit 10)" in line for line in found["findings"])
    assert found["conclusion"] == "Reproduced: the norm of all gradients is above the limit again."
    assert suspects(replayed(capsys, bundle, *config(tmp_path, Net, kind="spike"), "--explodes", "1e5")[1]) == {}


def test_a_spike_of_the_loss_is_told_with_its_loss(trainer, tmp_path, capsys):
    """The norm has a threshold, too, which the step did not exceed."""
    torch.manual_seed(0)
    thresholds = {"skip_above": 1e12, "loss_above": 1e-3}
    bundle = fitted(trainer, tmp_path, Net("spike"), samples(8), options={"accumulate_grad_batches": 2}, **thresholds)
    code, found = replayed(capsys, bundle, *config(tmp_path, Net, kind="spike"))
    assert code == 0
    (exceeded,) = found["exceeded"]
    assert exceeded["quantity"] == "loss of the window"
    assert exceeded["limit"] == pytest.approx(1e-3)
    assert found["loss"] == pytest.approx(exceeded["value"], rel=1e-6)
    assert any(line.startswith("Loss of the window: ") and "limit 0.001)" in line for line in found["findings"])
    assert found["conclusion"] == "Reproduced: the loss of the window is above the limit again."


class LossAlone(Net):
    def training_step(self, batch, batch_idx):
        out = self.net(batch[0])
        return (out / (batch[0].sum() - batch[0].sum())).mean()


def test_if_no_module_is_a_suspect_it_is_the_loss_and_its_operations_are_named(trainer, tmp_path, capsys):
    bundle = fitted(trainer, tmp_path, LossAlone("plain"), samples(4))
    _, found = replayed(capsys, bundle, *config(tmp_path, LossAlone, kind="plain"))
    assert suspects(found) == {}
    assert "look at the loss function, and at training_step after the last module" in found["findings"][0]
    assert "MeanBackward0, DivBackward0" in found["findings"][0]


class RootLoss(Net):
    def training_step(self, batch, batch_idx):
        out = self.net(batch[0])
        return (out - out.detach()).square().sum().sqrt()  # the root of zero


def test_detect_anomaly_names_the_line_of_the_users_code(trainer, tmp_path, capsys):
    bundle = fitted(trainer, tmp_path, RootLoss("plain"), samples(4))
    code, found = replayed(capsys, bundle, *config(tmp_path, RootLoss, kind="plain"), "--detect-anomaly")
    assert code == 0
    assert (
        "look at code that uses the output of net (Sequential), between modules, in the loss function or in training_step"
        in found["findings"][0]
    )
    assert found["anomaly"]["file"] == __file__
    assert "the root of zero" in found["anomaly"]["code"]
    assert found["anomaly"]["line"] == next(
        number for number, line in enumerate(Path(__file__).read_text().splitlines(), 1) if line.endswith("# the root of zero")
    )


def test_an_anomaly_that_is_none_is_told_as_such(trainer, tmp_path, capsys):
    torch.manual_seed(0)
    bundle = fitted(trainer, tmp_path, Net("spike"), samples(4), skip_above=10.0)
    _, found = replayed(capsys, bundle, *config(tmp_path, Net, kind="spike"), "--detect-anomaly")
    assert found["anomaly"] is None
    assert any("no backward function returned NaN" in line for line in found["findings"])
