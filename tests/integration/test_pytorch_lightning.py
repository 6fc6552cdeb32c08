"""Trainer and CLI of ``pytorch_lightning``: what ``lightning.pytorch`` is under its other name, with classes of its own."""

from __future__ import annotations

import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clip_callbacks import AccumulationRescaling, GradientClipping, GradientNoiseScale, GradientNormMonitor, NonFiniteGuard
from clip_callbacks.trainer import compat
from clip_callbacks.trainer.compat import DEEPSPEED, GRADIENT_ACCUMULATION_SCHEDULER, is_instance
from tests.helpers.training import assert_same_bits, data, numbers, weights
from tests.helpers.twins import QUIET, TWINS, regression


def make_trainer(package, tmp_path, *callbacks, **options):
    options = {"max_epochs": 1, "logger": False, "log_every_n_steps": 1} | dict.fromkeys(QUIET, False) | options
    return package.Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), default_root_dir=tmp_path, **options)


def family():
    monitor = GradientNormMonitor(log_histograms=True, log_update_ratio=True)
    return [AccumulationRescaling(), GradientClipping(1.0), NonFiniteGuard(), monitor]


@pytest.mark.filterwarnings("ignore:Non-finite")
def test_the_whole_family_does_the_same_under_both_names(tmp_path):
    found = {}
    for name, package in TWINS.items():
        logger = package.loggers.TensorBoardLogger(tmp_path / name)
        trainer = make_trainer(package, tmp_path, *family(), logger=logger, accumulate_grad_batches=2)
        module = regression(package, poisoned={4})
        trainer.fit(module, data(13))
        found[name] = trainer, module, EventAccumulator(logger.log_dir).Reload()
    (ours, module, events), (theirs, twin, others) = found.values()
    assert_same_bits(weights(module), weights(twin))
    assert sum(callback.skipped_steps for callback in theirs.callbacks if isinstance(callback, NonFiniteGuard)) == 1
    metrics = [{key: float(it) for key, it in trainer.callback_metrics.items()} for trainer in (ours, theirs)]
    assert metrics[0] == metrics[1]
    assert metrics[0]["grad/skipped_steps"] == 1
    assert events.Tags()["scalars"] == others.Tags()["scalars"]
    assert events.Tags()["histograms"] == others.Tags()["histograms"] != []
    assert "custom_scalars__config__" in others.Tags()["tensors"]
    assert [it.value for it in events.Scalars("grad/clipped_norm")] == [it.value for it in others.Scalars("grad/clipped_norm")]


@pytest.mark.parametrize("name", TWINS)
def test_a_second_base_keeps_its_hooks_whichever_lightning_it_is_of(tmp_path, name):
    """The hooks of the other Lightning's Callback, which do nothing, do not come before them."""
    package, told = TWINS[name], []

    class Tells(package.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            told.append("epoch")

    class Both(NonFiniteGuard, Tells):
        pass

    make_trainer(package, tmp_path, both := Both()).fit(regression(package), data(1))
    assert told == ["epoch"]
    assert both.last_report is not None
    assert all(isinstance(both, other.Callback) for other in TWINS.values())


@pytest.mark.parametrize("saved_by", TWINS)
def test_a_checkpoint_goes_on_under_either_name(tmp_path, saved_by):
    """Limits' states, counters and histories."""
    first = make_trainer(TWINS[saved_by], tmp_path, *family()[1:3])
    first.fit(regression(TWINS[saved_by]), data(6))
    first.save_checkpoint(tmp_path / "half.ckpt")
    ends = {}
    for name, package in TWINS.items():
        trainer = make_trainer(package, tmp_path, *family()[1:3], max_epochs=2)
        module = regression(package)
        trainer.fit(module, data(6), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
        ends[name] = weights(module), [numbers(callback.state_dict()) for callback in trainer.callbacks]
    assert_same_bits(ends["lightning"][0], ends["pytorch_lightning"][0])
    torch.testing.assert_close(ends["lightning"][1], ends["pytorch_lightning"][1], rtol=0, atol=0)


def test_refusals_and_warnings_know_the_other_name(tmp_path, monkeypatch):
    def fit(*callbacks, module=None, **options):
        trainer = make_trainer(pytorch_lightning, tmp_path, *callbacks, **options)
        trainer.fit(module or regression(pytorch_lightning), data(4))

    with pytest.raises(ValueError, match="`gradient_clip_val` must not be set"):
        fit(GradientClipping(1.0), gradient_clip_val=1.0)
    clips_itself = regression(pytorch_lightning)
    type(clips_itself).configure_gradient_clipping = lambda *_: None
    with pytest.raises(ValueError, match="`configure_gradient_clipping` must not be overridden"):
        fit(GradientClipping(1.0), module=clips_itself)
    with pytest.raises(ValueError, match="got True with CSVLogger"):
        fit(GradientNormMonitor(log_histograms=True), logger=pytorch_lightning.loggers.CSVLogger(tmp_path))
    with pytest.warns(UserWarning, match="GradientNoiseScale needs accumulation windows"):
        fit(GradientNoiseScale())
    fit(GradientNoiseScale(), pytorch_lightning.callbacks.GradientAccumulationScheduler({0: 2}))


def test_deepspeed_by_its_other_name(tmp_path, monkeypatch):
    # DeepSpeed is not at hand: the strategy object is real, but never set up
    guard = NonFiniteGuard("warn")
    trainer = make_trainer(pytorch_lightning, tmp_path, guard)
    monkeypatch.setattr(
        type(trainer), "strategy", property(lambda _: object.__new__(pytorch_lightning.strategies.DeepSpeedStrategy))
    )
    with pytest.raises(ValueError, match='`policy` must be "skip", "raise" or "zero" under DeepSpeed, got \'warn\''):
        guard.setup(trainer, regression(pytorch_lightning), "fit")


def test_twins_are_known_by_class_and_not_by_name():
    assert is_instance(pytorch_lightning.callbacks.GradientAccumulationScheduler({0: 2}), GRADIENT_ACCUMULATION_SCHEDULER)
    assert is_instance(GradientAccumulationScheduler({0: 2}), GRADIENT_ACCUMULATION_SCHEDULER)
    assert not is_instance(pytorch_lightning.Callback(), GRADIENT_ACCUMULATION_SCHEDULER)
    assert not is_instance(type("DeepSpeedStrategy", (), {})(), DEEPSPEED)


def test_every_class_that_is_asked_for_is_there():
    """In the newest Lightning; a name with a slip in it would be a class that nothing is of."""
    asked = {name: kind for name, kind in vars(compat).items() if isinstance(kind, compat.LightningClass)}
    assert len(asked) > 10
    assert {name for name, kind in asked.items() if len(kind.classes) < 2} <= {"WEIGHT_AVERAGING"}
    assert compat.WEIGHT_AVERAGING.classes or not hasattr(pytorch_lightning.callbacks, "WeightAveraging")


def parse(*arguments):
    from pytorch_lightning.cli import LightningCLI
    from pytorch_lightning.demos.boring_classes import BoringModel

    quiet = ["--trainer.accelerator=cpu", *(f"--trainer.{option}=false" for option in (*QUIET, "logger")), "--trainer.max_steps=3"]
    return LightningCLI(BoringModel, run=False, save_config_callback=None, args=[*arguments, *quiet])


@pytest.mark.parametrize(
    "arguments",
    [
        ("--trainer.callbacks+=GradientClipping", "--trainer.callbacks.max_norm=0.5"),
        ("--trainer.callbacks+=clip_callbacks.GradientClipping", "--trainer.callbacks.max_norm=0.5"),
    ],
    ids=["short name", "class path"],
)
def test_its_command_line(arguments):
    cli = parse(*arguments)
    cli.trainer.fit(cli.model)
    (clipping,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, GradientClipping)]
    assert clipping.last_report.clipped_norm <= 0.5
    assert cli.trainer.callback_metrics["grad/max_norm"] == 0.5


def test_its_configuration_files(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("""
trainer:
  callbacks:
    - class_path: clip_callbacks.NonFiniteGuard
      init_args: {policy: raise}
    - class_path: clip_callbacks.GradientClipping
      init_args:
        max_norm: {class_path: clip_callbacks.WarmupLimit, init_args: {limit: {class_path: ZScoreLimit}, steps: 3, warmup_limit: 2}}
""")
    cli = parse(f"--config={path}")
    cli.trainer.fit(cli.model)
    assert [callback.policy for callback in cli.trainer.callbacks if isinstance(callback, NonFiniteGuard)] == ["raise"]
    assert cli.trainer.callback_metrics["grad/max_norm"] == 2.0
