"""Bad steps, run again from the bundles that NonFiniteGuard has written of them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from clip_callbacks import NonFiniteGuard
from clip_callbacks.bundle import BATCHES, FACTS, WEIGHTS
from clip_callbacks.cli import main
from clip_callbacks.replay.bisection import bisect
from clip_callbacks.replay.culprits import Culprit, find_culprits
from clip_callbacks.replay.ranges import Range
from clip_callbacks.replay.samples import batch_size, chosen
from clip_callbacks.replay.starting_weights import check_fit
from clip_callbacks.replay.tree import SMALL, make_tree, plain_text, rich_tree
from clip_callbacks.replay.unusable import UnusableReplayError
from clip_callbacks.replay.watch import Call

pytestmark = [
    pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Spike at:RuntimeWarning"),
]

WIDTH = 8


class Log(nn.Module):
    def forward(self, x):
        return x.log()


class Exp(nn.Module):
    def forward(self, x):
        return x.exp()


class Root(nn.Module):
    """Finite at 0, its derivative is not."""

    def forward(self, x):
        return x.sqrt()


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


class Net(LightningModule):
    """Its layers are what each test is about; the loss is the mean square of what comes out of them."""

    def __init__(self, kind: str = "log") -> None:
        super().__init__()
        layers = {
            "log": lambda: [Log(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1)],
            "inner": lambda: [nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Softplus(), Log()), nn.Linear(WIDTH, 1)],
            "root": lambda: [nn.Linear(WIDTH, WIDTH), Scale(0.0), Root(), nn.Linear(WIDTH, 1)],
            "spike": lambda: [nn.Linear(WIDTH, WIDTH), Scale(1e4), nn.Linear(WIDTH, 1)],
            "plain": lambda: [nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)],
            "norm": lambda: [nn.BatchNorm1d(WIDTH), Scale(40.0), Exp(), nn.Linear(WIDTH, 1)],
        }
        self.net = nn.Sequential(*layers[kind]())

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def samples(count=16, width=WIDTH):
    return torch.rand(count, width, generator=torch.Generator().manual_seed(1)) + 0.5


def fitted(trainer, tmp_path, module, inputs, batch_size=4, *, weights="full", options=None, callbacks=(), **guard):
    """The bundle of the only bad step of a fit."""
    fit = trainer(*callbacks, NonFiniteGuard(bundle_dir=tmp_path / "bad", weights=weights, **guard), **(options or {}))
    fit.fit(module, DataLoader(TensorDataset(inputs), batch_size=batch_size))
    (bundle,) = (tmp_path / "bad").iterdir()
    return bundle


def config(tmp_path, name, **arguments):
    path = tmp_path / "cfg.yaml"
    path.write_text(
        yaml.safe_dump({"seed_everything": 0, "model": {"class_path": f"tests.test_replay.{name}", "init_args": arguments}})
    )
    return ["--config", str(path)]


def replayed(capsys, bundle, *arguments):
    """The exit code, and what is found."""
    capsys.readouterr()
    code = main(["replay", str(bundle), *map(str, arguments), "--json"])
    said = capsys.readouterr()
    assert code != 2, said.err
    return code, json.loads(said.out)


def refused(capsys, bundle, *arguments):
    """The one line on stderr."""
    capsys.readouterr()
    assert main(["replay", str(bundle), *map(str, arguments)]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def guilt(found):
    return {culprit["guilt"]: culprit["name"] for culprit in found["culprits"]}


# ---- what is found -------------------------------------------------------------------------------------------------------------


def test_the_module_that_makes_infinities_of_zeros_is_named(trainer, tmp_path, capsys):
    inputs = samples()
    inputs[9, 3] = 0
    bundle = fitted(trainer, tmp_path, Net("log"), inputs)
    code, found = replayed(capsys, bundle, *config(tmp_path, "Net", kind="log"))
    assert code == 0
    assert guilt(found) == {"output": "net.0"}
    assert "output 1 inf of 4x8, inputs finite in [0, " in found["culprits"][0]["text"]
    (micro,) = found["micro_batches"]
    assert micro["same_loss"]
    assert found["verdict"] == "Reproduced."


def test_text_shows_the_tree_and_names_the_guilty_above_it(trainer, tmp_path, capsys):
    inputs = samples()
    inputs[9, 3] = 0
    bundle = fitted(trainer, tmp_path, Net("log"), inputs)
    capsys.readouterr()
    assert main(["replay", str(bundle), *config(tmp_path, "Net", kind="log")]) == 0
    text = capsys.readouterr().out
    assert "First non-finite output: net.0 (Log): output 1 inf of 4x8" in text
    assert "Weights: those of the bundle" in text
    assert "    ├── net.0 (Log): [0, " in text
    assert "◀ first non-finite output" in text
    assert text.endswith("Reproduced.\n")


def test_of_modules_within_each_other_the_innermost_is_named(trainer, tmp_path, capsys):
    inputs = samples()
    inputs[9] = -1e6  # softplus of what is far below zero is zero
    torch.manual_seed(3)
    bundle = fitted(trainer, tmp_path, Net("inner"), inputs)
    _, found = replayed(capsys, bundle, *config(tmp_path, "Net", kind="inner"))
    assert guilt(found)["output"] == "net.1.1"


def test_a_derivative_that_is_infinite_is_found_in_the_backward_pass(trainer, tmp_path, capsys):
    torch.manual_seed(0)
    bundle = fitted(trainer, tmp_path, Net("root"), samples(4))
    code, found = replayed(capsys, bundle, *config(tmp_path, "Net", kind="root"))
    assert code == 0
    assert guilt(found) == {"gradient": "net.2"}
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


def test_an_lstm_that_is_given_nan_is_not_blamed_but_its_input(trainer, tmp_path, capsys):
    inputs = samples()
    inputs[9, 3] = math.nan
    bundle = fitted(trainer, tmp_path, Recurrent(), inputs)
    _, found = replayed(capsys, bundle, *config(tmp_path, "Recurrent"))
    assert guilt(found) == {}
    assert "what goes into lstm (LSTM) is not finite already: the batch, or the code before it" in found["findings"][0]


class Transformer(LightningModule):
    """With a mask of -inf, as float: it goes in, and is no fault; one layer's weights overflow in float16."""

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
    options = config(tmp_path, "Transformer", size=3.5e5)
    code, found = replayed(capsys, bundle, *options)
    assert code == 0
    assert guilt(found)["output"] == "encoder.layers.1.linear2"
    code, found = replayed(capsys, bundle, *options, "--precision", "32-true")
    assert code == 1
    assert "float32 cures it (it was 16-true)" in found["verdict"].lower()


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_precisions_are_tried_on_the_weights_of_the_run(trainer, tmp_path, capsys, precision):
    torch.manual_seed(0)
    bundle = fitted(trainer, tmp_path, Net("spike"), 100 * samples(4), skip_above=1e-3)
    code, found = replayed(capsys, bundle, *config(tmp_path, "Net", kind="spike"), "--precision", precision)
    assert code == 0
    assert found["precision"] == precision
    is_overflow = any(micro["bad_gradients"] for micro in found["micro_batches"])
    assert is_overflow == (precision == "16-mixed"), "1e6 is no number of float16"


def test_a_precision_that_the_run_had_not_is_tried_without_a_loss_scale_that_overflows_by_itself(trainer, tmp_path, capsys):
    bundle = fitted(trainer, tmp_path, Net("plain"), samples(4), skip_above=1e-6)
    code, found = replayed(capsys, bundle, *config(tmp_path, "Net", kind="plain"), "--precision", "16-mixed")
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
    code, found = replayed(capsys, bundle, *config(tmp_path, "Net", kind="plain"))
    assert code == 0
    assert found["precision"] == "16-mixed"
    assert "gradients are shown as they flow: times the loss scale, 512" in found["notes"]
    assert found["micro_batches"][0]["same_loss"]


def test_a_spike_is_told_with_its_norm_and_what_explodes(trainer, tmp_path, capsys):
    torch.manual_seed(0)
    bundle = fitted(trainer, tmp_path, Net("spike"), samples(4), skip_above=10.0)
    code, found = replayed(capsys, bundle, *config(tmp_path, "Net", kind="spike"))
    assert code == 0
    recorded = json.loads((bundle / FACTS).read_text())["report"]["total_norm"]
    assert found["total_norm"] == pytest.approx(recorded, rel=1e-6)  # sums in another order
    assert guilt(found) == {"output explodes": "net.1", "gradient explodes": "net.1"}
    assert any("limit 10)" in line for line in found["findings"])
    assert guilt(replayed(capsys, bundle, *config(tmp_path, "Net", kind="spike"), "--explodes", "1e5")[1]) == {}


class LossAlone(Net):
    def training_step(self, batch, batch_idx):
        out = self.net(batch[0])
        return (out / (batch[0].sum() - batch[0].sum())).mean()


def test_if_no_module_is_guilty_it_is_the_loss_and_its_operations_are_named(trainer, tmp_path, capsys):
    bundle = fitted(trainer, tmp_path, LossAlone("plain"), samples(4))
    _, found = replayed(capsys, bundle, *config(tmp_path, "LossAlone", kind="plain"))
    assert guilt(found) == {}
    assert "the loss function or training_step, after the last module" in found["findings"][0]
    assert "MeanBackward0, DivBackward0" in found["findings"][0]


class RootLoss(Net):
    def training_step(self, batch, batch_idx):
        out = self.net(batch[0])
        return (out - out.detach()).square().sum().sqrt()  # the root of zero


def test_detect_anomaly_names_the_line_of_the_users_code(trainer, tmp_path, capsys):
    bundle = fitted(trainer, tmp_path, RootLoss("plain"), samples(4))
    code, found = replayed(capsys, bundle, *config(tmp_path, "RootLoss", kind="plain"), "--detect-anomaly")
    assert code == 0
    assert (
        "in code that takes what comes out of net (Sequential): between modules, the loss function or training_step"
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
    _, found = replayed(capsys, bundle, *config(tmp_path, "Net", kind="spike"), "--detect-anomaly")
    assert found["anomaly"] is None
    assert any("no backward function returned NaN" in line for line in found["findings"])


class Dice(LightningModule):
    """Fails if the dropout mask, Python's, NumPy's or its own dice say so."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, 1))
        self.dice = torch.Generator().manual_seed(0)

    def training_step(self, batch, batch_idx):
        draws = torch.rand((), generator=self.dice) + random.random()
        loss = self.net(batch[0]).square().mean() + draws
        return loss / (draws > 1.5).logical_not()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_random_numbers_are_those_of_the_run_bit_for_bit(trainer, tmp_path, capsys):
    bundle = fitted(trainer, tmp_path, Dice(), samples(40), 2, options={"accumulate_grad_batches": 20})
    torch.manual_seed(99)
    random.seed(99)
    code, found = replayed(capsys, bundle, *config(tmp_path, "Dice"))
    assert code == 0
    assert len(found["micro_batches"]) == 20
    assert all(micro["same_loss"] for micro in found["micro_batches"])
    assert len({micro["loss"] for micro in found["micro_batches"]}) > 10, "or equal losses would say nothing"


def test_of_a_window_the_bad_micro_batch_is_shown(trainer, tmp_path, capsys):
    inputs = samples(32)
    inputs[18, 2] = 0
    bundle = fitted(trainer, tmp_path, Net("log"), inputs, 2, options={"accumulate_grad_batches": 4})
    code, found = replayed(capsys, bundle, *config(tmp_path, "Net", kind="log"), "--bisect")
    assert code == 0
    assert [micro["batch"] for micro in found["micro_batches"]] == [8, 9, 10, 11]
    assert [micro["loss"] == "inf" or micro["loss"] == "nan" for micro in found["micro_batches"]] == [False, True, False, False]
    assert all(micro["same_loss"] for micro in found["micro_batches"])
    assert found["bisection"]["samples"] == [0]


def test_a_dropped_micro_batch_is_replayed_alone(trainer, tmp_path, capsys):
    inputs = samples(32)
    inputs[18, 2] = 0
    bundle = fitted(trainer, tmp_path, Net("log"), inputs, 2, options={"accumulate_grad_batches": 4}, level="microbatch")
    code, found = replayed(capsys, bundle, *config(tmp_path, "Net", kind="log"))
    assert code == 0
    assert [micro["batch"] for micro in found["micro_batches"]] == [9]
    assert found["micro_batches"][0]["same_loss"]


class Gan(LightningModule):
    """Two optimizers, by hand; the generator's loss is at fault once the other has stepped three times, as its state tells."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.discriminator = nn.Linear(WIDTH, 1)

    def training_step(self, batch, batch_idx):
        discriminator, generator = self.optimizers()
        made = self.generator(batch[0])
        loss = (self.discriminator(made.detach()) - self.discriminator(batch[0])).mean()
        self.one_step(discriminator, loss)
        steps = next(iter(discriminator.optimizer.state.values()))["step"]
        self.one_step(generator, -self.discriminator(made).mean() * (math.nan if steps >= 3 else 1))

    def one_step(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(net.parameters(), lr=1e-2) for net in (self.discriminator, self.generator)]


def test_in_manual_optimization_the_earlier_optimizer_steps_and_the_bad_one_is_stopped(trainer, tmp_path, capsys):
    torch.manual_seed(0)
    bundle = fitted(trainer, tmp_path, Gan(), samples(12))
    assert json.loads((bundle / FACTS).read_text())["optimizer"] == 1
    code, found = replayed(capsys, bundle, *config(tmp_path, "Gan"))
    assert code == 0
    assert found["micro_batches"][0]["batch"] == 2
    assert set(found["gradients"]) == {"generator.0.weight", "generator.0.bias"}
    numbers = [call["call"] for call in found["calls"] if call["name"] == "discriminator"]
    assert numbers == [1, 2, 3]


class ByHand(Net):
    """Steps at every third batch, the first included: a window may begin anywhere."""

    def __init__(self) -> None:
        super().__init__("log")
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.net(batch[0]).square().mean())
        if batch_idx % 3 == 0:
            self.optimizers().step()
            self.optimizers().zero_grad()


def test_all_micro_batches_of_a_window_by_hand_are_run(trainer, tmp_path, capsys):
    inputs = samples(16)
    inputs[13, 3] = 0
    bundle = fitted(trainer, tmp_path, ByHand(), inputs)
    code, found = replayed(capsys, bundle, *config(tmp_path, "ByHand"))
    assert code == 0
    assert [(micro["batch"], micro["loss"] == "inf") for micro in found["micro_batches"]] == [(1, False), (2, False), (3, True)]


class Seeing(Net):
    """Fails where it sees that it is at a certain step of a certain epoch."""

    def training_step(self, batch, batch_idx):
        is_there = (self.trainer.global_step, self.current_epoch, batch_idx) == (6, 1, 2)
        assert self.training
        return super().training_step(batch, batch_idx) * (math.nan if is_there else 1)


def test_step_epoch_and_batch_are_those_of_the_run(trainer, tmp_path, capsys):
    bundle = fitted(trainer, tmp_path, Seeing("plain"), samples(16), options={"max_epochs": 2})
    code, found = replayed(capsys, bundle, *config(tmp_path, "Seeing", kind="plain"))
    assert code == 0
    assert found["bundle"]["place"] == "step 6, epoch 1, batch 2, rank 0"


class Prepared(Net):
    """Its hooks change a batch, which a second time would be once too often."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] - 0.25]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] - 0.25]


def test_hooks_that_prepare_a_batch_do_not_do_so_again(trainer, tmp_path, capsys):
    inputs = samples()
    inputs[9, 3] = 0.5
    bundle = fitted(trainer, tmp_path, Prepared("log"), inputs)
    code, found = replayed(capsys, bundle, *config(tmp_path, "Prepared", kind="log"), "--bisect")
    assert code == 0
    assert found["micro_batches"][0]["same_loss"]
    assert found["bisection"]["samples"] == [1]


class Shared(Net):
    """What comes out of one layer goes into another, and, beside it, into the root of zero."""

    def __init__(self) -> None:
        super().__init__("plain")
        self.first, self.relu, self.innocent = nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, 1)

    def training_step(self, batch, batch_idx):
        hidden = self.relu(self.first(batch[0]))
        return self.innocent(hidden).mean() + (hidden - hidden.detach()).sqrt().sum()


def test_a_module_is_not_blamed_for_what_flows_back_from_another_use_of_its_input(trainer, tmp_path, capsys):
    bundle = fitted(trainer, tmp_path, Shared(), samples(4))
    _, found = replayed(capsys, bundle, *config(tmp_path, "Shared"))
    assert guilt(found) == {}
    assert "in code that takes what comes out of relu (ReLU)" in found["findings"][0]
    innocent = next(call for call in found["calls"] if call["name"] == "innocent")
    assert innocent["gradient_in"]["nan"] == innocent["gradient_in"]["inf"] == 0


class Twice(Net):
    """One layer is called twice; only what comes out of its second call goes into the root of zero."""

    def training_step(self, batch, batch_idx):
        layer = self.net[0]
        first, second = layer(batch[0]), layer(batch[0])
        return first.square().mean() + (second - second.detach()).sqrt().sum()


def test_of_two_calls_of_a_module_the_innocent_one_is_not_blamed(trainer, tmp_path, capsys):
    bundle = fitted(trainer, tmp_path, Twice("plain"), samples(4))
    _, found = replayed(capsys, bundle, *config(tmp_path, "Twice", kind="plain"))
    assert guilt(found) == {}
    assert "in code that takes what comes out of net.0 (Linear, call 2)" in found["findings"][0]


class Penalized(Net):
    """The norm of a bias that begins with zeros, by hand."""

    def training_step(self, batch, batch_idx):
        nn.init.zeros_(self.net[0].bias)
        return self.net(batch[0]).square().mean() + self.net[0].bias.square().sum().sqrt()


def test_a_module_is_not_blamed_for_a_penalty_on_its_parameters(trainer, tmp_path, capsys):
    bundle = fitted(trainer, tmp_path, Penalized("plain"), samples(4))
    _, found = replayed(capsys, bundle, *config(tmp_path, "Penalized", kind="plain"))
    assert guilt(found) == {}
    assert "or that takes parameters itself, as a penalty on weights does" in found["findings"][0]
    assert "SqrtBackward0" in found["findings"][0]


class Weighted(nn.Module):
    """The root of a parameter that is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x + self.weight.square().sqrt()


class OwnParameter(Net):
    def __init__(self) -> None:
        super().__init__("plain")
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), Weighted(), nn.Linear(WIDTH, 1))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_module_that_breaks_only_the_gradient_of_its_own_parameter_is_named(trainer, tmp_path, capsys, precision):
    bundle = fitted(trainer, tmp_path, OwnParameter(), samples(4), options={"precision": precision})
    _, found = replayed(capsys, bundle, *config(tmp_path, "OwnParameter"))
    assert guilt(found) == {"gradient": "net.1"}
    assert "gradients of its own parameters non-finite" in found["culprits"][0]["text"]


class Between(Net):
    """The exponential between modules is infinite, and the layer that takes it makes NaN of it."""

    def training_step(self, batch, batch_idx):
        return self.net((200 * batch[0]).exp()).square().mean()


def test_infinities_that_no_module_has_made_are_said_to_be_so(trainer, tmp_path, capsys):
    bundle = fitted(trainer, tmp_path, Between("plain"), samples(4))
    _, found = replayed(capsys, bundle, *config(tmp_path, "Between", kind="plain"))
    assert guilt(found)["output"] == "net.0"
    assert "what is infinite there is of no module: a mask, the batch, or code before it" in found["findings"][0]


class Checkpointed(Net):
    def __init__(self, reentrant: bool) -> None:
        super().__init__("root")
        self.reentrant = reentrant

    def training_step(self, batch, batch_idx):
        inputs = batch[0].requires_grad_()
        return checkpoint(self.net, inputs, use_reentrant=self.reentrant).square().mean()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_no_module_twice(trainer, tmp_path, capsys, reentrant):
    torch.manual_seed(0)
    bundle = fitted(trainer, tmp_path, Checkpointed(reentrant), samples(4))
    _, found = replayed(capsys, bundle, *config(tmp_path, "Checkpointed", reentrant=reentrant))
    assert [call["name"] for call in found["calls"]] == ["net", "net.0", "net.1", "net.2", "net.3"]
    assert found["calls"][4]["gradient"]["nan"] == 0
    assert found["calls"][1]["gradient"]["nan"] + found["calls"][1]["gradient"]["inf"] > 0


class Masked(Net):
    """Makes -inf that a softmax takes, which is no fault; the logarithm after it is."""

    def __init__(self) -> None:
        super().__init__("log")
        self.mask, self.softmax = Log(), nn.Softmax(-1)

    def training_step(self, batch, batch_idx):
        mask = self.mask(torch.ones(WIDTH).cumsum(0).sub(1).to(self.device))  # the first is -inf
        return self.net(batch[0] * self.softmax(mask).sum()).square().mean()


def test_infinities_that_other_modules_take_without_harm_are_no_fault(trainer, tmp_path, capsys):
    inputs = samples()
    inputs[9, 3] = 0
    bundle = fitted(trainer, tmp_path, Masked(), inputs)
    _, found = replayed(capsys, bundle, *config(tmp_path, "Masked"))
    assert guilt(found) == {"output": "net.0"}


class Compiled(Net):
    def __init__(self) -> None:
        super().__init__("log")
        self.net[1].compile(backend="eager")


def test_what_is_compiled_is_said_to_be_unseen(trainer, tmp_path, capsys):
    inputs = samples()
    inputs[9, 3] = 0
    bundle = fitted(trainer, tmp_path, Compiled(), inputs)
    _, found = replayed(capsys, bundle, *config(tmp_path, "Compiled"))
    assert guilt(found) == {"output": "net.0"}
    assert any("net.1 is compiled" in note for note in found["notes"])
    assert "net.1" not in {call["name"] for call in found["calls"]}


# ---- bisection -----------------------------------------------------------------------------------------------------------------


def test_bisection_finds_the_one_bad_sample_among_64(trainer, tmp_path, capsys):
    inputs = samples(192)
    inputs[64 + 41, 5] = 0
    bundle = fitted(trainer, tmp_path, Net("log"), inputs, 64)
    code, found = replayed(capsys, bundle, *config(tmp_path, "Net", kind="log"), "--bisect")
    assert code == 0
    assert found["bisection"]["samples"] == [41]
    assert found["bisection"]["size"] == 64
    assert found["bisection"]["stable"]
    assert found["bisection"]["alone"]
    assert found["bisection"]["runs"] <= 2 * 6 + 2
    assert found["calls"][0]["inputs"]["shape"] == [1, WIDTH], "the tree is that of the subset"


class Counting(Net):
    """Remembers, beside its weights, that it has run; fails the first time only."""

    def __init__(self) -> None:
        super().__init__("log")
        self.runs = []

    def training_step(self, batch, batch_idx):
        self.runs.append(batch_idx)
        return super().training_step([batch[0] + (len(self.runs) > 1)], batch_idx)


def test_each_run_begins_with_the_module_as_it_was_made(trainer, tmp_path, capsys):
    inputs = samples(16)
    inputs[3, 3] = 0
    bundle = fitted(trainer, tmp_path, Counting(), inputs)
    _, found = replayed(capsys, bundle, *config(tmp_path, "Counting"), "--bisect", "--detect-anomaly")
    assert found["bisection"]["samples"] == [3]


class Toggled(Gan):
    """Its discriminator's loss is at fault while the generator's parameters need no gradient."""

    def training_step(self, batch, batch_idx):
        discriminator, generator = self.optimizers()
        made = self.generator(batch[0])
        self.toggle_optimizer(discriminator)
        self.one_step(discriminator, self.discriminator(made.detach() * batch[0].log()).mean())
        self.untoggle_optimizer(discriminator)
        self.toggle_optimizer(generator)
        self.one_step(generator, -self.discriminator(self.generator(batch[0])).mean())
        self.untoggle_optimizer(generator)


def test_a_run_that_ends_between_toggle_and_untoggle_leaves_nothing_to_the_next(trainer, tmp_path, capsys):
    inputs = samples()
    inputs[9, 3] = 0
    bundle = fitted(trainer, tmp_path, Toggled(), inputs)
    code, found = replayed(capsys, bundle, *config(tmp_path, "Toggled"), "--bisect", "--detect-anomaly")
    assert code == 0
    assert found["bisection"]["samples"] == [1]
    assert not found["notes"], "no optimizer has stepped before it in its window"


class Behind(Gan):
    """Its generator's loss is at fault, when the discriminator has stepped."""

    def training_step(self, batch, batch_idx):
        discriminator, generator = self.optimizers()
        self.one_step(discriminator, self.discriminator(self.generator(batch[0]).detach()).mean())
        self.one_step(generator, -self.discriminator(self.generator(batch[0]) * batch[0].log()).mean())


def test_optimizers_that_step_again_before_the_bad_step_are_told(trainer, tmp_path, capsys):
    inputs = samples()
    inputs[9, 3] = 0
    bundle = fitted(trainer, tmp_path, Behind(), inputs)
    code, found = replayed(capsys, bundle, *config(tmp_path, "Behind"))
    assert code == 0
    assert any("stepped in the window before the bad step do so again" in note for note in found["notes"])


class Pairwise(Net):
    """Fails if two samples of a batch are alike."""

    def training_step(self, batch, batch_idx):
        distances = torch.cdist(batch[0], batch[0]) + torch.eye(len(batch[0]))
        return self.net(batch[0]).square().mean() / distances.amin().sign()


def test_bisection_finds_two_samples_that_only_fail_together(trainer, tmp_path, capsys):
    inputs = samples(64)
    inputs[57] = inputs[5]
    bundle = fitted(trainer, tmp_path, Pairwise("plain"), inputs, 64)
    _, found = replayed(capsys, bundle, *config(tmp_path, "Pairwise", kind="plain"), "--bisect")
    assert found["bisection"]["samples"] == [5, 57]


def test_a_subset_at_which_the_module_raises_does_not_count_and_statistics_are_put_back(trainer, tmp_path, capsys):
    inputs = samples(8)
    inputs[3] = 1e9
    torch.manual_seed(1)
    bundle = fitted(trainer, tmp_path, Net("norm"), inputs, 8)
    _, found = replayed(capsys, bundle, *config(tmp_path, "Net", kind="norm"), "--bisect")
    assert len(found["bisection"]["samples"]) == 6, "of n samples none is more than the root of n - 1 deviations away; one raises"
    assert 3 in found["bisection"]["samples"]


def test_bisection_of_a_spike_finds_the_sample_with_most_of_the_norm(trainer, tmp_path, capsys):
    inputs, module = samples(64), Scaled()
    (gradient, _) = torch.autograd.grad(module.net(inputs).square().mean(), module.parameters())
    inputs[50] *= 1e4
    limit = 0.8 * float(gradient.norm())  # each healthy sample alone is above it, its share in the mean is not
    bundle = fitted(trainer, tmp_path, module, inputs, 64, skip_above=limit)
    code, found = replayed(capsys, bundle, *config(tmp_path, "Scaled"), "--bisect")
    assert code == 0
    assert found["bisection"]["samples"] == [50]


class Scaled(Net):
    def __init__(self) -> None:
        super().__init__("plain")
        self.net = nn.Linear(WIDTH, 1)


def test_ddmin_says_if_a_subset_is_not_alone_or_not_stable():
    assert not bisect(8, lambda samples: bool({2, 6} & set(samples))).is_alone
    answers = iter([True, True, True, False, False])
    assert not bisect(8, lambda samples: next(answers)).is_stable
    assert bisect(1, lambda samples: True).samples == (0,)


@dataclasses.dataclass
class Item:
    x: Tensor
    names: list[str]
    temperature: Tensor


def test_samples_are_cut_out_of_everything_that_has_as_many_rows():
    batch = {"item": Item(torch.arange(6).view(6, 1), list("abcdef"), torch.tensor(2.0)), "y": (torch.arange(6), torch.zeros(3))}
    size = batch_size(batch)
    assert size == 6
    part = chosen(batch, [1, 4], size)
    assert part["item"].x.tolist() == [[1], [4]]
    assert part["item"].names == ["b", "e"]
    assert part["item"].temperature == 2
    assert part["y"][0].tolist() == [1, 4]
    assert part["y"][1].shape == (3,)
    assert batch["item"].names == list("abcdef")
    pair = [torch.arange(2), torch.arange(2)]
    assert [len(rows) for rows in chosen(pair, [0], 2)] == [1, 1], "a list of tensors is no list of samples"
    assert batch_size({"text": "abc"}) is None


# ---- weights -------------------------------------------------------------------------------------------------------------------


def test_weights_of_a_checkpoint_are_told_with_their_distance(trainer, tmp_path, capsys):
    inputs = samples(24)
    inputs[21, 3] = 0
    saving = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    options = {"enable_checkpointing": True}
    bundle = fitted(trainer, tmp_path, Net("log"), inputs, weights="reference", options=options, callbacks=[saving])
    arguments = config(tmp_path, "Net", kind="log")
    _, found = replayed(capsys, bundle, *arguments)
    assert "step=4.ckpt, which the bundle refers to, of step 4, 1 step before the bad one" in found["weights"]
    first = tmp_path / "ckpt" / "step=2.ckpt"
    _, found = replayed(capsys, bundle, *arguments, "--ckpt", first)
    assert "of step 2, 3 steps before the bad one" in found["weights"]
    shutil.rmtree(tmp_path / "ckpt")
    assert "step=4.ckpt, which is gone; give another one by --ckpt PATH." in refused(capsys, bundle, *arguments)


def test_without_any_weights_those_of_the_configuration_are_taken_and_that_is_said(trainer, tmp_path, capsys):
    inputs = samples()
    inputs[9, 3] = 0
    bundle = fitted(trainer, tmp_path, Net("log"), inputs, weights="none")
    code, found = replayed(capsys, bundle, *config(tmp_path, "Net", kind="log"))
    assert code == 0
    assert found["weights"] == "as the configuration makes them; the bundle has none"
    assert found["micro_batches"][0]["same_loss"] in {True, False}


def test_what_is_not_bad_again_says_so_and_what_to_try(trainer, tmp_path, capsys):
    torch.manual_seed(0)
    bundle = fitted(trainer, tmp_path, Net("plain"), samples(4), weights="none", skip_above=1e-6)
    facts = json.loads((bundle / FACTS).read_text())
    facts["report"]["limit"] = 1e6
    (bundle / FACTS).write_text(json.dumps(facts))
    code, found = replayed(capsys, bundle, *config(tmp_path, "Net", kind="plain"), "--bisect")
    assert code == 1
    assert found["verdict"].startswith("Not reproduced: the norm is ")
    assert "give a checkpoint from before the step by --ckpt" in found["verdict"]
    assert found["bisection"] is None


class Wrapped(Net):
    """Its keys in a checkpoint are longer."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {f"_orig_mod.{name}": value for name, value in checkpoint["state_dict"].items()}


def test_names_that_wrappers_have_put_into_keys_are_looked_through(trainer, tmp_path, capsys):
    inputs = samples()
    inputs[9, 3] = 0
    saving = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=2, save_top_k=-1)
    options = {"enable_checkpointing": True}
    bundle = fitted(trainer, tmp_path, Wrapped("log"), inputs, weights="reference", options=options, callbacks=[saving])
    code, found = replayed(capsys, bundle, *config(tmp_path, "Wrapped", kind="log"))
    assert code == 0
    assert found["micro_batches"][0]["same_loss"] in {True, False}
    assert "of step 2" in found["weights"]


# ---- input that cannot be used -------------------------------------------------------------------------------------------------


@pytest.fixture
def bad(trainer, tmp_path):
    inputs = samples()
    inputs[9, 3] = 0
    return fitted(trainer, tmp_path, Net("log"), inputs)


def test_what_is_no_bundle_or_was_tampered_with_is_refused(bad, tmp_path, capsys):
    good = config(tmp_path, "Net", kind="log")
    assert "must be a folder with a bundle.json" in refused(capsys, tmp_path, *good)
    whole = (bad / BATCHES).read_bytes()
    (bad / BATCHES).write_bytes(whole[:-10])
    assert "it is truncated or changed" in refused(capsys, bad, *good)
    (bad / BATCHES).write_bytes(whole[:-1] + b"?")
    assert "its hash is another one" in refused(capsys, bad, *good)
    (bad / BATCHES).write_bytes(whole)
    facts = json.loads((bad / FACTS).read_text())
    for key, value in {"optimizer": "x", "trainer": {}, "module": {"class": 3}}.items():
        (bad / FACTS).write_text(json.dumps(facts | {key: value}))
        assert "bundle.json must tell of the step, the Trainer and the module" in refused(capsys, bad, *good)
    (bad / FACTS).write_text(json.dumps(facts | {"optimizer": 7}))
    assert "is of optimizer 7, but the module has 1" in refused(capsys, bad, *good)


def test_another_module_is_refused_with_the_keys_that_differ(bad, tmp_path, capsys):
    line = refused(capsys, bad, *config(tmp_path, "Net", kind="spike"))
    assert "of Net as the configuration makes it, got 4 missing (net.0.weight, net.0.bias, net.2.weight and 1 more)" in line
    assert "4 unexpected (net.1.weight, net.1.bias, net.3.weight and 1 more)" in line
    with pytest.raises(UnusableReplayError, match=r"got 1 of another shape \(weight \[3, 3\] instead of \[3, 2\]\)"):
        check_fit({"weight": (3, 3), "bias": (3,)}, nn.Linear(2, 3), "weights")


def test_configurations_that_cannot_be_used_are_refused_in_one_line(bad, tmp_path, capsys):
    assert "`--config` must be a file, got " in refused(capsys, bad, "--config", tmp_path / "none.yaml")
    path = tmp_path / "broken.yaml"
    path.write_text("model: [")
    assert "cannot be read as YAML" in refused(capsys, bad, "--config", path)
    path.write_text("- 3")
    assert "must hold a configuration of LightningCLI, got list" in refused(capsys, bad, "--config", path)
    path.write_text("model: {kind: log}")
    line = refused(capsys, bad, "--config", path)
    assert "--script main.py (the bundle was made by " in line
    path.write_text("model: {class_path: tests.test_replay.Nowhere}")
    assert "LightningCLI refused the configuration: " in refused(capsys, bad, "--config", path)
    assert len(refused(capsys, bad, *config(tmp_path, "Net", kindd="log"))) < 1000


def test_checkpoints_that_cannot_be_used_are_refused(bad, tmp_path, capsys):
    good = config(tmp_path, "Net", kind="log")
    path = tmp_path / "x.ckpt"
    assert "`--ckpt` must be a checkpoint of Lightning" in refused(capsys, bad, *good, "--ckpt", path)
    path.write_bytes(b"no checkpoint")
    assert "cannot be read as a checkpoint" in refused(capsys, bad, *good, "--ckpt", path)
    torch.save({"weights": {}}, path)
    assert "with a state_dict" in refused(capsys, bad, *good, "--ckpt", path)
    torch.save({"state_dict": {}, "hyper_parameters": Item(torch.zeros(1), [], torch.zeros(()))}, path)
    assert "holds objects that could run code: tests.test_replay.Item" in refused(capsys, bad, *good, "--ckpt", path)
    torch.save({"state_dict": {"net.1.weight": torch.zeros(2)}}, path)
    assert "3 missing (net.1.bias, net.3.weight, net.3.bias)" in refused(capsys, bad, *good, "--ckpt", path)


def test_options_that_cannot_be_used_are_refused(bad, tmp_path, capsys):
    good = config(tmp_path, "Net", kind="log")
    assert "must be a file.png or file.svg" in refused(capsys, bad, *good, "-o", tmp_path / "x.jpg")
    assert "in a folder that can be written to" in refused(capsys, bad, *good, "-o", tmp_path / "none" / "x.png")
    assert "`--device` must be one that this machine has (cpu" in refused(capsys, bad, *good, "--device", "tpu")
    assert "Trainer raised" in refused(capsys, bad, *good, "--precision", "8-true")
    assert "`--trust` must be a class as package.module.Class" in refused(capsys, bad, *good, "--trust", "nowhere.Class")
    assert "`--trust` must be a class, got tests.test_replay.WIDTH" in refused(
        capsys, bad, *good, "--trust", "tests.test_replay.WIDTH"
    )
    assert "`--script` must be a file" in refused(capsys, bad, *good, "--script", tmp_path / "none.py")
    with pytest.raises(SystemExit):
        main(["replay", str(bad), *good, "--explodes", "0.5"])


class Raising(Net):
    def training_step(self, batch, batch_idx):
        if type(self.trainer.logger).__name__ == "DummyLogger":
            raise KeyError("a file that is not here")
        return super().training_step(batch, batch_idx)


def test_an_error_of_the_modules_own_is_told_with_its_place(trainer, tmp_path, capsys):
    inputs = samples()
    inputs[9, 3] = 0
    bundle = fitted(trainer, tmp_path, Raising("log"), inputs)
    capsys.readouterr()
    assert main(["replay", str(bundle), *config(tmp_path, "Raising", kind="log")]) == 2
    said = capsys.readouterr().err
    assert 'raise KeyError("a file that is not here")' in said
    assert "raised KeyError: 'a file that is not here' (" in said.splitlines()[-1]
    assert "lightning/pytorch" not in said


class Cased(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step([batch.x], batch_idx)


def one_item(batch):
    return Item(torch.stack([row[0] for row in batch]), ["a"] * len(batch), torch.zeros(()))


def test_classes_of_batches_are_named_and_run_if_they_are_trusted(trainer, tmp_path, capsys):
    inputs = samples()
    inputs[9, 3] = 0
    fit = trainer(NonFiniteGuard(bundle_dir=tmp_path / "bad", weights="full"))
    fit.fit(Cased("log"), DataLoader(TensorDataset(inputs), batch_size=4, collate_fn=one_item))
    (bundle,) = (tmp_path / "bad").iterdir()
    arguments = config(tmp_path, "Cased", kind="log")
    assert "--trust tests.test_replay.Item" in refused(capsys, bundle, *arguments)
    code, found = replayed(capsys, bundle, *arguments, "--trust", "tests.test_replay.Item", "--bisect")
    assert code == 0
    assert found["bisection"]["samples"] == [1]


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)

    def __init__(self, mark):
        self.mark = mark


def rewrite(bundle, name, content):
    """As a stranger would who knows how bundles are made."""
    import hashlib

    if isinstance(content, str):
        (bundle / name).write_text(content)
    else:
        torch.save(content, bundle / name)
    data = (bundle / name).read_bytes()
    facts = json.loads((bundle / FACTS).read_text())
    facts["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (bundle / FACTS).write_text(json.dumps(facts))


def test_a_strangers_bundle_runs_nothing(bad, tmp_path, capsys):
    mark, good = tmp_path / "mark", config(tmp_path, "Net", kind="log")
    evil = f"import os; os.system('touch {mark}')"
    (bad / "evil.py").write_text(evil)
    facts = json.loads((bad / FACTS).read_text())
    facts["module"] |= {"class": "evil.Module", "script": str(bad / "evil.py")}
    (bad / FACTS).write_text(json.dumps(facts))
    rewrite(bad, "config.yaml", f"model: {{class_path: subprocess.Popen, init_args: {{args: [touch, {mark}]}}}}")
    assert replayed(capsys, bad, *good)[0] == 0
    rows = torch.load(bad / BATCHES, weights_only=True)
    rewrite(bad, WEIGHTS, {"module": Evil(mark)})
    assert "posix.system" in refused(capsys, bad, *good)
    rewrite(bad, BATCHES, [rows[0] | {"batch": Evil(mark)}])
    assert "posix.system" in refused(capsys, bad, *good)
    assert not mark.exists()
    torch.load(bad / BATCHES, weights_only=False)
    assert mark.exists(), "or the bundle was not malicious"


# ---- scripts and configurations ------------------------------------------------------------------------------------------------

SCRIPT = """
    import sys
    from pathlib import Path
    import torch
    from lightning.pytorch import Callback, LightningDataModule
    from lightning.pytorch.cli import LightningCLI
    from torch.utils.data import DataLoader, TensorDataset
    import beside
    from tests.test_replay import Net as Base, samples

    class Net(Base):
        def __init__(self, kind: str = "plain", zeros: int = 0) -> None:
            super().__init__(kind)
            self.zeros = zeros

        def training_step(self, batch, batch_idx):
            return super().training_step([batch[0] * (1 - self.zeros)], batch_idx)

    class Data(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(TensorDataset(samples(8)), batch_size=4)

    class Loud(Callback):
        def __init__(self):
            Path(__file__).with_name("loud").touch()

    class CLI(LightningCLI):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            print("not to be reached in a replay")
            Path(__file__).with_name("trained").touch()

        def add_arguments_to_parser(self, parser):
            parser.add_argument("--zeros", type=int, default=0)
            parser.link_arguments("zeros", "model.zeros")

    def cli_main():
        CLI(Net, Data, **RUN)

    if __name__ == "__main__":
        cli_main()
"""


@pytest.fixture
def script(tmp_path):
    """A script with classes, links and a module beside it, and the configuration and bundle that running it has left."""

    def make(run="{}", command=("fit",)):
        folder = tmp_path / "script"
        folder.mkdir()
        (folder / "beside.py").touch()
        source = textwrap.dedent(SCRIPT)
        (folder / "train.py").write_text(source.replace("**RUN", f"**{run}"))
        (folder / "cfg.yaml").write_text(
            yaml.safe_dump(
                {
                    "seed_everything": 3,
                    "model": {"kind": "log"},
                    "zeros": 1,
                    "trainer": {
                        "max_epochs": 1,
                        "accelerator": "cpu",
                        "enable_progress_bar": False,
                        "enable_checkpointing": False,
                        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder / "logs")}},
                        "callbacks": [
                            {"class_path": "__main__.Loud"},
                            {
                                "class_path": "clip_callbacks.NonFiniteGuard",
                                "init_args": {"bundle_dir": str(folder / "bad"), "max_bundles": 1},
                            },
                        ],
                    },
                }
            )
        )
        root = str(Path(__file__).parents[1])
        subprocess.run(
            [sys.executable, "train.py", *command, "--config", "cfg.yaml"],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": root},
            check=True,
            capture_output=True,
        )
        (bundle,) = (folder / "bad").iterdir()
        return folder, bundle

    return make


def test_scripts_with_their_own_cli_are_run_up_to_the_module(script, capsys):
    folder, bundle = script()
    for name in ("trained", "loud"):
        (folder / name).unlink()
    path, before = list(sys.path), sys.modules["__main__"]
    code, found = replayed(capsys, bundle, "--script", folder / "train.py", "--config", folder / "cfg.yaml")
    assert code == 0
    assert guilt(found) == {"output": "net.0"}
    assert found["weights"].startswith("as the configuration makes them")
    assert found["micro_batches"][0]["same_loss"], "the seed of the configuration makes the weights of the run"
    assert not (folder / "trained").exists()
    assert not (folder / "loud").exists(), "what the Trainer of the configuration has is not made"
    assert sys.path == path
    assert sys.modules["__main__"] is before
    sys.modules.pop("beside", None)
    (saved,) = (folder / "logs").rglob("config.yaml")
    assert replayed(capsys, bundle, "--script", folder / "train.py", "--config", saved)[0] == 0
    assert replayed(capsys, bundle, "--script", folder / "train.py", "--config", bundle / "config.yaml")[0] == 0
    sections = folder / "sections.yaml"
    sections.write_text(yaml.safe_dump({"fit": yaml.safe_load((folder / "cfg.yaml").read_text())}))
    assert replayed(capsys, bundle, "--script", folder / "train.py", "--config", sections)[0] == 0
    line = refused(capsys, bundle, "--config", folder / "cfg.yaml")
    assert "(the bundle was made by train.py)" in line


def test_scripts_that_do_not_run_their_cli_work_too(script, capsys):
    folder, bundle = script("""{"trainer_defaults": {"max_steps": 1}}""")
    source = (folder / "train.py").read_text()
    (folder / "train.py").write_text(source.replace('"trainer_defaults": {"max_steps": 1}', '"run": False'))
    code, found = replayed(capsys, bundle, "--script", folder / "train.py", "--config", folder / "cfg.yaml")
    assert code == 0
    assert guilt(found) == {"output": "net.0"}


def test_scripts_that_make_no_cli_or_fail_are_refused(bad, tmp_path, capsys):
    good, path = config(tmp_path, "Net", kind="log"), tmp_path / "main.py"
    path.write_text("print('nothing')")
    assert "must be one that makes a LightningCLI when it is run" in refused(capsys, bad, *good, "--script", path)
    path.write_text("\n1 / 0")
    assert f"main.py raised ZeroDivisionError: division by zero ({path}, line 2)" in refused(capsys, bad, *good, "--script", path)


def test_the_optimizer_of_a_configuration_is_bound_to_the_module_that_runs(bad, tmp_path, capsys):
    arguments = config(tmp_path, "Net", kind="log")
    path = Path(arguments[1])
    path.write_text(path.read_text() + "optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.1}}\n")
    code, found = replayed(capsys, bad, *arguments, "--bisect", "--detect-anomaly")
    assert code == 0
    assert found["bisection"]["samples"] == [1]


# ---- pictures and trees --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_picture_is_drawn_in_the_format_of_its_suffix(bad, tmp_path, capsys, kind):
    path = tmp_path / f"picture.{kind}"
    assert main(["replay", str(bad), *config(tmp_path, "Net", kind="log"), "-o", str(path)]) == 0
    content = path.read_bytes()
    if kind == "png":
        assert content.startswith(b"\x89PNG")
    else:
        text = content.decode()
        assert "First non-finite output:" in text
        assert 'id="max |activation|: not finite"' in text
        assert "net.3" in text
    assert f"Picture: {path}" in capsys.readouterr().out


def span(value):
    return Range.of(torch.tensor([value]))


def test_of_calls_within_each_other_that_break_a_gradient_the_innermost_is_blamed():
    outer = Call("net", "Sequential", gradient=span(1.0), first_bad=3, done=1)
    inner = Call("net.0", "Root", parent=outer, gradient=span(1.0), first_bad=3, done=0)
    assert [culprit.call for culprit in find_culprits([outer, inner], 1e3)] == [inner]


def test_nobody_is_blamed_for_parameters_that_were_not_finite_before():
    outer = Call("net", "Sequential", inputs=span(1.0), outputs=span(math.nan), done=1)
    inner = Call("net.0", "Linear", 1, outer, span(1.0), ("weight",), span(math.nan), done=0)
    assert find_culprits([outer, inner], 1e3) == []
    inner.parameters = ()
    assert [culprit.call for culprit in find_culprits([outer, inner], 1e3)] == [inner]


def test_trees_fold_what_is_healthy_and_what_is_infected():
    calls = [Call("net", "Sequential", inputs=span(1.0), outputs=span(math.nan), done=1)]
    for number in range(40):
        healthy = number < 20
        layer = Call(
            f"net.{number}", "Block", 1, calls[0], span(1.0 if healthy else math.nan), (), span(1.0 if healthy else math.nan)
        )
        layer.done = number
        inner = Call(f"net.{number}.0", "Linear", 1, layer, layer.inputs, (), layer.outputs)
        inner.done = number
        calls += [layer, inner]
    assert len(calls) > SMALL
    culprit = Culprit("output", calls[41], "made it")
    text = plain_text(make_tree("root", calls, [culprit]))
    assert "… 18 more, healthy" in text
    assert "… 17 more, not finite either" in text
    assert "… 1 healthy child\n" in text
    assert "… 1 child, not finite either\n" in text
    assert "net.20 (Block): [1, 1] → all NaN  ◀ first non-finite output" in text.replace("all NaN → all NaN", "[1, 1] → all NaN")
    assert len(text.splitlines()) < 20
    assert plain_text(make_tree("root", calls, [culprit]), "ascii").isascii()


def test_a_terminal_gets_the_tree_in_colors(bad, tmp_path, capsys, monkeypatch):
    rich = pytest.importorskip("rich.console")
    console = rich.Console(force_terminal=True, width=100, record=True)
    calls = [Call("net", "Log", inputs=span(0.0), outputs=span(-math.inf), done=0)]
    console.print(rich_tree(make_tree("root", calls, [])))
    assert "net (Log)" in console.export_text()
