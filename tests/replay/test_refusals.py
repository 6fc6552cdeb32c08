"""Bundles, configurations and checkpoints that cannot be replayed."""

from __future__ import annotations

import json
import os

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from clip_callbacks import Bundles, NonFiniteGuard
from clip_callbacks.bundles.bundle import BATCHES, FACTS, WEIGHTS
from clip_callbacks.cli import main
from clip_callbacks.replay.errors import UnusableReplayError
from clip_callbacks.replay.starting_weights import check_names_and_shapes
from tests.helpers.replaying import Item, Net, config, fitted, refused, replayed, rewrite, samples

pytestmark = [
    pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Spike at:RuntimeWarning"),
]


def test_what_is_no_bundle_or_was_tampered_with_is_refused(bad, tmp_path, capsys):
    good = config(tmp_path, Net, kind="log")
    assert "must be a folder with a bundle.json" in refused(capsys, tmp_path, *good)
    whole = (bad / BATCHES).read_bytes()
    (bad / BATCHES).write_bytes(whole[:-10])
    assert "it is truncated or changed" in refused(capsys, bad, *good)
    (bad / BATCHES).write_bytes(whole[:-1] + b"?")
    assert "must have the SHA-256 hash that bundle.json records, got another one: it was changed" in refused(capsys, bad, *good)
    (bad / BATCHES).write_bytes(whole)
    facts = json.loads((bad / FACTS).read_text())
    for key, value in {"optimizer": "x", "trainer": {}, "module": {"class": 3}}.items():
        (bad / FACTS).write_text(json.dumps(facts | {key: value}))
        assert "bundle.json must describe the step, the Trainer and the module" in refused(capsys, bad, *good)
    (bad / FACTS).write_text(json.dumps(facts | {"optimizer": 7}))
    assert "must be the index of one of the module's 1, got 7" in refused(capsys, bad, *good)


def test_another_module_is_refused_with_the_keys_that_differ(bad, tmp_path, capsys):
    line = refused(capsys, bad, *config(tmp_path, Net, kind="spike"))
    assert "must fit Net as the configuration builds it, got 4 missing (net.0.weight, net.0.bias, net.2.weight and 1 more)" in line
    assert "4 unexpected (net.1.weight, net.1.bias, net.3.weight and 1 more)" in line
    with pytest.raises(UnusableReplayError, match=r"got 1 of another shape \(weight \[3, 3\] instead of \[3, 2\]\)"):
        check_names_and_shapes({"weight": (3, 3), "bias": (3,)}, nn.Linear(2, 3), "weights")


def test_configurations_that_cannot_be_used_are_refused_in_one_line(bad, tmp_path, capsys):
    assert "`--config` must be a file, got " in refused(capsys, bad, "--config", tmp_path / "none.yaml")
    path = tmp_path / "broken.yaml"
    path.write_text("model: [")
    assert "cannot be read as YAML" in refused(capsys, bad, "--config", path)
    path.write_text("- 3")
    assert "must hold a configuration of LightningCLI, got list" in refused(capsys, bad, "--config", path)
    path.write_text("model: {kind: log}")
    line = refused(capsys, bad, "--config", path)
    assert "--script main.py (the bundle was made by " in line
    path.write_text("model: {class_path: tests.helpers.replaying.Nowhere}")
    assert "LightningCLI refused the configuration: " in refused(capsys, bad, "--config", path)
    assert len(refused(capsys, bad, *config(tmp_path, Net, kindd="log"))) < 1000
    path.write_text("model: {class_path: tests.helpers.replaying.Net, init_args: {parts: [{class_path: of_nobody.Part}]}}")
    assert "classes that can be imported here, got of_nobody.Part in " in refused(capsys, bad, "--config", path)


def test_without_jsonargparse_the_extra_that_brings_it_is_named(bad, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.cli._JSONARGPARSE_SIGNATURES_AVAILABLE", False)
    script = tmp_path / "main.py"
    script.write_text("raise KeyError('is not run')")
    for arguments in (config(tmp_path, Net, kind="log"), [*config(tmp_path, Net, kind="log"), "--script", script]):
        line = refused(capsys, bad, *arguments)
        assert "LightningCLI needs jsonargparse[signatures]" in line
        assert "pip install 'clip_callbacks[replay]'" in line


def test_checkpoints_that_cannot_be_used_are_refused(bad, tmp_path, capsys):
    good = config(tmp_path, Net, kind="log")
    path = tmp_path / "x.ckpt"
    assert "`--ckpt` must be a checkpoint of Lightning" in refused(capsys, bad, *good, "--ckpt", path)
    path.write_bytes(b"no checkpoint")
    assert "cannot be read as a checkpoint" in refused(capsys, bad, *good, "--ckpt", path)
    torch.save({"weights": {}}, path)
    assert "with a state_dict" in refused(capsys, bad, *good, "--ckpt", path)
    torch.save({"state_dict": {}, "hyper_parameters": Item(torch.zeros(1), [], torch.zeros(()))}, path)
    assert "holds objects that could run code: tests.helpers.replaying.Item" in refused(capsys, bad, *good, "--ckpt", path)
    torch.save({"state_dict": {"net.1.weight": torch.zeros(2)}}, path)
    assert "3 missing (net.1.bias, net.3.weight, net.3.bias)" in refused(capsys, bad, *good, "--ckpt", path)


def test_options_that_cannot_be_used_are_refused(bad, tmp_path, capsys):
    good = config(tmp_path, Net, kind="log")
    assert "must be a file.png or file.svg" in refused(capsys, bad, *good, "-o", tmp_path / "x.jpg")
    assert "in a folder that can be written to" in refused(capsys, bad, *good, "-o", tmp_path / "none" / "x.png")
    assert "`--device` must be one that this machine has (cpu" in refused(capsys, bad, *good, "--device", "tpu")
    assert "Trainer raised" in refused(capsys, bad, *good, "--precision", "8-true")
    assert "`--trust` must be a class as package.module.Class" in refused(capsys, bad, *good, "--trust", "nowhere.Class")
    assert "`--trust` must be a class, got tests.helpers.replaying.WIDTH" in refused(
        capsys, bad, *good, "--trust", "tests.helpers.replaying.WIDTH"
    )
    assert "`--script` must be a file" in refused(capsys, bad, *good, "--script", tmp_path / "none.py")
    with pytest.raises(SystemExit):
        main(["replay", str(bad), *good, "--explodes", "0.5"])


class Raising(Net):
    def training_step(self, batch, batch_idx):
        if type(self.trainer.logger).__name__ == "DummyLogger":
            raise KeyError("a file that is not here")
        return super().training_step(batch, batch_idx)


def test_an_error_of_the_modules_own_is_told_with_its_place(trainer, tmp_path, capsys):
    inputs = samples()
    inputs[9, 3] = 0
    bundle = fitted(trainer, tmp_path, Raising("log"), inputs)
    capsys.readouterr()
    assert main(["replay", str(bundle), *config(tmp_path, Raising, kind="log")]) == 2
    said = capsys.readouterr().err
    assert 'raise KeyError("a file that is not here")' in said
    assert "raised KeyError: 'a file that is not here' (" in said.splitlines()[-1]
    assert "lightning/pytorch" not in said


class Cased(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step([batch.x], batch_idx)


def one_item(batch):
    return Item(torch.stack([row[0] for row in batch]), ["a"] * len(batch), torch.zeros(()))


def test_classes_of_batches_are_named_and_run_if_they_are_trusted(trainer, tmp_path, capsys):
    inputs = samples()
    inputs[9, 3] = 0
    fit = trainer(NonFiniteGuard(bundles=Bundles(tmp_path / "bad", weights="full")))
    fit.fit(Cased("log"), DataLoader(TensorDataset(inputs), batch_size=4, collate_fn=one_item))
    (bundle,) = (tmp_path / "bad").iterdir()
    arguments = config(tmp_path, Cased, kind="log")
    assert "--trust tests.helpers.replaying.Item" in refused(capsys, bundle, *arguments)
    code, found = replayed(capsys, bundle, *arguments, "--trust", "tests.helpers.replaying.Item", "--bisect")
    assert code == 0
    assert found["bisection"]["samples"] == [1]


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)

    def __init__(self, mark):
        self.mark = mark


def test_a_strangers_bundle_runs_nothing(bad, tmp_path, capsys):
    mark, good = tmp_path / "mark", config(tmp_path, Net, kind="log")
    evil = f"import os; os.system('touch {mark}')"
    (bad / "evil.py").write_text(evil)
    facts = json.loads((bad / FACTS).read_text())
    facts["module"] |= {"class": "evil.Module", "script": str(bad / "evil.py")}
    (bad / FACTS).write_text(json.dumps(facts))
    rewrite(bad, "config.yaml", f"model: {{class_path: subprocess.Popen, init_args: {{args: [touch, {mark}]}}}}")
    assert replayed(capsys, bad, *good)[0] == 0
    rows = torch.load(bad / BATCHES, weights_only=True)
    rewrite(bad, WEIGHTS, {"module": Evil(mark)})
    assert "posix.system" in refused(capsys, bad, *good)
    rewrite(bad, BATCHES, [rows[0] | {"batch": Evil(mark)}])
    assert "posix.system" in refused(capsys, bad, *good)
    assert not mark.exists()
    torch.load(bad / BATCHES, weights_only=False)
    assert mark.exists(), "or the bundle was not malicious"
