"""kill -9 in the middle of training, then resume from the last checkpoint: as if nothing had happened."""

from __future__ import annotations

import math
import signal
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from clip_callbacks import ClipRule, GradientClipping, NonFiniteGuard
from tests.helpers import forked
from tests.helpers.laws import ADAPTIVE
from tests.helpers.training import SAFELY, Poisoned, assert_same_bits, data, leaves, make_trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:Non-finite gradients:RuntimeWarning",
    "ignore:.*lr_scheduler.step.*:UserWarning",
    "ignore:The dirpath has changed:UserWarning",
)
BATCHES, EPOCHS = 10, 6


class Slow(Poisoned):
    """Poisoned in every epoch, with a schedule by steps; slow enough to be killed."""

    def __init__(self, pause: float = 0.0) -> None:
        torch.manual_seed(0)
        bad = {number: math.nan for epoch in range(EPOCHS) for number in (epoch * BATCHES + 2, epoch * BATCHES + 7)}
        super().__init__(bad, optimizer=torch.optim.AdamW, lr=0.01)
        self.pause = pause

    def on_train_batch_end(self, *_):
        time.sleep(self.pause)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def run(folder: Path, pause: float = 0.0, ckpt_path: Path | None = None):
    callbacks = [NonFiniteGuard(), GradientClipping(rules=[ClipRule(ADAPTIVE), ClipRule(0.5, "layer")])]
    checkpoint = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    trainer = make_trainer(folder, *callbacks, checkpoint, max_epochs=EPOCHS, enable_checkpointing=True)
    module = Slow(pause)
    trainer.fit(module, data(BATCHES), ckpt_path=ckpt_path, **SAFELY)
    state = [trainer.optimizers[0].state_dict(), trainer.lr_scheduler_configs[0].scheduler.last_epoch]
    return module, callbacks, leaves(state)


@pytest.mark.timeout(120)
def test_kill_and_resume(tmp_path):
    process = forked.start(run, tmp_path / "killed", 0.05)
    third = tmp_path / "killed" / "epoch=2.ckpt"
    while not third.exists():
        assert process.is_alive(), "it ended before it could be killed"
        time.sleep(0.02)
    time.sleep(0.2)  # into the epoch after
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL

    resumed, resumed_callbacks, resumed_state = run(tmp_path / "resumed", ckpt_path=third)
    whole, whole_callbacks, whole_state = run(tmp_path / "whole")
    assert_same_bits(list(resumed.state_dict().values()), list(whole.state_dict().values()))
    assert_same_bits(resumed_state, whole_state)
    for left, right in zip(resumed_callbacks, whole_callbacks, strict=True):
        assert left.skipped_steps == right.skipped_steps == 2 * EPOCHS
        assert_same_bits(leaves(left.state_dict()), leaves(right.state_dict()))
