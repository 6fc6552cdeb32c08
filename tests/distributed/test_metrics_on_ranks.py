"""Metrics of several ranks."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from clip_callbacks import (
    GradientClipping,
    GradientNormMonitor,
)
from tests.helpers import parallel
from tests.helpers.agreement import is_variant
from tests.helpers.layouts import layout_of
from tests.helpers.matrix import matrix
from tests.helpers.monitoring import moved
from tests.helpers.ranks import RanksFailedError
from tests.helpers.training import (
    assert_same_bits,
)
from tests.helpers.twins import QUIET, TWINS, regression


@matrix(
    lambda _name, scope, p: (scope == "layer") == (p == 2.0),
    slow=is_variant,
    name=["ddp", "fsdp2", "fsdp2_offload", "fsdp1", "tp"],
    scope=["layer", "parameter"],
    norm_type=[2.0, math.inf, 1.0],
)
def test_update_ratios_are_those_of_one_process(run, name, scope, norm_type):
    first, second = run(name, scope, norm_type, function=moved)
    assert first == second
    single = moved("single", scope, norm_type)
    keys = [key for key in single if key.startswith("update_ratio/")]
    assert len(keys) == (4 if scope == "layer" else 8)
    for key in keys:
        assert first[key] == pytest.approx(single[key], rel=1e-3), key
    assert first.keys() == single.keys()


def of_shards(name):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        parallel.result(name, GradientNormMonitor(log_histograms=True), logger=TensorBoardLogger(folder), steps=2)


@pytest.mark.parametrize("name", ["fsdp2", "tp"])
def test_histograms_of_shards_are_refused(run, name):
    with pytest.raises(
        RanksFailedError, match="`log_histograms` must be False where ranks hold parts .*, got True with ModelParallel"
    ):
        run(name, function=of_shards)


def test_histograms_under_ddp_are_written_once(run):
    run("ddp", function=of_shards)


pytestmark = pytest.mark.filterwarnings(
    "ignore:Non-finite gradients:RuntimeWarning",
    "ignore:The ``noload`` loader strategy is deprecated",  # MLflow's, to SQLAlchemy
    "ignore:html5lib's sanitizer is deprecated:DeprecationWarning",  # TensorBoard's, to itself
)


def test_one_of_two_ranks_writes_the_layout(run, tmp_path):
    run("ddp", GradientClipping(1.0), logger=TensorBoardLogger(tmp_path), steps=3)
    assert len([*tmp_path.rglob("events.*")]) == 1
    assert list(layout_of(tmp_path)) == ["Gradients"]


def sharded(name):
    """A network in shards under FSDP, which Lightning's strategy would put on a GPU."""
    package = TWINS[name]

    class CpuFsdp(package.strategies.FSDPStrategy):
        _setup_model = parallel.CpuFsdp._setup_model

    clipping, module = GradientClipping(0.5), regression(package)
    strategy = CpuFsdp(process_group_backend="gloo", auto_wrap_policy={nn.Linear}, use_orig_params=True)
    options = {"devices": 2, "max_epochs": 1, "logger": False} | dict.fromkeys(QUIET, False)
    trainer = package.Trainer(accelerator="cpu", strategy=strategy, callbacks=[clipping], **options)
    models = []
    module.on_train_end = lambda: models.append(trainer.strategy.model)
    trainer.fit(module, torch.utils.data.DataLoader(parallel.rows(4), batch_size=4))
    return float(trainer.callback_metrics["grad/total_norm"]), parallel.whole(module, models[0])


def test_shards_are_seen_under_both_names(two_ranks):
    """Each rank's norm of its own shards would differ."""
    ours, theirs = (two_ranks.run(sharded, name) for name in TWINS)
    assert ours[0][0] == ours[1][0] == theirs[0][0] == theirs[1][0]
    assert_same_bits(ours[0][1], theirs[1][1])
