"""What several ranks log, how many collectives that takes, and checkpoints between numbers of ranks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from clip_callbacks import (
    AccumulationRescaling,
    GradientClipping,
    GradientNormMonitor,
    NonFiniteGuard,
)
from tests.helpers import parallel
from tests.helpers.agreement import CARRIES, DIVIDED, DROPS_MICRO_BATCHES, assert_one_answer, reports
from tests.helpers.laws import ADAPTIVE
from tests.helpers.matrix import matrix
from tests.helpers.parallel import STRATEGIES
from tests.helpers.training import numbers

pytestmark = pytest.mark.filterwarnings(
    "ignore:Non-finite"
)  # of the single process; those of ranks are looked at where they matter


# What is logged


def warnings_of(name, folder):
    from lightning.pytorch.loggers import CSVLogger

    family = [GradientClipping(0.5), NonFiniteGuard(), AccumulationRescaling(), GradientNormMonitor()]
    found = reports(name, *family, logger=CSVLogger(folder), accumulate_grad_batches=2, steps=6, log_every_n_steps=2)
    return [message for message in found if "sync_dist" in message or "grad/" in message]


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "tp"])
def test_metrics_are_logged_without_a_warning(run, name, tmp_path):
    assert run(name, tmp_path, function=warnings_of) == [[], []]
    (log,) = tmp_path.rglob("metrics.csv")
    assert log.read_text().count("\n") > 3


# How many collectives


def counted(name, *callbacks, **options):
    """Collectives of each step's pass, counted by torch."""
    from tests.helpers.collectives import counting

    counted, counts = counting(callbacks)
    parallel.result(name, *counted, **options)
    return counts


@pytest.mark.parametrize(("name", "expected"), parallel.COLLECTIVES.items())
def test_collectives_of_a_step(run, name, expected):
    family = [
        GradientClipping(0.5, scope="layer"), NonFiniteGuard(), AccumulationRescaling(),
        GradientNormMonitor(), GradientNormMonitor(scope="parameter"),
    ]  # fmt: skip
    for counts in run(name, *family, function=counted, steps=4):
        assert counts == [expected] * 4


def test_the_page_says_what_was_tested():
    page = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in page.splitlines() if line.startswith("| `")]
    table = {row[0].strip("`"): row[1:] for row in rows if len(row) == 5}
    assert list(table) == [name for name in STRATEGIES if name in DIVIDED]
    for name, (_, collectives, micro_batches, rides) in table.items():
        assert int(collectives) == parallel.COLLECTIVES[name]
        assert micro_batches == ("dropped by all ranks" if name in DROPS_MICRO_BATCHES else "refused")
        assert rides.startswith("yes" if name in CARRIES else "no")


# Checkpoints


def saved(name, folder, *callbacks, **options):
    found = parallel.train(name, *callbacks, **options)
    found["trainer"].save_checkpoint(folder / "half.ckpt")
    return True


def resumed(name, folder, *callbacks, **options):
    found = parallel.train(name, *callbacks, ckpt_path=folder / "half.ckpt", **options)
    return {key: found[key] for key in ("weights", "norms", "coefficients")} | {
        "states": [numbers(member.state_dict()) for member in found["members"]]
    }


def stateful():
    return [GradientClipping(ADAPTIVE), NonFiniteGuard()]


BEFORE = {"fsdp2_1": ["fsdp2"], "fsdp2": ["fsdp2"], "fsdp2_4": ["fsdp2"], "single": ["fsdp2", "ddp"], "ddp": ["fsdp2", "ddp"]}


@matrix(
    lambda before, after, is_distributed: before in BEFORE[after] and (not is_distributed or after.startswith("fsdp2")),
    before=["fsdp2", "ddp"],
    after=list(BEFORE),
    is_distributed=[False, True],
)
def test_a_run_saved_on_two_ranks_resumes_on_one_and_on_four(run, tmp_path, before, after, is_distributed):
    """Lightning reads a checkpoint folder by the strategy that wrote it, a single file by all but that one."""
    options = {"max_epochs": 2, "steps": 6, "poison": {(0, 3): math.nan}, "lr": 0.02, "momentum": 0.9}
    whole = parallel.result("single", *stateful(), **options)
    kept = {} if before == "ddp" else {"save_distributed_checkpoint": is_distributed}
    run(before, tmp_path, *stateful(), **options | {"max_epochs": 1}, function=saved, strategy_options=kept)
    assert (tmp_path / "half.ckpt").is_dir() is is_distributed
    options["poison"] = {}
    if after == "single":
        ours = resumed(after, tmp_path, *stateful(), **options)
    else:
        ours = assert_one_answer(run(after, tmp_path, *stateful(), **options, function=resumed))
    torch.testing.assert_close(ours["weights"], whole["weights"])
    torch.testing.assert_close(torch.tensor(ours["norms"]), torch.tensor(whole["norms"][6:]))
    assert ours["states"][1]["counters"][0]["skipped"] == 1
    assert ours["states"][0]["history"][0]["steps"] == 12
