"""Weighted windows of two ranks."""

from __future__ import annotations

import torch
from lightning.pytorch.strategies import DDPStrategy

from clip_callbacks import AccumulationRescaling, LabelTokens, NonFiniteGuard
from tests.helpers.tagging import OwnMean, large_batch, loader, sentences, windows
from tests.helpers.training import assert_same_bits, make_trainer


class Dealt(OwnMean):
    """Each rank takes every other batch."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def train_dataloader(self):
        return loader(self.batches[self.global_rank :: 2])


def dealt_lengths():
    """Windows of two times three micro-batches: one with 1, 7, 20 and 4 labels, one with none on rank 1, a short last one."""
    generator = torch.Generator().manual_seed(5)
    lengths = (torch.randint(25, (182,), generator=generator) * (torch.rand(182, generator=generator) > 0.2)).tolist()
    lengths[:12] = [1, 7, 20, 4, 0, 2, 5, 0, 9, 0, 3, 0]
    return lengths


def dealt(folder):
    strategy = DDPStrategy(process_group_backend="gloo")
    family = [AccumulationRescaling(LabelTokens()), NonFiniteGuard()]
    options = {"accumulate_grad_batches": 3, "use_distributed_sampler": False}
    module = Dealt(sentences(dealt_lengths()))
    make_trainer(folder, *family, devices=2, strategy=strategy, **options).fit(module)
    return module.gradients


def test_the_large_batch_of_two_ranks(two_ranks, tmp_path):
    batches = sentences(dealt_lengths())
    first, second = two_ranks.run(dealt, tmp_path)
    assert_same_bits(first, second)
    torch.testing.assert_close(first, [large_batch(window) for window in windows(batches, 6)])
