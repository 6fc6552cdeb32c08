"""Weighted windows of two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from clip_callbacks import AccumulationRescaling, LabelTokens, NonFiniteGuard
from tests.helpers.tagging import OwnMean, large_batch, loader, sentences, windows
from tests.helpers.training import assert_same_bits, make_trainer


class Dealt(OwnMean):
    """Each rank takes every other batch."""

    def __init__(self, batches, folder):
        super().__init__(folder=folder)
        self.batches = batches

    def train_dataloader(self):
        return loader(self.batches[self.global_rank :: 2])


def dealt_lengths():
    """Windows of two times three micro-batches: one with 1, 7, 20 and 4 labels, one with none on rank 1, a short last one."""
    generator = torch.Generator().manual_seed(5)
    lengths = (torch.randint(25, (182,), generator=generator) * (torch.rand(182, generator=generator) > 0.2)).tolist()
    lengths[:12] = [1, 7, 20, 4, 0, 2, 5, 0, 9, 0, 3, 0]
    return lengths


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore")
def test_the_large_batch_of_two_ranks(tmp_path: Path):
    batches = sentences(dealt_lengths())
    strategy = DDPStrategy(process_group_backend="gloo", start_method="spawn")
    family = [AccumulationRescaling(LabelTokens()), NonFiniteGuard()]
    options = {"accumulate_grad_batches": 3, "use_distributed_sampler": False}
    make_trainer(tmp_path, *family, devices=2, strategy=strategy, **options).fit(Dealt(batches, str(tmp_path)))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_same_bits(first, second)
    torch.testing.assert_close(first, [large_batch(window) for window in windows(batches, 6)])
