"""What a logger's own files say after a fit."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clip_callbacks import AccumulationRescaling, ClipRule, GradientClipping, GradientNormMonitor, NonFiniteGuard
from clip_callbacks.publishing.norm_monitor import NormMonitor
from clip_callbacks.publishing.publisher import Publisher
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from tests.helpers.training import GradientTape, Poisoned, Regression, TwoNetworks, data

ALWAYS = ["grad/total_norm", "grad/clipped_norm", "grad/clip_coef", "grad/max_norm", "grad/clip_fraction", "grad/skipped_steps"]
EPOCH = ["grad/total_norm_p50", "grad/total_norm_p90", "grad/total_norm_p99", "grad/clip_fraction_epoch"]


def read(logger: CSVLogger) -> pd.DataFrame:
    return pd.read_csv(Path(logger.log_dir) / "metrics.csv")


def column(frame: pd.DataFrame, key: str) -> pd.Series:
    return frame[frame[key].notna()].set_index("step")[key]


def scalars(logger: TensorBoardLogger) -> dict[str, dict[int, float]]:
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_three_four_in_both_loggers_files(trainer, tmp_path):
    csv, board = CSVLogger(tmp_path), TensorBoardLogger(tmp_path)
    trainer(GradientClipping(1.0), logger=[csv, board]).fit(GradientTape(torch.tensor([[3.0, 4.0], [0.3, 0.4]])))
    frame, tags = read(csv), scalars(board)
    assert column(frame, "grad/total_norm")[0] == 5.0
    assert column(frame, "grad/clipped_norm")[0] == pytest.approx(1.0, rel=1e-6)
    assert column(frame, "grad/clip_coef")[0] == pytest.approx(0.2, rel=1e-6)
    assert tags["grad/total_norm"] == {0: 5.0, 1: 0.5}
    assert column(frame, "grad/clip_coef")[1] == tags["grad/clip_coef"][1] == 1.0
    assert tags["grad/clip_fraction"] == {0: 1.0, 1: 0.0}


def test_every_metric_on_lightnings_own_x_axis(trainer, tmp_path):
    csv = CSVLogger(tmp_path)
    callbacks = [GradientClipping(0.5), GradientNormMonitor(), AccumulationRescaling()]
    trainer(*callbacks, logger=csv, accumulate_grad_batches=3, log_every_n_steps=2, max_epochs=3).fit(Regression(), data(10))
    frame = read(csv)
    own = column(frame, "train_loss")
    assert list(own.index) == [1, 3, 5, 7, 9, 11]
    for key in [*ALWAYS, "grad_norm/net.0", "grad_norm/net.2"]:
        assert list(column(frame, key).index) == list(own.index), key
    for key in EPOCH:
        assert list(column(frame, key).index) == [3, 7, 11], key
    assert column(frame, "grad/accumulation_scale").to_dict() == {3: 3.0, 7: 3.0, 11: 3.0}


def test_values_of_epoch_metrics(trainer, tmp_path):
    feed = torch.arange(1.0, 12.0)[:, None]
    csv = CSVLogger(tmp_path)
    trainer(GradientClipping(6.5), logger=csv).fit(GradientTape(feed))
    frame = read(csv)
    assert column(frame, "grad/total_norm_p50")[10] == 6.0
    assert column(frame, "grad/total_norm_p90")[10] == pytest.approx(10.0)
    assert column(frame, "grad/total_norm_p99")[10] == pytest.approx(10.9)
    assert column(frame, "grad/clip_fraction_epoch")[10] == pytest.approx(5 / 11)


def test_clip_fraction_covers_the_steps_since_the_last_logged_one(trainer, tmp_path):
    csv = CSVLogger(tmp_path)
    feed = torch.tensor([0.1, 2.0, 0.1, 2.0, 2.0, 2.0])[:, None]
    trainer(GradientClipping(1.0), logger=csv, log_every_n_steps=3).fit(GradientTape(feed))
    assert column(read(csv), "grad/clip_fraction").to_dict() == {2: pytest.approx(1 / 3), 5: 1.0}


def test_metrics_of_several_optimizers_carry_learning_rate_monitors_names(trainer, tmp_path):
    csv = CSVLogger(tmp_path)
    trainer(LearningRateMonitor(), GradientClipping(1.0), GradientNormMonitor(), logger=csv).fit(TwoNetworks(), data())
    frame = read(csv)
    names = {key.removeprefix("lr") for key in frame if key.startswith("lr-")}
    assert names == {key.removeprefix("grad/total_norm") for key in frame if key.startswith("grad/total_norm-")}
    assert {"grad_norm/generator-SGD", "grad_norm/discriminator-SGD-1"} <= set(frame)
    assert len(column(frame, "grad/total_norm-SGD")) == 12


def test_manual_windows_that_end_between_logging_batches_are_logged(trainer, tmp_path):
    from tests.helpers.accumulation import Manual

    csv = CSVLogger(tmp_path)
    module = Manual(torch.ones(12, 1), window=4)
    trainer(GradientClipping(1.0), logger=csv, log_every_n_steps=5).fit(module)
    assert list(column(read(csv), "grad/total_norm").index) == [4, 9]


@pytest.mark.filterwarnings("ignore:Non-finite gradients")
def test_no_nonfinite_value_reaches_a_logger(trainer, tmp_path):
    csv, board = CSVLogger(tmp_path), TensorBoardLogger(tmp_path)
    module = Poisoned({2: math.nan, 5: math.inf})
    fit = trainer(GradientClipping(None), GradientNormMonitor(), logger=[csv, board])
    fit.fit(module, data(8))
    text = (Path(csv.log_dir) / "metrics.csv").read_text()
    assert "grad/max_norm" not in text, "no limit, no metric"
    frame = read(csv)
    assert column(frame, "grad/skipped_steps").to_dict() == {0: 0, 1: 0, 2: 1, 3: 1, 4: 1, 5: 2, 6: 2, 7: 2}
    assert list(column(frame, "grad/total_norm").index) == [0, 1, 3, 4, 6, 7]
    ours = {tag: values for tag, values in scalars(board).items() if tag.startswith("grad")}
    assert all(math.isfinite(value) for values in ours.values() for value in values.values())
    assert all(math.isfinite(value) for key, value in fit.callback_metrics.items() if key.startswith("grad"))


def test_model_checkpoint_and_early_stopping_monitor_them(trainer, tmp_path):
    checkpoint = ModelCheckpoint(
        tmp_path / "best", monitor="grad/total_norm", filename="{step}-{grad/total_norm:.1f}", every_n_train_steps=1, save_top_k=2,
        auto_insert_metric_name=False,
    )  # fmt: skip
    stopping = EarlyStopping("grad/total_norm_p50", mode="min", patience=0)
    fit = trainer(stopping, checkpoint, GradientClipping(1.0), enable_checkpointing=True, log_every_n_steps=50, max_epochs=5)
    fit.fit(GradientTape(torch.tensor([5.0, 1.0, 4.0, 2.0])[:, None]))
    assert fit.current_epoch < 5, "p50 does not fall: stopped"
    assert {float(value) for value in checkpoint.best_k_models.values()} == {1.0}
    assert checkpoint.best_model_score == 1.0


def test_metrics_are_current_in_validation_inside_an_epoch(trainer, tmp_path):
    seen = []

    class Looking(Regression):
        def on_validation_epoch_end(self):
            if not self.trainer.sanity_checking:
                seen.append((self.trainer.global_step, float(self.trainer.callback_metrics["grad/total_norm"])))

    csv = CSVLogger(tmp_path)
    callback = GradientClipping(1.0)
    fit = trainer(callback, logger=csv, val_check_interval=3, log_every_n_steps=50, num_sanity_val_steps=1)
    fit.fit(Looking(), data(9), data(2))
    assert [step for step, _ in seen] == [3, 6, 9]
    assert seen[-1][1] == float(callback.last_report.total_norm)
    assert len({norm for _, norm in seen}) == 3


@pytest.mark.parametrize("max_norm", [1e6, 1e-6])
@pytest.mark.parametrize("members", [(), (GradientNormMonitor,)])
def test_a_step_is_recorded_and_published_in_few_calls_of_python(trainer, monkeypatch, max_norm, members):
    """Each costs a microsecond or two between a backward pass and the next one, and the hooks of a step are made of them."""
    counts = {"record": [], "end_batch": [], "end_step": []}

    def counted(kind, name):
        function = getattr(kind, name)

        def run(*arguments, **options):
            calls = 0

            def count(_, event, __):
                nonlocal calls
                calls += event == "call"

            before = sys.getprofile()
            sys.setprofile(count)
            try:
                return function(*arguments, **options)
            finally:
                sys.setprofile(before)
                counts[name].append(calls)

        monkeypatch.setattr(kind, name, run)

    counted(OptimizerContext, "record")
    counted(NormMonitor, "end_step")
    counted(Publisher, "end_batch")
    trainer(GradientClipping(max_norm), *(make() for make in members), log_every_n_steps=50).fit(Regression(), data(12))
    assert counts["record"][1:] == [3] * 11
    assert counts["end_batch"][1:] == [5] * 11
    assert counts["end_step"][1:] == [4] * (11 * len(members))


class StoppingAt(Callback):
    """Asks for the end of training in a batch."""

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        trainer.should_stop = batch_idx == self.batch


@pytest.mark.parametrize(
    "options",
    [
        {"log_every_n_steps": 1},
        {"log_every_n_steps": 3, "max_epochs": 2},
        {"log_every_n_steps": 2, "accumulate_grad_batches": 3},
        {"log_every_n_steps": 0},
        {"log_every_n_steps": 50},
        {"fast_dev_run": 3, "log_every_n_steps": 50},
        {"log_every_n_steps": 2, "val_check_interval": 3},
    ],
)
@pytest.mark.parametrize("stop", [None, 4])
def test_logging_steps_are_those_of_lightning(trainer, monkeypatch, options, stop):
    """Which answers the same question in a property of its own, that takes long."""
    ours, theirs = [], []
    answer = Publisher.batches_before_log.fget

    def compared(publisher):
        found = answer(publisher)
        ours.append(found == 0)
        theirs.append(bool(publisher._trainer._logger_connector.should_update_logs or publisher._trainer.fast_dev_run))
        return found

    monkeypatch.setattr(Publisher, "batches_before_log", property(compared))
    callbacks = [GradientClipping(1.0), GradientNormMonitor(), StoppingAt(stop)]
    trainer(*callbacks, min_epochs=2, **options).fit(Regression(), data(8), data(2))
    assert ours == theirs
    assert len(ours) >= 4


@pytest.mark.parametrize(
    "options",
    [
        {"logger": False},
        {"barebones": True},
        {"fast_dev_run": 2},
        {"logger": True},
        {"log_every_n_steps": 0, "logger": True},
        {"overfit_batches": 1, "logger": True},
    ],
    ids=str,
)
def test_quiet_and_working_everywhere(trainer, options, recwarn):
    callbacks = [GradientClipping(0.5), NonFiniteGuard(), AccumulationRescaling(), GradientNormMonitor()]
    module = Regression()
    trainer(*callbacks, **options).fit(module, data(4))
    assert callbacks[0].last_report.total_norm > 0
    assert [w for w in recwarn if "grad" in str(w.message)] == []


def test_monitor_every_n_steps_and_scope(trainer, tmp_path):
    csv = CSVLogger(tmp_path)
    monitors = [GradientNormMonitor("parameter", every_n_steps=3), GradientNormMonitor("global")]
    trainer(*monitors, logger=csv).fit(Regression(), data(9))
    frame = read(csv)
    assert list(column(frame, "grad_norm/net.0.weight").index) == [2, 5, 8]
    assert list(column(frame, "grad_norm/global").index) == list(range(9))
    assert column(frame, "grad_norm/global").tolist() == column(frame, "grad/total_norm").tolist()


def test_monitor_changes_nothing_and_suggests_a_threshold(trainer, said):
    monitor = GradientNormMonitor()
    trainer(monitor).fit(GradientTape(torch.arange(1.0, 12.0)[:, None]))
    advice = monitor.advice()
    assert advice.max_norm == 10.0
    assert said[1:] == [f"GradientNormMonitor: {advice.describe()}"]
    assert "max_norm=10 for the norm of all gradients would have clipped 9.1% of 11 steps" in said[1]
    assert "p50 6, p90 10, p99 10.9, largest 11" in said[1]


def test_the_monitor_and_the_log_of_every_step_give_the_same_advice(trainer, tmp_path):
    from clip_callbacks.html_report.page import make_sections
    from clip_callbacks.html_report.sources import read_runs

    csv, monitor = CSVLogger(tmp_path), GradientNormMonitor()
    trainer(monitor, GradientClipping(0.5), logger=csv, max_epochs=5).fit(Regression(), data(20))
    (section,) = make_sections(read_runs([csv.log_dir])[0], ())
    assert section.advice == monitor.advice()


def test_local_scope_metrics_follow_their_definition(trainer, tmp_path):
    csv = CSVLogger(tmp_path)
    clipping = GradientClipping(rules=[ClipRule(2.0), ClipRule(0.3, scope="layer")])
    trainer(clipping, logger=csv).fit(Regression(), data(6))
    frame = read(csv)
    ratio = column(frame, "grad/clipped_norm") / column(frame, "grad/total_norm")
    assert column(frame, "grad/clip_coef").tolist() == pytest.approx(ratio.tolist(), rel=1e-6)


def test_percentiles_without_a_guard_take_finite_steps_only(trainer):
    from tests.helpers.training import scaled

    monitor = GradientNormMonitor()
    fit = trainer(monitor, **scaled(init_scale=2.0**30))
    fit.fit(Regression(torch.optim.AdamW, lr=0.01), data(24, size=1.0))
    assert 0 < fit.callback_metrics["grad/total_norm_p99"] < 100
    assert 0 < monitor.advice().max_norm < 100


@pytest.mark.parametrize("feed", [[1e-3, 1e40], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 1e40]])
def test_huge_norms_do_not_break_the_end_of_a_run(trainer, feed):
    monitor = GradientNormMonitor()
    trainer(monitor, precision="64-true").fit(GradientTape(torch.tensor(feed, dtype=torch.float64)[:, None]))
    assert math.isfinite(monitor.advice().max_norm)


def test_a_monitor_of_zero_gradients_suggests_nothing(trainer, said):
    monitor = GradientNormMonitor()
    trainer(monitor).fit(GradientTape(torch.zeros(3, 1)))
    assert monitor.advice() is None
    assert said[1:] == []


def test_callback_metrics_are_of_the_last_step(trainer, tmp_path):
    callbacks = [GradientClipping(1.0), AccumulationRescaling()]
    fit = trainer(*callbacks, accumulate_grad_batches=2, max_epochs=2, limit_train_batches=5)
    seen = []
    module = GradientTape(torch.tensor([10.0, 0.1, 0.1, 0.1, 0.1])[:, None])
    module.on_train_batch_end = lambda *_: seen.append(float(fit.callback_metrics.get("grad/accumulation_scale", -1)))
    fit.fit(module)
    assert seen == [-1, 1, 1, 1, 2, 2, 1, 1, 1, 2]
    assert fit.callback_metrics["grad/clip_fraction"] == 0.0, "since the last logging step, without a logger too"


def test_without_clipping_nothing_is_said_of_it(trainer, tmp_path):
    csv = CSVLogger(tmp_path)
    trainer(GradientNormMonitor(), logger=csv, gradient_clip_val=0.01).fit(Regression(), data(3))
    frame = read(csv)
    assert "grad/total_norm" in frame
    assert not {"grad/clip_coef", "grad/clipped_norm", "grad/clip_fraction", "grad/clip_fraction_epoch"} & set(frame)


def test_a_second_fit_begins_anew(trainer, tmp_path):
    monitor = GradientNormMonitor(every_n_steps=2)
    for run in ("a", "b"):
        csv = CSVLogger(tmp_path, version=run)
        trainer(monitor, logger=csv).fit(Regression(), data(8))
        assert list(column(read(csv), "grad_norm/net.0").index) == [1, 3, 5, 7]
    assert monitor.state_dict()["norms"][0].shape == (8,)
