"""What does not go with DeepSpeed is refused at the setup of a fit; names of groups. DeepSpeed itself is not needed here."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DeepSpeedStrategy

from clip_callbacks import (
    AccumulationRescaling,
    BatchSize,
    Bundles,
    GradientClipping,
    GradientNoiseScale,
    GradientNormMonitor,
    NonFiniteGuard,
    Rollback,
)
from clip_callbacks.trainer.deepspeed import EngineGradients
from tests.helpers.training import Regression

REFUSED = {
    '`policy` must be "skip", "raise" or "zero" under DeepSpeed, got \'ignore\'': lambda _: NonFiniteGuard("ignore"),
    '`policy` must be "skip", "raise" or "zero" under DeepSpeed, got \'warn\'': lambda _: NonFiniteGuard("warn"),
    '`nonfinite` must be "skip", "raise" or "zero" under DeepSpeed, got \'ignore\'': lambda _: GradientClipping(nonfinite="ignore"),
    "`level` must be \"window\" under DeepSpeed, got 'microbatch'": lambda _: NonFiniteGuard(level="microbatch"),
    "`rollback` must be None under DeepSpeed, got Rollback(": lambda _: NonFiniteGuard(rollback=Rollback()),
    "`trace_forward` must be False under DeepSpeed, got True": lambda _: NonFiniteGuard(trace_forward=True),
    "`deferred` must be None or False under DeepSpeed, got True": lambda _: NonFiniteGuard(deferred=True),
    '`weights` must be "reference" or "none" under DeepSpeed, got \'full\'': lambda folder: NonFiniteGuard(
        bundles=Bundles(folder, weights="full")
    ),
    "`weight` must be None under DeepSpeed, got ": lambda _: AccumulationRescaling(BatchSize()),
    "`divide` must be False under DeepSpeed, got True": lambda _: AccumulationRescaling(divide=True),
    "`log_histograms` must be False under DeepSpeed, got True": lambda _: GradientNormMonitor(log_histograms=True),
    "GradientNoiseScale must not be used with DeepSpeed": lambda _: GradientNoiseScale(),
}

CONFIGURATIONS = {
    "`gradient_clipping` must not be set in DeepSpeed's configuration beside GradientClipping, got 1.0": {"gradient_clipping": 1.0},
    "`stage` must be 1, 2 or 3 under DeepSpeed, got 0": {"zero_optimization": {"stage": 0}},
    "`offload_optimizer` must be off in DeepSpeed's configuration, got {'device': 'cpu'}": {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    },
    "`cpu_offload` must be off in DeepSpeed's configuration, got True": {"zero_optimization": {"stage": 2, "cpu_offload": True}},
    "`stage` must be 1, 2 or 3 under DeepSpeed, got 0: without ZeRO": {"zero_optimization": True},
    "`offload_param` must be off in DeepSpeed's configuration, got {'device': 'nvme'}": {
        "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}
    },
}


@pytest.fixture
def set_up(trainer, monkeypatch):
    def set_up(callback, module=None, *, precision="32-true", config=None, **options):
        fit = trainer(callback, **options)
        strategy = object.__new__(DeepSpeedStrategy)
        strategy.config = {"zero_optimization": {"stage": 2}} | (config or {})
        strategy._launcher, strategy._precision_plugin = None, Precision()
        strategy._precision_plugin.precision = precision
        monkeypatch.setattr(type(fit), "strategy", property(lambda _: strategy))
        callback.setup(fit, module or Regression(), "fit")

    return set_up


@pytest.mark.parametrize("text", REFUSED)
def test_options(set_up, tmp_path, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        set_up(REFUSED[text](tmp_path))


@pytest.mark.parametrize("text", CONFIGURATIONS)
def test_configurations(set_up, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        set_up(GradientClipping(), config=CONFIGURATIONS[text])


@pytest.mark.parametrize("precision", ["16-mixed", "16-true"])
def test_precision(set_up, precision):
    with pytest.raises(ValueError, match=f'`precision` must be "32-true", .* got "{precision}": .* Use bf16-mixed'):
        set_up(GradientClipping(), precision=precision)


def test_manual_optimization(set_up):
    module = Regression()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="`automatic_optimization` must be True under DeepSpeed .* got False"):
        set_up(NonFiniteGuard(), module)


def test_clipped_by_the_trainer_too(set_up):
    with pytest.raises(
        ValueError, match=r"`gradient_clip_val` must not be set beside GradientClipping, got Trainer\(gradient_clip_val=1.0"
    ):
        set_up(GradientClipping(), gradient_clip_val=1.0)


@pytest.mark.parametrize(
    "make",
    [
        GradientClipping,
        NonFiniteGuard,
        GradientNormMonitor,
        AccumulationRescaling,
        lambda: GradientClipping(scope="unit", norm_type="inf", clip_value=1.0),
        lambda: NonFiniteGuard(skip_above=1.0),
    ],
)
def test_the_rest_is_admitted(set_up, make):
    set_up(make())


def test_a_monitor_may_stand_beside_the_clip_of_the_engine(set_up):
    set_up(GradientNormMonitor(), config={"gradient_clipping": 1.0})


@pytest.mark.parametrize("stage", [2, 3])
def test_groups_of_equal_names_are_several(stage):
    parameters = [torch.zeros(2) for _ in range(3)]
    optimizer = torch.optim.SGD([{"params": [each], "name": name} for each, name in zip(parameters, "aab", strict=True)], lr=0.1)
    for each in parameters:  # what stage 3 keeps on a parameter
        each.ds_tensor, each.ds_numel, each.ds_shape = each, 2, (2,)
    engine, groups = object.__new__(EngineGradients), [[each] for each in parameters]
    engine._rank, engine._is_stage_3 = 0, stage == 3
    engine._optimizer = SimpleNamespace(
        param_groups=optimizer.param_groups,
        bit16_groups=groups,
        grad_start_offset=[[{}]] * 3,
        grad_partition_insertion_offset=[[{}]] * 3,
        single_partition_of_fp32_groups=parameters,
        get_param_id=id,
        fp16_groups=groups,
        sub_group_to_group_id=[0, 1, 2],
        fp32_partitioned_groups_flat=parameters,
    )
    module = SimpleNamespace(named_parameters=lambda: [(f"weight_{place}", each) for place, each in enumerate(parameters)])
    assert engine.make_table(module).groups == ("a", "a-2", "b")
