from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clip_callbacks.core import piecewise_norms
from clip_callbacks.core.gradients import gradients_of
from clip_callbacks.core.measurement import MeasurementSpec, measure
from clip_callbacks.core.piecewise_norms import (
    CHUNK_ENTRIES,
    MIN_ENTRIES,
    REAL_DTYPES,
    chunks,
    large_row_norms,
    norms_of_each,
)
from clip_callbacks.core.tensor_norms import norms_in_float64, row_norms, smallest_reliable_norm, tensor_norms
from clip_callbacks.core.tensor_table import TensorTable
from tests.helpers import reference
from tests.helpers.matrix import examples

ORDERS = [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0, 10.0, 0.3, 2.7, math.inf]
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every other column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "flat": lambda x: x.reshape(-1),
}


@contextmanager
def small_chunks():
    """Chunks of 32 entries, so that tensors which a plain loop can read are large, and have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(piecewise_norms, "CHUNK_ENTRIES", 32)
        patch.setattr(piecewise_norms, "MIN_ENTRIES", 2)
        yield


def tolerance(dtype):
    # float32 rounds log2 and each power, and the error of the sum is divided by p
    return {"rtol": 1e-12 if dtype is torch.float64 else 1e-5, "atol": 0.0}


@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=3),
    layout=st.sampled_from(list(LAYOUTS)),
    exponent=st.integers(-4, 1),
    dtype=st.sampled_from(REAL_DTYPES),
    p=st.sampled_from(ORDERS) | st.floats(0.25, 8.0),
    seed=st.integers(0, 1000),
)
@settings(max_examples=examples(200), deadline=None)
def test_norms_equal_a_float64_loop(shape, layout, exponent, dtype, p, seed):
    generator = torch.Generator().manual_seed(seed)
    tensor = LAYOUTS[layout]((torch.randn(shape, generator=generator) * 10.0**exponent).to(dtype))
    before = tensor.clone()
    with small_chunks():
        (norm,) = norms_of_each([tensor], p)
        rows = large_row_norms(tensor, p) if tensor.ndim > 1 else None
    accumulated = torch.float64 if dtype is torch.float64 else torch.float32
    expected = torch.tensor(reference.norm(reference.entries(tensor), p), dtype=torch.float64)
    # smaller ones, whose powers lose digits to underflow, are measured again
    least = smallest_reliable_norm(p, accumulated)
    if expected >= least:
        torch.testing.assert_close(norm, expected.to(accumulated), **tolerance(dtype))
    if rows is not None:
        expected = torch.tensor([reference.norm(reference.entries(row), p) for row in tensor], dtype=torch.float64)
        is_reliable = expected >= least
        torch.testing.assert_close(rows[is_reliable], expected[is_reliable].to(accumulated), **tolerance(dtype))
    assert torch.equal(tensor, before), "a read changes nothing"


@given(
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    exponent=st.integers(-30, 30),
    p=st.sampled_from(ORDERS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=examples(150), deadline=None)
def test_total_norm_is_true_at_any_size_of_the_gradients(sizes, exponent, p, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    gradients = [(torch.randn(n, generator=generator) * 10.0**exponent).to(dtype) for n in sizes]
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    expected = reference.norm([x for gradient in gradients for x in reference.entries(gradient)], p)
    with small_chunks():
        measured = measure(gradients_of(TensorTable.of_tensors(parameters)), p, spec=MeasurementSpec(local=True))
    if math.isinf(expected):
        assert torch.isinf(measured.total)
    else:
        # near the ends of float32 log2 is -100 or 100 and is rounded by 4e-6, which exp2 passes on
        rtol = 1e-5 if (2 * p) % 1 == 0 or math.isinf(p) else 3e-5
        torch.testing.assert_close(measured.total.double(), torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=0.0)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("dtype", REAL_DTYPES)
def test_zeros_and_non_finite_entries(p, dtype):
    tensor = torch.full((MIN_ENTRIES,), -0.0, dtype=dtype)
    (norm,) = norms_of_each([tensor], p)
    assert norm == 0.0
    assert not norm.signbit()
    tensor[5] = -math.inf
    assert norms_of_each([tensor], p)[0] == math.inf
    tensor[7] = math.nan
    assert norms_of_each([tensor], p)[0].isnan()
    rows = tensor.view(8, -1)
    assert row_norms(rows, p).isnan().tolist() == [True] + [False] * 7


@pytest.mark.parametrize("entries", ["normal", "equal"])
@pytest.mark.parametrize("p", [0.5, 1.0, 1.5, 2.7, 3.0, 4.0])
def test_error_is_at_most_a_tenth_of_torchs(p, entries):
    torch.manual_seed(0)
    tensor = torch.full((1 << 20,), 1.7e-4) if entries == "equal" else torch.randn(1 << 20) * 1e-3
    exact = norms_in_float64([tensor], p)
    ours, theirs = tensor_norms([tensor], p), torch.stack(torch._foreach_norm([tensor], p))
    assert (ours - exact).abs() <= 0.1 * (theirs - exact).abs()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_half_precision_has_the_error_of_float32(dtype, p):
    torch.manual_seed(0)
    tensor = torch.randn(1 << 20).to(dtype)
    torch.testing.assert_close(tensor_norms([tensor], p).double(), norms_in_float64([tensor], p), rtol=5e-6, atol=0.0)


@pytest.mark.parametrize("shape", [(MIN_ENTRIES,), (300, 1000), (CHUNK_ENTRIES + 3,)])
@pytest.mark.parametrize("p", [2.0, math.inf])
@pytest.mark.parametrize("transposed", [False, True])
def test_orders_two_and_infinity_have_the_bits_of_torch_at_any_size(shape, p, transposed):
    tensor = torch.randn(shape)
    if transposed and tensor.ndim > 1:
        tensor = tensor.T
    assert torch.equal(tensor_norms([tensor], p), torch.stack(torch._foreach_norm([tensor], p)))


@pytest.mark.parametrize("p", ORDERS)
def test_small_tensors_have_the_bits_of_torch_beside_large_ones(p):
    small = [torch.randn(MIN_ENTRIES - 1), torch.randn(3), torch.randn(())]
    norms = tensor_norms([small[0], torch.randn(MIN_ENTRIES), *small[1:]], p, is_uniform=True)
    assert torch.equal(norms[[0, 2, 3]], torch.stack(torch._foreach_norm(small, p)))


def test_chunks_hold_each_entry_once():
    whole = torch.arange(6 * (CHUNK_ENTRIES // 2 + 1.0)).view(2, -1)
    for tensor in (whole, whole.T, whole[:, ::2], whole.T[::2], whole.view(3, 2, -1)[:, 1]):
        found = chunks(tensor)
        assert all(chunk.is_contiguous() and chunk.ndim == 1 and len(chunk) <= CHUNK_ENTRIES for chunk in found)
        assert torch.equal(torch.cat(list(found)).sort().values, tensor.reshape(-1).sort().values)


class Wrapper(torch.Tensor):
    """A subclass that has no functions but the multi-tensor norm."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in {torch.abs, torch.mul, torch.aminmax, torch.Tensor.permute}:
            raise NotImplementedError(function)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_subclasses_are_read_by_torch():
    entries = torch.randn(MIN_ENTRIES)
    assert torch.equal(
        norms_of_each([entries.as_subclass(Wrapper)], 3.0)[0].as_subclass(torch.Tensor), torch._foreach_norm([entries], 3.0)[0]
    )


def test_gradients_that_require_gradients():
    entries = torch.randn(MIN_ENTRIES, requires_grad=True) * 2.0
    assert norms_of_each([entries], 1.0)[0] == norms_of_each([entries.detach()], 1.0)[0]


def test_the_largest_entry_of_zeros_has_no_sign():
    """Torch's maximum norm is 0, too, and 1 / -0 would be -inf."""
    for zeros in (torch.zeros(MIN_ENTRIES), -torch.zeros(MIN_ENTRIES)):
        (norm,), rows = tensor_norms([zeros], math.inf), row_norms(zeros.reshape(2, -1), math.inf)
        assert not any(value.signbit() for value in (norm, *rows))
