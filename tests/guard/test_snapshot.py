"""The copy that a rollback returns to, of tensors of all kinds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from clip_callbacks.trainer.snapshot import Snapshot
from tests.helpers.exact_skip import differences
from tests.helpers.exotic import Cloned, Coded, Opaque
from tests.helpers.members import O
from tests.helpers.rollback import BATCHES, LOST, Subject, Weights, fitted, rollback, without
from tests.helpers.training import Poisoned, assert_same_bits, data, weights

pytestmark = pytest.mark.filterwarnings(
    "ignore:Non-finite gradients:RuntimeWarning",
    "ignore:Spike:RuntimeWarning",
    "ignore:Every micro-batch:RuntimeWarning",
    "ignore:.*lr_scheduler.step.*:UserWarning",
)


class Odd(Poisoned):
    """A module with all kinds of tensors that cannot simply be written to."""

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
    guard, module = rollback(max_consecutive=2, every_n_steps=100), Grows()
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
    restored = memory.restore(kept, live)
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
    memory.restore(kept, live)
    assert torch.equal(torch.stack(live), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))


# ---- optimizers' states of other kinds -----------------------------------------------------------------------------------------


class LowBit(O.SGD):
    """Momentum in 8 bits, in a tensor of its own class."""

    def __init__(self, params, kind, lr=0.01):
        super().__init__(params, lr=lr)
        self.kind = kind

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure else None
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["moment"] = self.kind.of(torch.zeros_like(parameter))
            moment = 0.9 * state["moment"].values() + parameter.grad
            state["moment"].set(moment)
            parameter.sub_(moment, alpha=self.param_groups[0]["lr"])
        return loss


def low_bit(kind, bad=(3, 4)):
    torch.manual_seed(0)
    module = Poisoned(dict.fromkeys(bad, math.nan))
    module.configure_optimizers = lambda: LowBit(module.parameters(), kind)
    return module


@pytest.mark.parametrize("kind", [Coded, Cloned])
def test_states_that_are_tensors_of_a_class_of_their_own_go_back(trainer, kind):
    loader, module, clean = list(data(7)), low_bit(kind), low_bit(kind, bad=())
    ours, theirs = trainer(guard := rollback(max_consecutive=2, every_n_steps=2)), trainer()
    ours.fit(module, DataLoader(loader, batch_size=None))
    theirs.fit(clean, DataLoader([*loader[:2], *loader[5:]], batch_size=None))
    assert guard.rollbacks == 1
    assert_same_bits(weights(module), weights(clean))
    states = [[it["moment"].values() for it in fit.optimizers[0].state.values()] for fit in (ours, theirs)]
    assert_same_bits(*states)


def test_states_that_cannot_be_copied_are_refused_by_name_after_the_first_step(trainer):
    fit = trainer(rollback(max_consecutive=2, every_n_steps=100))
    with pytest.raises(ValueError, match=r"`rollback` must be None .*\'moment\' in the state of LowBit.* kind Opaque. Use "):
        fit.fit(low_bit(Opaque), data(7))
    assert fit.global_step == 1


def test_parameters_and_buffers_that_cannot_be_copied_are_refused_before_the_first_step(trainer):
    module = Poisoned({})
    module.register_buffer("codes", Opaque.of(torch.ones(2)))
    with pytest.raises(ValueError, match="the buffer codes, which is of the kind Opaque"):
        trainer(rollback()).fit(module, data(7))


def test_a_snapshot_of_a_tensor_made_of_others_is_one_of_these():
    memory, one = Snapshot(), Coded.of(torch.arange(4.0))
    live, codes = {"one": one, "same": one}, one.codes
    kept = memory.keep(live)
    one.set(torch.zeros(4))
    scale, one.scale = one.scale, torch.zeros(1).expand(1)
    live.pop("same")
    live["one"] = Coded.of(torch.ones(4))
    restored = memory.restore(kept, live)
    assert restored["one"] is one, "no other can be made like it"
    assert restored["same"] is one
    assert one.codes is codes
    assert torch.equal(one.values(), Coded.of(torch.arange(4.0)).values())
    assert memory.nbytes == codes.numel() + 4
    assert scale is not one.scale


def test_what_has_no_values_stays():
    memory, live = Snapshot(), [torch.empty(2, device="meta")]
    (meta,) = live
    assert memory.restore(memory.keep(live), live)[0] is meta
