"""The weights with which a replay starts."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from clip_callbacks.bundles.bundle import FACTS
from tests.helpers.replaying import Net, config, fitted, refused, replayed, samples

pytestmark = [
    pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Spike at:RuntimeWarning"),
]


def test_weights_of_a_checkpoint_are_told_with_their_distance(trainer, tmp_path, capsys):
    inputs = samples(24)
    inputs[21, 3] = 0
    saving = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    options = {"enable_checkpointing": True}
    bundle = fitted(trainer, tmp_path, Net("log"), inputs, weights="reference", options=options, callbacks=[saving])
    arguments = config(tmp_path, Net, kind="log")
    _, found = replayed(capsys, bundle, *arguments)
    assert "step=4.ckpt (the checkpoint that the bundle refers to), saved at step 4, 1 step before the bad step" in found["weights"]
    first = tmp_path / "ckpt" / "step=2.ckpt"
    _, found = replayed(capsys, bundle, *arguments, "--ckpt", first)
    assert "saved at step 2, 3 steps before the bad step" in found["weights"]
    shutil.rmtree(tmp_path / "ckpt")
    assert "step=4.ckpt, but that file is missing; name another checkpoint: --ckpt PATH." in refused(capsys, bundle, *arguments)


def test_without_any_weights_those_of_the_configuration_are_taken_and_that_is_said(trainer, tmp_path, capsys):
    inputs = samples()
    inputs[9, 3] = 0
    bundle = fitted(trainer, tmp_path, Net("log"), inputs, weights="none")
    code, found = replayed(capsys, bundle, *config(tmp_path, Net, kind="log"))
    assert code == 0
    assert found["weights"] == "as the configuration initializes them, because the bundle holds none"
    assert found["micro_batches"][0]["same_loss"] in {True, False}


def test_what_is_not_bad_again_says_so_and_what_to_try(trainer, tmp_path, capsys):
    torch.manual_seed(0)
    bundle = fitted(trainer, tmp_path, Net("plain"), samples(4), weights="none", skip_above=1e-6)
    facts = json.loads((bundle / FACTS).read_text())
    facts["report"]["limit"] = 1e6
    (bundle / FACTS).write_text(json.dumps(facts))
    code, found = replayed(capsys, bundle, *config(tmp_path, Net, kind="plain"), "--bisect")
    assert code == 1
    assert found["conclusion"].startswith("Not reproduced: the norm of all gradients is ")
    assert "name a checkpoint from before the step (--ckpt)" in found["conclusion"]
    assert found["bisection"] is None


class Wrapped(Net):
    """Saves a checkpoint whose keys have the prefix of torch.compile."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {f"_orig_mod.{name}": value for name, value in checkpoint["state_dict"].items()}


def test_names_that_wrappers_have_put_into_keys_are_looked_through(trainer, tmp_path, capsys):
    inputs = samples()
    inputs[9, 3] = 0
    saving = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=2, save_top_k=-1)
    options = {"enable_checkpointing": True}
    bundle = fitted(trainer, tmp_path, Wrapped("log"), inputs, weights="reference", options=options, callbacks=[saving])
    code, found = replayed(capsys, bundle, *config(tmp_path, Wrapped, kind="log"))
    assert code == 0
    assert found["micro_batches"][0]["same_loss"] in {True, False}
    assert "saved at step 2" in found["weights"]
