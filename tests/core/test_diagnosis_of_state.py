"""Diagnoses of bad state: buffers, tensors in plain attributes of modules, frozen parameters."""

from __future__ import annotations

import json
import math

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torchmetrics import MeanMetric

from clip_callbacks import NonFiniteGuard
from clip_callbacks.core import diagnosis, merged_diagnosis
from clip_callbacks.core.diagnosis import examine, nonfinite_among
from clip_callbacks.core.merged_diagnosis import merge_diagnoses
from clip_callbacks.core.tensor_table import TensorTable
from clip_callbacks.html_report.bad_steps import bad_steps
from clip_callbacks.html_report.diagnosis import diagnose
from clip_callbacks.trainer.tensor_attributes import nan_attributes
from tests.helpers.logs import read
from tests.helpers.training import Regression, data

NAN = torch.full((2, 3), math.nan)


def table_of(net, bad=True):
    net(torch.ones(1, 4)).sum().backward()
    if bad:
        next(net.parameters()).grad[0, 0] = math.nan
    return TensorTable.of(net.named_parameters())


# ---- buffers -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [torch.tensor(math.nan), torch.tensor(1.0), None])
def test_a_buffer_that_was_bad_before_is_never_blamed_on_the_data(loss):
    table, losses = table_of(nn.Linear(4, 2)), [] if loss is None else [loss]
    for value in (math.nan, math.inf, -math.inf):
        found = examine(
            table, losses, after_good_step=True, buffers=[("mean", torch.tensor([0.0, value])), ("other", torch.ones(2))]
        )
        assert found.stage == "buffer"
        assert [tensor.name for tensor in found.buffers] == ["mean"]
        assert "buffers were non-finite before this step" in found.describe()
        assert "Non-finite buffers before this step: mean [2]: 1" in found.describe()
        assert json.loads(json.dumps(found.facts()))["buffers"][0]["name"] == "mean"


def test_a_parameter_goes_before_a_buffer_and_a_finite_buffer_changes_nothing():
    net = nn.Linear(4, 2)
    table = table_of(net)
    good, bad = [("mean", torch.zeros(2))], [("mean", torch.tensor(math.nan))]
    loss = [torch.tensor(math.nan)]
    assert examine(table, loss, buffers=good) == examine(table, loss)
    assert examine(table, loss, buffers=good).stage == "loss"
    net.bias.data.fill_(math.nan)
    assert examine(table, loss, buffers=bad).stage == "parameter"
    assert "Non-finite buffers" in examine(table, loss, buffers=bad).describe()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_buffers_of_every_kind_are_passed_over_or_judged():
    quantized = torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.qint8)
    others = [torch.arange(3), torch.ones(3).bool(), torch.zeros(3).to(torch.float8_e5m2), quantized, torch.empty(3, device="meta")]
    others += [nn.UninitializedBuffer(), torch.zeros(0), torch.tensor(1.0)]
    assert nonfinite_among((str(place), tensor) for place, tensor in enumerate(others)) == ()
    bad = [torch.tensor(math.nan), NAN.bfloat16(), NAN.to(torch.complex64), torch.tensor([0.0, math.nan]).to_sparse()]
    assert [tensor.name for tensor in nonfinite_among((str(place), it) for place, it in enumerate(bad))] == ["0", "1", "2", "3"]


def test_ranks_merge_their_diagnoses_of_state(monkeypatch):
    table = table_of(nn.Linear(4, 2))
    ours = examine(table, buffers=[("mean", NAN), ("count", NAN)], frozen=[("base", NAN)])
    theirs = examine(table, buffers=[("mean", NAN[:1])])

    def of_two(share):
        return [share, merged_diagnosis._RankDiagnosis(theirs, share.counted, share.with_gradient, share.with_entries)]

    monkeypatch.setattr(merged_diagnosis, "gathered", of_two)
    found = merge_diagnoses(table, ours)
    assert [(it.name, it.nan, it.ranks) for it in found.buffers] == [("mean", 6, ()), ("count", 6, (0,))]
    assert [(it.name, it.ranks) for it in found.frozen] == [("base", (0,))]


def test_a_report_with_everything_in_it_is_short():
    net = nn.Sequential(nn.Linear(4, 4), *(nn.Linear(4, 4) for _ in range(12)))
    table = table_of(net)
    for parameter in net.parameters():
        parameter.grad.fill_(math.nan)
    net[3].bias.data.fill_(math.nan)
    net[0].bias.grad = torch.zeros(4)
    many = [(f"name{place}", NAN) for place in range(9)]
    found = examine(table, [torch.tensor(math.nan)], buffers=many, frozen=many)
    found = diagnosis.replace(found, traced="a module", carried=found.buffers, carried_before=found.buffers, loss_ranks=(1,))
    lines = found.describe().splitlines()
    assert len(lines) <= 19, "with the line above it, twenty"
    assert "Frozen parameters that look non-finite, as packed codes may: name0; name1; name2 and 6 more" in lines


# ---- frozen parameters ---------------------------------------------------------------------------------------------------------


def test_frozen_parameters_decide_no_stage():
    net = nn.Linear(4, 2)
    table = table_of(net)
    net.bias.grad = None
    net.bias.requires_grad_(False).fill_(math.nan)
    found = examine(table, [torch.tensor(math.nan)])
    assert (found.stage, found.parameters, found.frozen) == ("loss", (), ())
    found = examine(table, [torch.tensor(math.nan)], frozen=[("bias", net.bias)])
    assert found.stage == "loss"
    assert "Frozen parameters that look non-finite, as packed codes may: bias" in found.describe()


# ---- tensors in plain attributes -----------------------------------------------------------------------------------------------


class Carrying(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.inner.hidden = (NAN, NAN.clone())
        self.cache = {"keys": [NAN.clone()], 3: torch.ones(2)}
        self.many = [NAN.clone()] * 65
        self.deep = [[[NAN.clone()]]]
        self.number, self.mask, self.count = torch.tensor(math.nan), torch.full((2, 2), -torch.inf), torch.ones(3).long()
        self.codes = torch.zeros(3).to(torch.float8_e4m3fn)
        self.register_buffer("state", NAN.clone())
        self.alias, self.weight = self.state, self.inner.weight
        self.metric = MeanMetric()
        self.metric.mean_value = NAN.clone()
        self.inner.weight.grad = torch.full((2, 2), math.nan)
        self.gradient = self.inner.weight.grad


def test_what_modules_carry_is_found_by_name():
    found = nan_attributes(Carrying())
    assert [str(tensor) for tensor in found] == [
        "cache['keys'][0] [2, 3]: 6 NaN",
        "inner.hidden[0] [2, 3]: 6 NaN",
        "inner.hidden[1] [2, 3]: 6 NaN",
    ]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_weights_that_are_computed_anew_are_not_carried(norm):
    layer = norm(nn.Linear(3, 3))
    for parameter in layer.parameters():
        parameter.data.fill_(math.nan)
    layer(torch.ones(1, 3))
    assert bool(layer.weight.isnan().any())
    assert nan_attributes(nn.Sequential(layer, nn.LSTM(2, 2))) == ()


class Recurrent(Regression):
    """An LSTM whose state is carried from batch to batch, as truncated backpropagation through a stream does it."""

    def __init__(self, resets=False):
        super().__init__(net=nn.LSTM(4, 4))
        self.head, self.state, self.resets = nn.Linear(4, 1), None, resets

    def loss(self, batch, batch_idx):
        if self.resets and self.state and bool(self.state[0].isnan().any()):
            self.state = None
        out, state = self.net(batch[0][None], self.state)
        self.state = tuple(part.detach() for part in state)
        return nn.functional.mse_loss(self.head(out[0]), batch[1])


def fit_of(trainer, tmp_path, module, bad):
    loader = list(data(10))
    for number in bad:
        loader[number][0][0] = math.nan
    logger = CSVLogger(tmp_path)
    with pytest.warns(RuntimeWarning, match="Non-finite gradients") as said:
        trainer(NonFiniteGuard(max_consecutive=20), logger=logger).fit(module, torch.utils.data.DataLoader(loader, batch_size=None))
    return read(logger.log_dir).optimizer_logs[0], [str(each.message) for each in said if "Non-finite" in str(each.message)]


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*log.*batch_size.*")
def test_a_hidden_state_is_blamed_from_the_second_bad_step_on(trainer, tmp_path):
    log, said = fit_of(trainer, tmp_path, Recurrent(), [4])
    assert [entry["stage"] for entry in log.bad_steps] == ["loss"] + ["carried"] * 5
    assert "Non-finite in plain attributes or frozen parameters, which a skip does not restore: state[0] [1, 4, 4]" in said[0]
    assert "already non-finite before this step" not in said[0]
    assert "a tensor that a module carries from batch to batch was non-finite before this step. Reset it" in said[1]
    rows, _ = bad_steps(log)
    assert rows[1].details.startswith('stage "carried"; not finite: state[0], state[1], net.weight_ih_l0')
    found = " ".join(finding.text for finding in diagnose(log, {}))
    assert 'The most frequent stage is "carried": a tensor that a module keeps from batch to batch was non-finite' in found
    assert "The tensor named first most often is state[0]." in found


def test_a_module_that_resets_its_state_is_not_blamed(trainer, tmp_path):
    log, said = fit_of(trainer, tmp_path, Recurrent(resets=True), [4, 7])
    assert [entry["stage"] for entry in log.bad_steps] == ["loss", "loss"]
    assert all("plain attributes" in each for each in said)


def test_what_holds_nan_by_design_is_acquitted_by_a_good_step(trainer, tmp_path):
    module = Regression()
    module.bank = torch.full((3, 2), math.nan)
    log, said = fit_of(trainer, tmp_path, module, [4, 5])
    assert [entry["stage"] for entry in log.bad_steps] == ["loss", "loss"]
    assert not any("bank" in each for each in said)


class Spoilt(Regression):
    """Keeps the mean of its inputs, until its own code spoils it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(4))
        self.register_buffer("mask", torch.full((4,), -math.inf))

    def loss(self, batch, batch_idx):
        self.centre.lerp_(batch[0].mean(0), 0.1)
        return super().loss(batch, batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == 3:
            self.centre.fill_(math.nan)


def test_a_bad_buffer_in_a_fit_is_on_the_report_page(trainer, tmp_path):
    log, said = fit_of(trainer, tmp_path, Spoilt(), [2, 4])
    assert [entry["stage"] for entry in log.bad_steps] == ["loss", "buffer"], "what the batch itself made of it is undone"
    assert bad_steps(log)[0][1].details.startswith('stage "buffer"; not finite: centre, net.0.weight')
    assert not any("mask" in each for each in said)


@pytest.mark.parametrize("held", [True, False])
def test_a_frozen_parameter_is_named_before_the_first_good_step(trainer, tmp_path, held):
    module = Regression()
    module.base = nn.Parameter(NAN.clone(), requires_grad=False)
    if not held:
        module.make_optimizer = lambda _, **options: torch.optim.SGD(module.net.parameters(), **options)
    log, said = fit_of(trainer, tmp_path, module, [0])
    assert [entry["stage"] for entry in log.bad_steps] == ["loss"]
    assert "Frozen parameters that look non-finite, as packed codes may: base" in said[0]


class Banked(Regression):
    """Holds a bank that is NaN where nothing was stored yet; the forward pass fills it, or only reads it."""

    def __init__(self, fills, spoils=False):
        super().__init__()
        self.register_buffer("bank", torch.full((40,), math.nan))
        self.fills, self.spoils = fills, spoils

    def loss(self, batch, batch_idx):
        if self.fills:
            self.bank[batch_idx] = batch[0].mean()
        return super().loss(batch, batch_idx) + (self.bank[-1] if self.spoils else 0.0)


@pytest.mark.parametrize("fills", [True, False])
def test_a_buffer_that_began_with_nan_is_blamed_only_if_no_step_was_good(trainer, tmp_path, fills):
    log, said = fit_of(trainer, tmp_path, Banked(fills), [4])
    assert [entry["stage"] for entry in log.bad_steps] == ["loss"]
    assert not any("bank" in each for each in said)
    log, said = fit_of(trainer, tmp_path, Banked(fills, spoils=True), [])
    assert {entry["stage"] for entry in log.bad_steps} == {"buffer"}
    assert all("bank" in each for each in said)
