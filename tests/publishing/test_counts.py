"""Everything that is counted is logged at the end of each epoch, however short it is."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clip_callbacks import ClipRule, GradientClipping, NonFiniteGradientError, NonFiniteGuard, Rollback
from tests.helpers.training import SAFELY, GradientTape, Poisoned, TwoNetworks, data, scaled

pytestmark = pytest.mark.filterwarnings(
    "ignore:Non-finite gradients", "ignore:Detected call of `lr_scheduler.step", "ignore:.*`optimizer.step"
)


class Logging(Poisoned):
    """Logs a mean over the epoch, for the steps at which Lightning logs such a thing."""

    def training_step(self, batch, batch_idx):
        self.log("own", 1.0, on_step=False, on_epoch=True)
        return self.loss(batch, batch_idx)


def logged(logger: CSVLogger, key: str) -> list[tuple[int, float]]:
    """The points of a metric, in the order in which they were logged."""
    frame = pd.read_csv(Path(logger.log_dir) / "metrics.csv")
    return [(int(step), value) for step, value in zip(frame["step"], frame[key], strict=True) if not math.isnan(value)]


def test_a_short_epoch_shows_skipped_steps_in_every_logger(trainer, tmp_path):
    csv, board = CSVLogger(tmp_path), TensorBoardLogger(tmp_path)
    fit = trainer(GradientClipping(1.0), logger=[csv, board], log_every_n_steps=50, max_epochs=3)
    fit.fit(Logging({1: math.nan, 6: math.inf}), data(4))
    assert logged(csv, "grad/skipped_steps") == [(3, 1.0), (7, 2.0), (11, 2.0)]
    assert [step for step, _ in logged(csv, "own")] == [3, 7, 11], "Lightning's own x-axis"
    events = EventAccumulator(board.log_dir)
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("grad/skipped_steps")] == [(3, 1.0), (7, 2.0), (11, 2.0)]
    assert fit.callback_metrics["grad/skipped_steps"] == 2


def test_an_epoch_that_ends_with_a_logging_step_has_each_count_once(trainer, tmp_path):
    csv = CSVLogger(tmp_path)
    trainer(GradientClipping(1.0), logger=csv, log_every_n_steps=2, max_epochs=2).fit(Poisoned({4: math.nan}), data(5))
    assert logged(csv, "grad/skipped_steps") == [(1, 0.0), (3, 0.0), (4, 1.0), (5, 1.0), (7, 1.0), (9, 1.0)]


def test_a_run_that_bad_steps_end_has_all_of_them(trainer, tmp_path):
    csv = CSVLogger(tmp_path)
    with pytest.raises(NonFiniteGradientError):
        trainer(NonFiniteGuard(max_consecutive=3), logger=csv, log_every_n_steps=50).fit(
            Poisoned(dict.fromkeys((1, 4, 5, 6), math.nan)), data(9)
        )
    assert logged(csv, "grad/skipped_steps") == [(6, 4.0)]


def test_a_logger_that_fails_is_the_error_that_is_seen(trainer, tmp_path):
    class Full(CSVLogger):
        def log_metrics(self, metrics, step=None):
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        trainer(GradientClipping(1.0), logger=Full(tmp_path), log_every_n_steps=2).fit(Poisoned({0: math.nan}), data(4))


def test_an_epoch_without_a_good_step_has_counts(trainer, tmp_path):
    csv = CSVLogger(tmp_path)
    module = Poisoned({0: math.nan, 1: math.nan, 4: None, 5: None})
    trainer(NonFiniteGuard(), logger=csv, log_every_n_steps=50, max_epochs=3).fit(module, data(2))
    assert logged(csv, "grad/skipped_steps") == [(1, 2.0), (3, 2.0), (5, 2.0)]
    assert [step for step, _ in logged(csv, "grad/total_norm_p50")] == [3]


@pytest.mark.parametrize(
    ("guard", "module", "options", "counts"),
    [
        (NonFiniteGuard("zero"), Poisoned({1: math.inf}), {}, {"zeroed_steps": 1, "skipped_steps": 0}),
        (
            NonFiniteGuard(level="microbatch"),
            Poisoned({1: math.nan, 4: math.nan}),
            {"accumulate_grad_batches": 3},
            {"dropped_micro_batches": 2, "skipped_steps": 0},
        ),
        (
            NonFiniteGuard(max_consecutive=2, rollback=Rollback(every_n_steps=1)),
            Poisoned({2: math.nan, 3: math.nan}),
            {},
            {"rollbacks": 1, "skipped_steps": 2},
        ),
        (
            NonFiniteGuard(deferred=True),
            Poisoned({5: math.nan}, optimizer=torch.optim.AdamW, fused=True),
            {},
            {"skipped_steps": 1},
        ),
        (NonFiniteGuard(), Poisoned({}), scaled(init_scale=2.0**30), {"overflowed_steps": 1, "skipped_steps": 0}),
    ],
    ids=["zeroed", "dropped", "rolled back", "decided on the device", "overflowed"],
)
def test_what_can_be_counted_is(trainer, tmp_path, guard, module, options, counts):
    csv = CSVLogger(tmp_path)
    fit = trainer(guard, logger=csv, log_every_n_steps=50, **options)
    fit.fit(module, data(6))
    if "overflowed_steps" in counts:
        counts = counts | {"overflowed_steps": guard.overflowed_steps}
        assert guard.overflowed_steps > 0
    for name, count in counts.items():
        assert [value for _, value in logged(csv, f"grad/{name}")] == [count], name
        assert fit.callback_metrics[f"grad/{name}"] == count == getattr(guard, name)
    header = (Path(csv.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    others = {"zeroed_steps", "dropped_micro_batches", "rollbacks", "overflowed_steps"} - counts.keys()
    assert not {f"grad/{name}" for name in others} & set(header), "nothing is said of what cannot be"


def test_each_optimizer_counts_under_its_own_name(trainer, tmp_path):
    csv = CSVLogger(tmp_path)
    module = TwoNetworks({1: math.nan})
    trainer(GradientClipping(1.0), NonFiniteGuard(), logger=csv, log_every_n_steps=50, max_epochs=2).fit(module, data(3))
    assert logged(csv, "grad/skipped_steps-SGD") == [(2, 1.0), (5, 2.0)]
    assert logged(csv, "grad/skipped_steps-SGD-1") == [(2, 0.0), (5, 0.0)]


def test_the_epochs_clip_fraction_of_each_rule(trainer, tmp_path):
    csv = CSVLogger(tmp_path)
    rules = [ClipRule(4.5, name="high"), ClipRule(1.5, name="low")]
    trainer(GradientClipping(rules=rules), logger=csv, log_every_n_steps=50, max_epochs=2).fit(
        GradientTape(torch.arange(1.0, 6.0)[:, None])
    )
    assert logged(csv, "grad/high/clip_fraction_epoch") == [(4, 0.2), (9, 0.2)]
    assert logged(csv, "grad/low/clip_fraction_epoch") == [(4, 0.8), (9, 0.8)]


def test_a_resumed_run_goes_on_counting(trainer, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="in_mid_epoch", every_n_train_steps=6)
    trainer(checkpoint, NonFiniteGuard(), enable_checkpointing=True, max_epochs=2).fit(
        Poisoned({1: math.nan, 5: math.nan}), data(4)
    )

    csv = CSVLogger(tmp_path)
    again = ModelCheckpoint(tmp_path, filename="in_mid_epoch", every_n_train_steps=6)
    fit = trainer(again, NonFiniteGuard(), logger=csv, enable_checkpointing=True, log_every_n_steps=50, max_epochs=3)
    fit.fit(Poisoned({7: math.nan}), data(4), ckpt_path=checkpoint.best_model_path, **SAFELY)
    assert logged(csv, "grad/skipped_steps") == [(7, 3.0), (11, 3.0)]
    assert fit.callback_metrics["grad/skipped_steps"] == 3
