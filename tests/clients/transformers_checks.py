"""What holds in the Trainer of transformers; run in an environment with accelerate, by ``make clients``."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2LMHeadModel

from clip_callbacks import clip_grad_norm_
from tests.clients.client import COPIES, same
from tests.clients.packages.transformers import EPOCHS, STEPS, Clipping, trainer_of

MAX_NORM = 0.1


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def trained(trainer, **options):
    trainer.train(**options)
    return weights(trainer.model)


@pytest.fixture(scope="session")
def clipped(tmp_path_factory):
    """A whole fit with the callback, its folder, and the weights that it ends with."""
    folder, callback = tmp_path_factory.mktemp("clipped"), Clipping(MAX_NORM)
    trainer = trainer_of(folder, callback)
    return trainer, callback, folder, trained(trainer)


def test_clips_to_the_same_bits(clipped, tmp_path):
    theirs = trained(trainer_of(tmp_path, max_grad_norm=MAX_NORM))
    assert same(theirs, clipped[3])
    dropped_in = trainer_of(tmp_path, max_grad_norm=MAX_NORM)
    dropped_in.accelerator.clip_grad_norm_ = clip_grad_norm_
    assert same(theirs, trained(dropped_in))
    assert not same(theirs, trained(trainer_of(tmp_path)))


def test_all_callbacks_resume(clipped, tmp_path):
    resumed = trainer_of(tmp_path, Clipping(MAX_NORM))
    assert same(clipped[3], trained(resumed, resume_from_checkpoint=str(clipped[2] / f"checkpoint-{STEPS}")))
    assert resumed.state.global_step == EPOCHS * STEPS


def test_a_nan_batch_is_skipped(tmp_path):
    ruined = trained(trainer_of(tmp_path, max_grad_norm=MAX_NORM, nan_step=1))
    assert not all(weight.isfinite().all() for weight in ruined.values())
    callback = Clipping(MAX_NORM)
    kept = trained(trainer_of(tmp_path, callback, nan_step=1))
    assert all(weight.isfinite().all() for weight in kept.values())
    assert callback.skipped == 1


@pytest.mark.parametrize("way", sorted(COPIES))
def test_copies(clipped, way):
    copied = COPIES[way](clipped[1])
    assert (copied.max_norm, copied.skipped) == (MAX_NORM, 0)
    assert same(weights(COPIES[way](clipped[0].model)), clipped[3])


def test_saves_and_loads(clipped, tmp_path):
    clipped[0].save_model(str(tmp_path))
    assert same(weights(GPT2LMHeadModel.from_pretrained(tmp_path)), clipped[3])
    assert all(torch.isfinite(weight).all() for weight in clipped[3].values())
