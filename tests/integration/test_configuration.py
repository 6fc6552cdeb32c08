"""LightningCLI, Hydra, and every file in configs/."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from clip_callbacks import (
    AccumulationRescaling,
    Bundles,
    ClipRule,
    CosineLimit,
    EmaLimit,
    FixedLimit,
    GradientClipping,
    GradientNoiseScale,
    GradientNormMonitor,
    LinearLimit,
    NonFiniteGuard,
    QuantileLimit,
    RatioLimit,
    RobustZScoreLimit,
    Rollback,
    TightestLimit,
    WarmupLimit,
    ZScoreLimit,
)
from tests.helpers.training import Regression, data

ROOT = Path(__file__).parents[2]


CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
QUIET = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.accelerator=cpu"]


class Keyed(Regression):
    """Takes batches under the names that the configuration of tokens expects."""

    def loss(self, batch, batch_idx):
        return super().loss([batch["inputs"], batch["labels"]], batch_idx)


def keyed(loader):
    return DataLoader([{"inputs": inputs, "labels": labels} for inputs, labels in loader], batch_size=None)


def parse(*arguments, model=BoringModel, datamodule=None):
    return LightningCLI(model, datamodule, run=False, save_config_callback=None, args=list(arguments))


def callbacks(*arguments):
    family = (GradientClipping, NonFiniteGuard, AccumulationRescaling, GradientNormMonitor, GradientNoiseScale)
    return [callback for callback in parse(*arguments, *QUIET).trainer.callbacks if isinstance(callback, family)]


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return f"--config={path}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_builds_a_trainer_and_asks_one_question(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from char_rnn import CharRNN, StdlibText

    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert "?" in first
    base = [f"--config={ROOT / 'configs/char_rnn.yaml'}"] if path.name == "char_rnn_unclipped.yaml" else []
    cli = parse(*base, f"--config={path}", "--trainer.accelerator=cpu", model=CharRNN, datamodule=StdlibText)
    named = [entry["class_path"] for entry in yaml.safe_load(path.read_text())["trainer"]["callbacks"]]
    ours = [callback for callback in cli.trainer.callbacks if type(callback).__module__.startswith("clip_callbacks")]
    assert [f"clip_callbacks.{type(callback).__name__}" for callback in ours] == named


@pytest.mark.parametrize("path", [path for path in CONFIGS if "char_rnn" not in path.name], ids=lambda path: path.name)
def test_every_config_trains(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIP_CALLBACKS_INJECT", "1")
    arguments = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.max_steps=3"]
    cli = parse(f"--config={path}", *QUIET, *arguments, f"--trainer.default_root_dir={tmp_path}")
    torch.manual_seed(0)
    cli.trainer.fit(*((Keyed(), keyed(data(48))) if "tokens" in path.name else (Regression(), data(48))))
    assert cli.trainer.global_step == 3


def test_every_option_of_the_monitor(tmp_path):
    text = """
trainer:
  callbacks:
    - class_path: clip_callbacks.GradientNormMonitor
      init_args:
        scope: parameter
        norm_type: inf
        every_n_steps: 100
        include: ^layer
        exclude: bias
        top_k: 10
        log_update_ratio: true
        log_weight_norm: true
        log_statistics: true
        log_histograms: true
        log_contributions: true
"""
    (monitor,) = callbacks(write(tmp_path, text))
    assert (monitor.scope, monitor.norm_type, monitor.every_n_steps) == ("parameter", float("inf"), 100)
    assert (monitor.include, monitor.exclude, monitor.top_k) == ("^layer", "bias", 10)
    assert monitor.log_update_ratio
    assert monitor.log_weight_norm
    assert monitor.log_statistics
    assert monitor.log_histograms
    assert monitor.log_contributions


def test_class_path_with_a_nested_limit(tmp_path):
    text = """
trainer:
  callbacks:
    - class_path: clip_callbacks.GradientClipping
      init_args:
        max_norm: {class_path: clip_callbacks.FixedLimit, init_args: {max_norm: 1e-3}}
        scope: layer
"""
    (clipping,) = callbacks(write(tmp_path, text))
    assert clipping.rules == [ClipRule(FixedLimit(1e-3), "layer")]


@pytest.mark.parametrize(
    ("written", "limit"),
    [
        ("class_path: LinearLimit, init_args: {start: 10, end: 1e0, steps: 5}", LinearLimit(10.0, 1.0, 5)),
        ("class_path: clip_callbacks.CosineLimit, init_args: {start: 10, end: 1, steps: 5}", CosineLimit(10.0, 1.0, 5)),
        ("class_path: clip_callbacks.RatioLimit, init_args: {floor: 1e-2}", RatioLimit(floor=0.01)),
        ("class_path: QuantileLimit, init_args: {quantile: 0.5, window: 10, warmup: 3}", QuantileLimit(0.5, 10, 3)),
        ("class_path: clip_callbacks.ZScoreLimit, init_args: {z: 3, clip_to: mean}", ZScoreLimit(3.0, clip_to="mean")),
        ("class_path: clip_callbacks.RobustZScoreLimit", RobustZScoreLimit()),
        ("class_path: clip_callbacks.EmaLimit, init_args: {max_norm: 2}", EmaLimit(max_norm=2.0)),
        (
            "class_path: TightestLimit, init_args: {limits: [1.5, {class_path: ZScoreLimit}]}",
            TightestLimit(1.5, ZScoreLimit()),
        ),
        (
            "class_path: WarmupLimit, init_args: {limit: {class_path: ZScoreLimit}, steps: 3, warmup_limit: 2}",
            WarmupLimit(ZScoreLimit(), steps=3, warmup_limit=2.0),
        ),
    ],
)
def test_every_limit_by_its_class_wherever_a_limit_may_stand(tmp_path, written, limit):
    text = f"""
trainer:
  callbacks:
    - class_path: clip_callbacks.GradientClipping
      init_args:
        max_norm: {{{written}}}
        shadow: [0.5, {{{written}}}]
    - class_path: clip_callbacks.NonFiniteGuard
      init_args: {{skip_above: {{{written}}}}}
"""
    clipping, guard = callbacks(write(tmp_path, text))
    assert clipping.rules == [ClipRule(limit)]
    assert clipping.shadow == [FixedLimit(0.5), limit]
    assert guard.skip_above == limit


def test_rules_with_a_nested_limit(tmp_path):
    text = """
trainer:
  callbacks:
    - class_path: clip_callbacks.GradientClipping
      init_args:
        rules:
          - max_norm: {class_path: clip_callbacks.FixedLimit, init_args: {max_norm: 2}}
          - {max_norm: "1e-2", scope: parameter, include: "layer.*"}
          - {max_norm: 3, scope: unit, exclude: bias, name: rows}
"""
    (clipping,) = callbacks(write(tmp_path, text))
    assert clipping.rules == [
        ClipRule(FixedLimit(2.0)),
        ClipRule(0.01, "parameter", include="layer.*"),
        ClipRule(3.0, "unit", exclude="bias", name="rows"),
    ]


@pytest.mark.parametrize(
    ("written", "rule"),
    [
        ("1e-3", ClipRule(1e-3)),
        ('"1e-3"', ClipRule(1e-3)),
        ("inf", ClipRule("inf")),
        (".inf", ClipRule(float("inf"))),
        ("null", ClipRule(None)),
        ("2", ClipRule(2.0)),
    ],
)
def test_numbers_as_people_write_them(tmp_path, written, rule):
    text = f"""
trainer:
  callbacks:
    - class_path: clip_callbacks.GradientClipping
      init_args: {{max_norm: {written}, norm_type: inf}}
"""
    (clipping,) = callbacks(write(tmp_path, text))
    assert clipping.rules == [rule]
    assert clipping.norm_type == float("inf")


@pytest.mark.parametrize(
    ("written", "bundles", "rollback"),
    [
        ("bundles: bad", Bundles("bad"), None),
        ("bundles: {folder: bad, weights: full, max_bytes: 1e9}", Bundles("bad", weights="full", max_bytes=1e9), None),
        (
            "bundles: {class_path: clip_callbacks.Bundles, init_args: {folder: bad, max_count: 3}}",
            Bundles("bad", max_count=3),
            None,
        ),
        ("rollback: {}", None, Rollback()),
        ("rollback: {every_n_steps: 50, lr_factor: 5e-1}", None, Rollback(every_n_steps=50, lr_factor=0.5)),
        ("rollback: null, bundles: null", None, None),
    ],
)
def test_options_of_bundles_and_of_rollbacks(tmp_path, written, bundles, rollback):
    text = f"trainer: {{callbacks: [{{class_path: NonFiniteGuard, init_args: {{{written}}}}}]}}"
    (guard,) = callbacks(write(tmp_path, text))
    assert (guard.bundles, guard.rollback) == (bundles, rollback)


@pytest.mark.parametrize(
    ("arguments", "bundles", "rollback"),
    [
        (["bundles=bad"], Bundles("bad"), None),
        (["bundles.folder=bad", "bundles.weights=full"], Bundles("bad", weights="full"), None),
        (["rollback={}"], None, Rollback()),
        (["rollback.every_n_steps=50"], None, Rollback(every_n_steps=50)),
        (["bundles=bad", "rollback.lr_factor=0.5", "policy=zero"], Bundles("bad"), Rollback(lr_factor=0.5)),
    ],
)
def test_options_of_bundles_and_of_rollbacks_on_the_command_line(monkeypatch, capsys, tmp_path, arguments, bundles, rollback):
    arguments = ["--trainer.callbacks+=NonFiniteGuard", *(f"--trainer.callbacks.{argument}" for argument in arguments)]
    (guard,) = callbacks(*arguments)
    assert (guard.bundles, guard.rollback) == (bundles, rollback)
    (again,) = callbacks(write(tmp_path, printed(monkeypatch, capsys, *arguments, "--print_config")))
    assert (again.bundles, again.rollback) == (bundles, rollback)


def test_options_of_bundles_and_of_rollbacks_with_hydra():
    import hydra
    from omegaconf import OmegaConf

    bundles = {"_target_": "clip_callbacks.Bundles", "folder": "bad", "weights": "full"}
    rollback = {"_target_": "clip_callbacks.Rollback", "every_n_steps": 50}
    written = [{"_target_": "clip_callbacks.NonFiniteGuard", "bundles": it, "rollback": rollback} for it in (bundles, "bad")]
    config = OmegaConf.create({"trainer": {"_target_": "lightning.pytorch.Trainer", "logger": False, "callbacks": written}})
    guards = [it for it in hydra.utils.instantiate(config.trainer).callbacks if isinstance(it, NonFiniteGuard)]
    assert [guard.bundles for guard in guards] == [Bundles("bad", weights="full"), Bundles("bad")]
    assert [guard.rollback for guard in guards] == [Rollback(every_n_steps=50)] * 2


def test_short_names_on_the_command_line():
    (clipping,) = callbacks("--trainer.callbacks+=GradientClipping", "--trainer.callbacks.max_norm=0.5")
    assert clipping.rules == [ClipRule(0.5)]
    clipping, guard = callbacks(
        "--trainer.callbacks+=GradientClipping", "--trainer.callbacks.max_norm=FixedLimit",
        "--trainer.callbacks.max_norm.max_norm=3", "--trainer.callbacks+=NonFiniteGuard", "--trainer.callbacks.policy=zero",
    )  # fmt: skip
    assert clipping.rules == [ClipRule(FixedLimit(3.0))]
    assert guard.policy == "zero"
    (noise_scale,) = callbacks("--trainer.callbacks+=GradientNoiseScale")
    assert isinstance(noise_scale, GradientNoiseScale)


@pytest.mark.parametrize(
    ("argument", "match"),
    [("max_norm=-1", "`max_norm` must be a number above 0"), ("scope=tensor", "tensor"), ("nonfinite=drop", "drop")],
)
def test_mistakes_on_the_command_line_end_in_one_error(argument, match, capsys):
    with pytest.raises((SystemExit, ValueError)) as caught:
        callbacks("--trainer.callbacks+=GradientClipping", f"--trainer.callbacks.{argument}")
    assert match in capsys.readouterr().err + str(caught.value)


def printed(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["main.py"])
    with pytest.raises(SystemExit):
        parse(*arguments)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "family", [GradientClipping, NonFiniteGuard, AccumulationRescaling, GradientNormMonitor, GradientNoiseScale]
)
def test_print_config_shows_every_option_with_its_help(monkeypatch, capsys, family):
    import inspect

    out = " ".join(printed(monkeypatch, capsys, f"--trainer.callbacks+={family.__name__}", "--print_config=comments").split())
    documentation = inspect.getdoc(family)
    for name in list(inspect.signature(family.__init__).parameters)[1:]:
        assert f"{name}: " in out
        (line,) = [line for line in documentation.splitlines() if line.strip().startswith(f"{name}: ")]
        assert " ".join(line.strip().removeprefix(f"{name}: ").split()[:6]) in out


def test_printed_config_can_be_read_back(monkeypatch, capsys, tmp_path):
    arguments = ["--trainer.callbacks+=GradientClipping", "--trainer.callbacks.max_norm=FixedLimit"]
    out = printed(monkeypatch, capsys, *arguments, "--trainer.callbacks.max_norm.max_norm=3", "--print_config")
    (clipping,) = callbacks(write(tmp_path, out))
    assert clipping.rules == [ClipRule(FixedLimit(3.0))]


@pytest.mark.parametrize("path", sorted((ROOT / "configs/hydra").glob("*.yaml")), ids=lambda path: path.name)
def test_hydra_files_make_a_trainer_that_trains(path, tmp_path):
    import hydra
    from omegaconf import OmegaConf

    config = OmegaConf.load(path)
    made = hydra.utils.instantiate(config.trainer, max_epochs=1, enable_progress_bar=False, default_root_dir=str(tmp_path))
    assert isinstance(made, Trainer)
    made.fit(Regression(), data(6))
    clipping = next(callback for callback in made.callbacks if isinstance(callback, GradientClipping))
    assert clipping.rules[1] == ClipRule(FixedLimit(0.1), "parameter")
    guard = next(callback for callback in made.callbacks if isinstance(callback, NonFiniteGuard))
    assert guard.rollback == (Rollback(lr_factor=0.5) if path.name == "trainer.yaml" else None)
    if path.name == "limits.yaml":
        assert clipping.rules[0] == ClipRule(TightestLimit(5.0, ZScoreLimit()))
        assert clipping.shadow == [FixedLimit(1.0), QuantileLimit(0.9)]
