"""level="microbatch": only the bad micro-batch leaves its window."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from clip_callbacks import AccumulationRescaling, GradientClipping, NonFiniteGradientError, NonFiniteGuard
from tests.helpers.training import GradientTape, Poisoned, Regression, assert_same_bits, data, weights

pytestmark = pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning")


class Tape(GradientTape):
    """Each batch is a gradient; NaN among them. Keeps what the optimizer is given."""

    def __init__(self, feed, losses=None):
        super().__init__(torch.tensor(feed, dtype=torch.float32)[:, None])
        self.losses = losses or {}
        self.gradients = []

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.losses.get(batch_idx, 0.0)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.0)
        optimizer.register_step_post_hook(
            lambda *_: self.gradients.append(None if self.weight.grad is None else round(self.weight.grad.item(), 5))
        )
        return optimizer


def guard(**options):
    return NonFiniteGuard(level="microbatch", **options)


@pytest.mark.parametrize("others", [[], [AccumulationRescaling]], ids=["alone", "rescaling"])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("feed", "expected", "dropped"),
    [
        ([1, 2, 3, 4, 5, 6], [2.0, 5.0], 0),
        ([1, math.nan, 3, 4, 5, 6], [2.0, 5.0], 1),
        ([math.inf, 2, 4, 4, 5, math.nan], [3.0, 4.5], 2),
        ([math.nan, -math.inf, 7, 4, 5, 6], [7.0, 5.0], 2),
        ([math.nan, math.nan, math.nan, 4, 5, 6], [None, 5.0], 3),
    ],
)
def test_the_window_is_the_mean_of_the_others(trainer, others, order, feed, expected, dropped):
    module, callback = Tape(feed), guard()
    trainer(*[callback, *[other() for other in others]][::order], accumulate_grad_batches=3).fit(module)
    assert module.gradients == expected
    assert callback.dropped_micro_batches == dropped
    assert callback.skipped_steps == expected.count(None)


def test_a_bad_loss_with_finite_gradients_is_found_too(trainer):
    module, callback = Tape([1, 2, 3], losses={1: math.inf}), guard()
    trainer(callback, accumulate_grad_batches=3).fit(module)
    assert module.gradients == [2.0]
    assert callback.dropped_micro_batches == 1


def test_short_windows_are_means_with_rescaling(trainer):
    module = Tape([1, 2, 3, math.nan, 8])
    trainer(AccumulationRescaling(), guard(), accumulate_grad_batches=3).fit(module)
    assert module.gradients == [2.0, 8.0]


def test_good_windows_keep_their_bits(trainer):
    results = []
    for callbacks in ([], [guard(), GradientClipping(None)]):
        torch.manual_seed(0)
        module = Regression(torch.optim.AdamW)
        trainer(*callbacks, accumulate_grad_batches=4).fit(module, data(12))
        results.append(weights(module))
    assert_same_bits(*results)


def test_batch_statistics_of_the_dropped_one_are_undone(trainer):
    def run(poison, batches, n):
        torch.manual_seed(0)
        module = Poisoned(poison, net=nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
        trainer(guard(), AccumulationRescaling(), accumulate_grad_batches=n).fit(module, DataLoader(batches, batch_size=None))
        return list(module.state_dict().values())

    batches = list(data(3, size=0.1))
    poisoned = run({1: math.nan}, batches, 3)
    clean = run({}, [batches[0], batches[2]], 2)
    for a, b in zip(poisoned, clean, strict=True):  # not to the bit: thirds rescaled by 3/2 against halves
        torch.testing.assert_close(a, b)
    assert poisoned[6] == clean[6] == 2, "num_batches_tracked"


def test_sparse_gradients(trainer):
    class Sparse(Tape):
        def __init__(self, feed):
            super().__init__(feed)
            self.weight = nn.Embedding(4, 1, sparse=True).weight

        def training_step(self, batch, batch_idx):
            return (nn.functional.embedding(torch.tensor([batch_idx, 1]), self.weight, sparse=True) * batch[0][0]).sum()

        def configure_optimizers(self):
            optimizer = torch.optim.SGD([self.weight], lr=0.0)
            optimizer.register_step_post_hook(lambda *_: self.gradients.append(self.weight.grad.to_dense().flatten().tolist()))
            return optimizer

    module = Sparse([3, math.nan, 6])
    trainer(guard(), accumulate_grad_batches=3).fit(module)
    assert module.gradients == [pytest.approx([1.5, 4.5, 3.0, 0.0])]


def test_lost_windows_count_towards_the_streak(trainer):
    with pytest.raises(NonFiniteGradientError, match=r"bad step 2 in a row(.|\n)*weight \[1\]: 1 NaN"):
        trainer(guard(max_consecutive=2), accumulate_grad_batches=2).fit(Tape([math.nan] * 6))


def test_refusals(trainer):
    from tests.helpers.training import scaled

    with pytest.raises(ValueError, match="`level` must be one of window, microbatch, got 'batch'"):
        NonFiniteGuard(level="batch")
    with pytest.raises(ValueError, match=r'`level` must be "window" under a GradScaler.*hide its overflow'):
        trainer(guard(), **scaled()).fit(Regression(), data())
    with pytest.raises(ValueError, match=r'`level` must be "window" with LBFGS'):
        trainer(guard()).fit(Regression(torch.optim.LBFGS), data())
    with pytest.raises(ValueError, match=r'`level` must be "window" for the policy .zero.'):
        NonFiniteGuard("zero", level="microbatch")
    manual = Regression()
    manual.automatic_optimization = False
    with pytest.raises(ValueError, match=r'`level` must be "window" in manual optimization'):
        trainer(guard()).fit(manual, data())


def test_journal_and_summary(trainer, tmp_path, said):
    import json

    from lightning.pytorch.loggers import CSVLogger

    csv = CSVLogger(tmp_path)
    trainer(guard(), accumulate_grad_batches=3, logger=csv).fit(Tape([1, math.nan, 3]))
    (line,) = (tmp_path / "lightning_logs/version_0/nonfinite_steps.jsonl").read_text().splitlines()
    facts = json.loads(line)
    assert facts["policy"] == "microbatch"
    assert facts["batch"] == 1
    assert facts["gradients"] == [{"name": "weight", "shape": [1], "nan": 1, "inf": 0}]
    assert said[1:] == ["NonFiniteGuard: optimizer steps: 1, dropped micro-batches: 1."]


def test_one_warning_for_each_dropped_micro_batch(trainer):
    with pytest.warns(RuntimeWarning) as caught:
        trainer(guard()).fit(Tape([1, math.nan, 3]))
    assert len([w for w in caught if "Non-finite" in str(w.message)]) == 1
