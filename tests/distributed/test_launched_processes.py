"""ddp_spawn, ddp_fork, ddp_notebook: what callbacks have counted is there in the process that called fit."""

from __future__ import annotations

import gc
import math
import os
import pickle
import warnings
from copy import deepcopy

import pytest
import torch
from torch.utils.data import DataLoader

from clip_callbacks import FaultInjection, GradientClipping, GradientNormMonitor, NonFiniteGuard, ZScoreLimit
from tests.helpers import forked
from tests.helpers.training import Regression
from tests.helpers.twins import QUIET, TWINS, regression

pytestmark = pytest.mark.timeout(240)


def batches():
    generator = torch.Generator().manual_seed(0)
    pairs = [[torch.randn(8, size, generator=generator) for size in (4, 1)] for _ in range(8)]
    pairs[3][0].fill_(math.nan)
    return DataLoader(pairs, batch_size=None)


def fit(strategy, package, path):
    """What the callbacks of this process know after a fit in two others."""
    guard, clipping, monitor = NonFiniteGuard(), GradientClipping(ZScoreLimit(warmup=2)), GradientNormMonitor()
    faults = FaultInjection("nan", step=5, rank=1)
    twin = deepcopy(guard)
    warnings.simplefilter("ignore")
    os.environ["CLIP_CALLBACKS_INJECT"] = "1"
    trainer = TWINS[package].Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        use_distributed_sampler=False,
        max_epochs=1,
        logger=False,
        callbacks=[faults, guard, clipping, monitor],
        **dict.fromkeys(QUIET, False),
    )
    module = Regression()  # one that can be pickled
    if package != "lightning":
        module = regression(TWINS[package])
    trainer.fit(module, batches())
    report = clipping.last_report
    found = {
        "skipped": [guard.skipped_steps, guard.skipped_steps_of(0), clipping.skipped_steps, monitor.skipped_steps],
        "twin": [twin.skipped_steps, twin.last_report],
        "injected": faults.injected,
        "outcome": report.outcome.value,
        "total_norm": float(report.total_norm),
        "names": list(report.names),
        "limit": clipping.state_dict()["limits"][0]["rule_1"]["state"]["count"].tolist(),
        "steps": guard.state_dict()["history"][0]["steps"],
        "advice": monitor.advice() is not None,
        "keys": [guard.state_key, clipping.state_key],
    }
    torch.save(found, path)


@pytest.mark.parametrize(
    ("strategy", "package"),
    [
        ("ddp_fork", "lightning"),
        pytest.param("ddp_fork", "pytorch_lightning", marks=pytest.mark.slow),
        pytest.param("ddp_notebook", "lightning", marks=pytest.mark.slow),
        pytest.param("ddp_spawn", "lightning", marks=pytest.mark.slow),
    ],
)
def test_counts_and_reports_come_home(tmp_path, strategy, package):
    process = forked.start(fit, strategy, package, tmp_path / "found")
    process.join()
    assert process.exitcode == 0
    found = torch.load(tmp_path / "found", weights_only=False)
    assert found["skipped"] == [2] * 4
    assert found["twin"] == [0, None], "a copy is another callback"
    assert found["injected"] == [], "rank 0 was not struck"
    assert found["outcome"] == "taken"
    assert 0 < found["total_norm"] < math.inf
    assert found["names"] == ["global"]
    assert found["limit"] == [6]
    assert found["steps"] == 8
    assert found["advice"]
    assert found["keys"] == ["NonFiniteGuard", "GradientClipping"]


def test_what_comes_home_to_nobody_is_dropped():
    """The callback of the main process is no more, or it is a module's own, made in the launched process."""

    class Launcher:
        def get_extra_results(self, trainer):
            return {"callback_metrics_bytes": b""}

    class Strategy:
        launcher = Launcher()

    class Trainer:
        strategy = Strategy()

    guard = NonFiniteGuard()
    guard._return_results_of(Trainer)
    sent = pickle.dumps(Strategy.launcher.get_extra_results(Trainer))
    assert len(pickle.loads(sent)) == 2
    guard.load_state_dict(guard.state_dict() | {"counters": {0: {"skipped": 3}}})
    pickle.loads(sent)
    assert guard.skipped_steps == 0, "it has what its copy had"
    del guard, Strategy.launcher
    gc.collect()
    pickle.loads(sent)
