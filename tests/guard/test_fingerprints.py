"""Bits of tensors, by which changes are found, and contents of states, which are restored whatever has changed in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clip_callbacks.guard.averages import _fingerprint
from clip_callbacks.guard.contents import Contents, comparable
from clip_callbacks.trainer.fingerprints import ENTRIES_PER_SUM, sum_of_bits

DTYPES = [
    torch.uint8,
    torch.int8,
    torch.bool,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_summed_in_any_dtype(dtype):
    tensor = torch.ones(3, 4).to(dtype)
    before = sum_of_bits(tensor)
    tensor.view(torch.uint8).view(-1)[-1] ^= 1
    assert before is not None
    assert sum_of_bits(tensor) != before
    assert sum_of_bits(tensor[:0]) == 0
    assert sum_of_bits(tensor.t()) == sum_of_bits(tensor)


def test_bits_of_large_tensors_are_summed_piece_by_piece():
    tensor = torch.ones(5, ENTRIES_PER_SUM // 4 + 1, dtype=torch.uint8)
    assert sum_of_bits(tensor) == tensor.numel()


@pytest.mark.filterwarnings("ignore:.*[Qq]uantiz.*", "ignore:.*deprecated.*")
def test_bits_of_tensors_that_do_not_show_them():
    class Shy(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            raise LookupError

    assert sum_of_bits(Shy([1.0])) is None
    assert sum_of_bits(torch.ones(3, device="meta")) is None
    assert sum_of_bits(torch.eye(3).to_sparse()) is None
    quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)
    assert sum_of_bits(quantized) == 30
    with torch.inference_mode():
        made = torch.ones(3)
    assert comparable(made) == comparable(torch.ones(3))


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8, torch.bool, torch.complex64],
)
def test_moves_are_seen_in_the_bits(dtype):
    tensor = nn.Parameter(torch.ones(3, 2).to(dtype).t(), requires_grad=False)
    before = _fingerprint(tensor)
    assert _fingerprint(tensor) == before
    tensor.data[1, 1] = 0
    assert _fingerprint(tensor) != before


def test_what_cannot_be_read_is_known_by_its_version():
    tensor = nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False)
    before = _fingerprint(tensor)
    tensor.mul_(2)
    assert _fingerprint(tensor) != before


leaf = st.one_of(
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.none(),
    st.booleans(),
    st.lists(st.floats(width=32), max_size=4).map(torch.tensor),
)
tree = st.recursive(leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3))


def spoil(value, fresh):
    """Change everything in it that can be changed."""
    if isinstance(value, torch.Tensor):
        value.fill_(3.25)
    elif isinstance(value, dict):
        for item in list(value.values()):
            spoil(item, fresh)
        value.pop(next(iter(value), None), None)
        value["new"] = fresh
    elif isinstance(value, list):
        for item in value:
            spoil(item, fresh)
        value[:1] = [fresh, fresh]


@given(st.dictionaries(st.text(max_size=2), tree, max_size=4), leaf)
def test_every_change_is_restored(state, fresh):
    before, contents = comparable(state, depth=20), Contents()
    contents.add("state", state)
    spoil(state, fresh)
    assert contents.restore() == []
    assert comparable(state, depth=20) == before


def test_a_container_that_holds_itself_is_restored():
    state: dict[str, Any] = {"step": 1}
    state["self"] = state
    contents = Contents()
    contents.add("state", state)
    state |= {"step": 2, "self": None}
    contents.restore()
    assert state["step"] == 1
    assert state["self"] is state
