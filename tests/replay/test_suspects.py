"""Modules that are suspects, and modules that are not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.helpers.replaying import WIDTH, Log, Net, config, fitted, replayed, samples, suspects

pytestmark = [
    pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Spike at:RuntimeWarning"),
]


class Shared(Net):
    """Uses the output of one layer in another layer, and also in the square root of zero."""

    def __init__(self) -> None:
        super().__init__("plain")
        self.first, self.relu, self.innocent = nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, 1)

    def training_step(self, batch, batch_idx):
        hidden = self.relu(self.first(batch[0]))
        return self.innocent(hidden).mean() + (hidden - hidden.detach()).sqrt().sum()


def test_a_module_is_no_suspect_for_what_flows_back_from_another_use_of_its_input(trainer, tmp_path, capsys):
    bundle = fitted(trainer, tmp_path, Shared(), samples(4))
    _, found = replayed(capsys, bundle, *config(tmp_path, Shared))
    assert suspects(found) == {}
    assert "look at code that uses the output of relu (ReLU)" in found["findings"][0]
    innocent = next(call for call in found["calls"] if call["name"] == "innocent")
    assert innocent["gradient_in"]["nan"] == innocent["gradient_in"]["inf"] == 0


class Twice(Net):
    """Calls one layer twice, and takes the square root of zero from the second output only."""

    def training_step(self, batch, batch_idx):
        layer = self.net[0]
        first, second = layer(batch[0]), layer(batch[0])
        return first.square().mean() + (second - second.detach()).sqrt().sum()


def test_of_two_calls_of_a_module_the_innocent_one_is_no_suspect(trainer, tmp_path, capsys):
    bundle = fitted(trainer, tmp_path, Twice("plain"), samples(4))
    _, found = replayed(capsys, bundle, *config(tmp_path, Twice, kind="plain"))
    assert suspects(found) == {}
    assert "look at code that uses the output of net.0 (Linear, call 2)" in found["findings"][0]


class Penalized(Net):
    """Adds the norm of a bias of zeros to the loss, by its formula."""

    def training_step(self, batch, batch_idx):
        nn.init.zeros_(self.net[0].bias)
        return self.net(batch[0]).square().mean() + self.net[0].bias.square().sum().sqrt()


def test_a_module_is_no_suspect_for_a_penalty_on_its_parameters(trainer, tmp_path, capsys):
    bundle = fitted(trainer, tmp_path, Penalized("plain"), samples(4))
    _, found = replayed(capsys, bundle, *config(tmp_path, Penalized, kind="plain"))
    assert suspects(found) == {}
    assert "and at code that uses parameters directly, such as a penalty on weights" in found["findings"][0]
    assert "SqrtBackward0" in found["findings"][0]


class Weighted(nn.Module):
    """Adds the square root of a parameter that is zero."""

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
    _, found = replayed(capsys, bundle, *config(tmp_path, OwnParameter))
    assert suspects(found) == {"gradient": "net.1"}
    assert "the gradients of its own parameters are non-finite" in found["suspects"][0]["text"]


class Between(Net):
    """Computes an infinite exponential outside of modules, of which the next layer makes NaN."""

    def training_step(self, batch, batch_idx):
        return self.net((200 * batch[0]).exp()).square().mean()


def test_infinities_that_no_module_has_made_are_said_to_be_so(trainer, tmp_path, capsys):
    bundle = fitted(trainer, tmp_path, Between("plain"), samples(4))
    _, found = replayed(capsys, bundle, *config(tmp_path, Between, kind="plain"))
    assert suspects(found)["output"] == "net.0"
    assert "no module made these infinities: look at the batch, masks and code before it" in found["findings"][0]


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
    _, found = replayed(capsys, bundle, *config(tmp_path, Checkpointed, reentrant=reentrant))
    assert [call["name"] for call in found["calls"]] == ["net", "net.0", "net.1", "net.2", "net.3"]
    assert found["calls"][4]["gradient"]["nan"] == 0
    assert found["calls"][1]["gradient"]["nan"] + found["calls"][1]["gradient"]["inf"] > 0


class Masked(Net):
    """Makes a mask of -inf that a softmax turns into zeros, and takes the logarithm of zero after it."""

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
    _, found = replayed(capsys, bundle, *config(tmp_path, Masked))
    assert suspects(found) == {"output": "net.0"}


class Compiled(Net):
    def __init__(self) -> None:
        super().__init__("log")
        self.net[1].compile(backend="eager")


def test_what_is_compiled_is_said_to_be_unseen(trainer, tmp_path, capsys):
    inputs = samples()
    inputs[9, 3] = 0
    bundle = fitted(trainer, tmp_path, Compiled(), inputs)
    _, found = replayed(capsys, bundle, *config(tmp_path, Compiled))
    assert suspects(found) == {"output": "net.0"}
    assert any("net.1 is compiled" in note for note in found["notes"])
    assert "net.1" not in {call["name"] for call in found["calls"]}
