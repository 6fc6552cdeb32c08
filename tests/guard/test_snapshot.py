"""The copy that a rollback returns to, of tensors of all kinds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from clip_callbacks.trainer.snapshot import Snapshot
from tests.helpers.exact_skip import differences
from tests.helpers.members import O
from tests.helpers.rollback import BATCHES, LOST, Subject, Weights, fitted, rollback, without
from tests.helpers.training import Poisoned, data

pytestmark = pytest.mark.filterwarnings(
    "ignore:Non-finite gradients:RuntimeWarning",
    "ignore:Spike:RuntimeWarning",
    "ignore:Every micro-batch:RuntimeWarning",
    "ignore:.*lr_scheduler.step.*:UserWarning",
)


class Odd(Poisoned):
    """With tensors of all kinds that nothing can simply be written to."""

    def __init__(self, kind):
        super().__init__({4: math.nan, 5: math.nan})
        if kind == "expanded buffer":
            self.register_buffer("odd", torch.arange(5.0).expand(3, -1))
        elif kind == "sparse buffer":
            self.register_buffer("odd", torch.eye(4).to_sparse())
        elif kind == "compressed buffer":
            self.register_buffer("odd", torch.eye(4).to_sparse_csr())
        elif kind == "expanded parameter":
            self.odd = nn.Parameter(torch.ones(1).expand(4), requires_grad=False)
        elif kind == "lazy parameter":
            self.odd = nn.UninitializedParameter()
        elif kind == "lazy buffer":
            self.register_buffer("odd", nn.UninitializedBuffer())

    def configure_optimizers(self):
        return O.SGD(self.net.parameters(), lr=0.01)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize(
    "kind",
    [
        "expanded buffer",
        "sparse buffer",
        "compressed buffer",
        "expanded parameter",
        "lazy parameter",
        "lazy buffer",
    ],
)
def test_tensors_that_cannot_be_written_to_stop_nothing(trainer, kind):
    module, guard, path = Odd(kind), rollback(max_consecutive=2), Weights(lambda: module.net)
    before = module.odd.to_dense() if "sparse" in kind or "compressed" in kind else module.odd
    trainer(guard, path).fit(module, data(8))
    assert guard.rollbacks == 1
    assert torch.equal(path.weights[6], path.weights[3])
    after = module.odd.to_dense() if "sparse" in kind or "compressed" in kind else module.odd
    assert after is before or torch.equal(after, before)


def test_a_sparse_buffer_goes_back(trainer):
    class Adds(Odd):
        def on_train_batch_end(self, *_):
            self.odd = self.odd + torch.eye(4).to_sparse()

    module = Adds("sparse buffer")
    trainer(guard := rollback(max_consecutive=2)).fit(module, data(8))
    assert guard.rollbacks == 1
    assert module.odd.to_dense()[0, 0] == 1 + 3 + 3, "three batches before the copy, three since the return"


class Grows(Poisoned):
    """As rotary embeddings: a cache that grows, and an attribute that says how long it is; another buffer comes in mid-run."""

    def __init__(self):
        super().__init__({6: math.nan, 7: math.nan})
        self.length = 4
        self.register_buffer("cache", torch.ones(4), persistent=False)
        self.register_buffer("count", torch.zeros(1), persistent=False)
        self.register_buffer("sizes", torch.zeros(1))

    def loss(self, batch, batch_idx):
        length = 4 if batch_idx < 4 else 20
        if length > self.length:
            self.length, self.cache = length, torch.ones(length)
            self.register_buffer("late", torch.ones(1))
        self.count += 1
        self.sizes = torch.cat([self.sizes, self.count])
        assert len(self.cache) == self.length
        return super().loss(batch, batch_idx) * self.cache.mean() * (self.late if batch_idx >= 4 else 1.0)


def test_caches_that_have_grown_and_buffers_that_are_new_stay(trainer):
    guard, module = rollback(max_consecutive=2, every=100), Grows()
    trainer(guard).fit(module, data(10))
    assert guard.rollbacks == 1
    assert len(module.cache) == 20
    assert module.late == 1
    assert module.count == 2, "of the same shape: it has gone back"
    assert module.sizes.tolist() == [0, 1, 2], "and so does what a checkpoint would hold, whatever its shape"


def test_a_compiled_module_goes_back(trainer):
    loader = data(BATCHES, batch_size=6)
    torch.manual_seed(0)
    module, clean = Subject(optimizer=O.AdamW), Subject({}, optimizer=O.AdamW)
    module.net.compile(backend="eager")
    fit = trainer(guard := rollback())
    ours = fitted(fit, module, loader)
    assert guard.rollbacks == 1
    assert differences(ours, fitted(trainer(), clean, without(loader, LOST))) == []


def test_a_snapshot_puts_back_trees_that_have_changed_their_shape():
    one, shared = torch.arange(3.0), torch.zeros(2)
    items = [one, {"deep": (shared, 1)}, [shared, None], "word"]
    live = {"items": items, "gone": torch.ones(4), "count": 2}
    memory = Snapshot()
    kept = memory.keep(live)
    gone = live.pop("gone")
    one.fill_(7.0)
    shared.fill_(7.0)
    items[2] = [torch.full((5,), 7.0)]
    live |= {"count": 3, "new": torch.ones(1)}
    restored = memory.put_back(kept, live)
    assert restored is live
    assert live.keys() == {"items", "gone", "count"}
    assert live["items"] is items
    assert items[0] is one
    assert items[1]["deep"][0] is shared
    assert items[2][0] is shared, "two places held the same tensor"
    assert items[2][1] is None
    assert live["gone"] is not gone
    assert torch.equal(live["gone"], torch.ones(4))
    assert (live["count"], items[3]) == (2, "word")
    assert torch.equal(one, torch.arange(3.0))
    assert torch.equal(shared, torch.zeros(2))
    assert memory.nbytes == 4 * (3 + 2 + 4)


def test_a_snapshot_does_not_write_twice_into_a_tensor_that_stands_in_two_places_now():
    memory, live = Snapshot(), [torch.zeros(2), torch.ones(2)]
    kept = memory.keep(live)
    live[1] = live[0]
    memory.put_back(kept, live)
    assert torch.equal(torch.stack(live), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
