from __future__ import annotations

import math
from array import array

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clip_callbacks import ClipRule, clip_step
from clip_callbacks.core.blocks import OUTSIDE, Partition
from clip_callbacks.core.buckets import (
    MAX_BUCKET_ENTRIES,
    MAX_SMALL_ENTRIES,
    MIN_TENSORS,
    MIN_TENSORS_BESIDE_OTHERS,
    Buckets,
)
from clip_callbacks.core.coefficients import EPS, coefficients
from clip_callbacks.core.few_values import MAX_VALUES_FOR_PYTHON, extremes
from clip_callbacks.core.gradients import gradients_of
from clip_callbacks.core.measurement import MeasurementSpec, block_norms, measure
from clip_callbacks.core.piecewise_norms import CHUNK_ENTRIES
from clip_callbacks.core.tensor_norms import norms_in_float64, tensor_norms
from clip_callbacks.core.tensor_table import TensorTable
from tests.helpers import reference
from tests.helpers.matrix import examples

NORM_TYPES = [0.5, 1.0, 2.0, 3.0, 4.0, math.inf]


def holder(gradient: torch.Tensor) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(gradient.shape, dtype=gradient.dtype))
    parameter.grad = gradient
    return parameter


def total(*gradients: torch.Tensor, p: float = 2.0, local: bool = False) -> torch.Tensor:
    table = TensorTable.of_tensors(holder(gradient) for gradient in gradients)
    return measure(gradients_of(table), p, spec=MeasurementSpec(local=local)).total


@pytest.mark.parametrize("p", NORM_TYPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_tensor_norms_equal_a_float64_loop(p, dtype):
    tensors = [torch.randn(shape, dtype=torch.float32).to(dtype) for shape in [(3, 5), (7,), (), (2, 3, 4)]]
    expected = [reference.norm(reference.entries(tensor), p) for tensor in tensors]
    norms = tensor_norms(tensors, p)
    assert norms.dtype is (torch.float64 if dtype in {torch.float64, torch.complex128} else torch.float32)
    torch.testing.assert_close(norms, torch.tensor(expected, dtype=norms.dtype))
    torch.testing.assert_close(norms_in_float64(tensors, p), torch.tensor(expected, dtype=torch.float64))


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    exponent=st.integers(-30, 30),
    p=st.sampled_from(NORM_TYPES),
    seed=st.integers(0, 1000),
)
@settings(max_examples=examples(150), deadline=None)
def test_total_norm_is_true_at_any_size_of_the_gradients(sizes, exponent, p, seed):
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(n, generator=generator) * 10.0**exponent for n in sizes]
    expected = reference.norm([x for gradient in gradients for x in reference.entries(gradient)], p)
    measured = total(*gradients, p=p)
    if math.isinf(expected):  # the norm of huge entries for p < 1 is beyond float64 too
        assert torch.isinf(measured)
    else:
        # torch takes the root as a float32 power: 1/p is rounded, which costs log(sum) * 6e-8, up to 5e-6 near the ends of float32
        rtol = 1.3e-6 if p in {1.0, 2.0, math.inf} else 1e-5
        torch.testing.assert_close(measured.double(), torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=0.0)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_total_norm_has_the_bits_of_torch(p):
    for seed in range(20):
        torch.manual_seed(seed)
        gradients = [torch.randn(torch.randint(1, 5000, ()).item()) for _ in range(30)]
        theirs = torch.nn.utils.get_total_norm(gradients, p)
        assert torch.equal(total(*gradients, p=p), theirs)


@pytest.mark.parametrize(
    ("gradient", "expected"),
    [
        (torch.full((5,), 1e30), 5**0.5 * 1e30),
        (torch.full((4,), 3e38), 6e38),  # beyond float32, and therefore float64
        (torch.full((5,), 1e-30), 5**0.5 * 1e-30),
        (torch.full((4,), 1e-44), 2 * torch.tensor(1e-44).item()),
        (torch.full((100_000,), 1000.0, dtype=torch.float16), 1000 * 100_000**0.5),
        (torch.full((1000,), 6e4, dtype=torch.float16), torch.tensor(6e4).half().item() * 1000**0.5),
        (torch.full((5,), 1e200, dtype=torch.float64), 5**0.5 * 1e200),
        (torch.full((5,), 1e-200, dtype=torch.float64), 5**0.5 * 1e-200),
    ],
)
def test_finite_gradients_have_a_finite_true_norm(gradient, expected):
    # one running float32 sum of 100,000 equal squares, as in torch's own kernel, is off by up to 1e-4; few entries are exact
    assert total(gradient).item() == pytest.approx(expected, rel=1e-4 if len(gradient) > 1000 else 1e-6)


def test_sum_of_reliable_norms_may_overflow_too():
    assert total(*[torch.full((1,), 1.5e19) for _ in range(4)]).item() == pytest.approx(3e19)


def test_a_tiny_parameter_beside_a_large_one_keeps_its_norm():
    table = TensorTable.of_tensors([holder(torch.full((4,), 1e-25)), holder(torch.ones(4)), holder(torch.zeros(4))])
    measured = measure(gradients_of(table), 2.0, spec=MeasurementSpec(local=True))
    torch.testing.assert_close(measured.norms, torch.tensor([2e-25, 2.0, 0.0]), rtol=1.3e-6, atol=0.0)
    assert measured.norms.dtype is torch.float32


def test_bfloat16_norms_accumulate_in_float32():
    gradient = torch.full((1031,), 1.0004, dtype=torch.bfloat16)
    norm = total(gradient)
    assert norm.dtype is torch.float32
    torch.testing.assert_close(norm, torch.tensor(1031.0).sqrt())


def test_mixed_dtypes():
    gradients = [torch.randn(5), torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.bfloat16), torch.randn(5).half()]
    expected = reference.norm([x for gradient in gradients for x in reference.entries(gradient)], 2.0)
    measured = total(*gradients)
    assert measured.dtype is torch.float64
    assert measured.item() == pytest.approx(expected, rel=1e-6)


def test_sparse_gradients_count_equal_indices_once():
    embedding = nn.Embedding(10, 3, sparse=True)
    embedding(torch.tensor([1, 1, 2, 1])).sum().backward()
    assert not embedding.weight.grad.is_coalesced()
    dense = embedding.weight.grad.to_dense()
    report, _ = clip_step(embedding.named_parameters(), rules=[ClipRule(1.0)])
    assert report.total_norm.item() == pytest.approx(dense.norm().item())
    torch.testing.assert_close(embedding.weight.grad.to_dense(), dense / (dense.norm() + 1e-6))


@pytest.mark.parametrize("p", NORM_TYPES)
def test_empty_tensors_stand_beside_others(p):
    assert total(torch.empty(0), torch.tensor([3.0]), torch.empty(3, 0), p=p).item() == pytest.approx(3.0)


def test_non_contiguous_and_zero_dimensional():
    gradient = torch.randn(6, 8).t()[::2]
    assert not gradient.is_contiguous()
    expected = reference.norm([*reference.entries(gradient), 2.0], 2.0)
    assert total(gradient, torch.tensor(-2.0)).item() == pytest.approx(expected, rel=1e-6)


def test_no_gradient_at_all():
    report, _ = clip_step([nn.Parameter(torch.zeros(3))])
    assert report.total_norm.item() == 0.0
    assert report.clip_coef.item() == 1.0


def test_scaling_is_exact_in_float64():
    weight = holder(torch.tensor([3.0], dtype=torch.float64))
    clip_step([weight], rules=[], scale=1 / 3)
    assert weight.grad.item() == 1.0


def test_a_scale_that_overflows_the_norm_but_not_the_entries():
    weight = holder(torch.full((10_000,), 1e36))
    report, _ = clip_step([weight], rules=[], scale=4.0)
    assert report.outcome == "taken"
    assert report.total_norm.item() == pytest.approx(4e38, rel=1e-4)  # one running float32 sum of 10,000
    torch.testing.assert_close(weight.grad, torch.full((10_000,), 4e36))


@pytest.mark.parametrize("count", [1, 2, MAX_VALUES_FOR_PYTHON, MAX_VALUES_FOR_PYTHON + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", NORM_TYPES)
def test_clipped_norm_of_local_rules(count, dtype, p):
    sizes = torch.rand(count, dtype=dtype).mul_(4.0).tolist()
    report, _ = clip_step(
        [holder(torch.tensor([size], dtype=dtype)) for size in sizes], rules=[ClipRule(1.5, "parameter")], norm_type=p
    )
    total = reference.norm(sizes, p)
    clipped = reference.norm([size * min(1.0, 1.5 / (size + EPS)) for size in sizes], p)
    torch.testing.assert_close(report.clipped_norm, torch.tensor(clipped, dtype=dtype))
    torch.testing.assert_close(report.clip_coef, torch.tensor(clipped / total, dtype=dtype))


@pytest.mark.parametrize("count", [1, MAX_VALUES_FOR_PYTHON, MAX_VALUES_FOR_PYTHON + 1])
def test_extremes_and_what_hides_them(count):
    values = torch.rand(count).add_(0.5)
    assert extremes(values) == (values.amin().item(), values.amax().item())
    values[-1] = math.inf
    assert extremes(values)[1] == math.inf
    values[0] = math.nan
    assert all(map(math.isnan, extremes(values)))
    assert extremes(values[:0]) == (math.inf, 0.0)


@pytest.mark.parametrize("p", NORM_TYPES)
def test_clipped_norm_beside_nan_and_inf_is_nan(p):
    report, _ = clip_step(
        [holder(torch.tensor([size])) for size in (math.nan, math.inf, 30.0)],
        rules=[ClipRule(1.0, "parameter")],
        nonfinite="ignore",
        norm_type=p,
    )
    assert report.total_norm.isnan()
    assert report.clipped_norm.isnan()


def test_clipped_norm_of_local_rules_does_not_overflow():
    large, small = holder(torch.full((4,), 1e25)), holder(torch.tensor([3.0, 4.0]))
    report, _ = clip_step({"a": large, "b": small}, rules=[ClipRule(1.0, "parameter", include="b")])
    assert report.total_norm.item() == pytest.approx(2e25)
    assert report.clipped_norm.item() == pytest.approx(2e25)
    assert report.clip_coef.item() == pytest.approx(1.0)


@pytest.mark.parametrize("size", [1e-22, 3e-23])
def test_float32_beside_float64_keeps_its_true_norm(size):
    parameters = [holder(torch.full((1000,), size)), holder(torch.zeros(2, dtype=torch.float64))]
    report, _ = clip_step(parameters, rules=[ClipRule(None, "parameter")])
    assert report.norms[0].item() == pytest.approx(torch.tensor(size).item() * 1000**0.5, rel=1e-6)
    assert report.total_norm.item() == pytest.approx(torch.tensor(size).item() * 1000**0.5, rel=1e-6)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_compressed_sparse_gradients():
    weight = nn.Parameter(torch.eye(2).to_sparse_csr())
    weight.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]]).to_sparse_csr()
    report, _ = clip_step([weight], rules=[ClipRule(1.0)])
    assert report.total_norm == 5.0
    torch.testing.assert_close(weight.grad.to_dense(), torch.tensor([[0.6, 0.0], [0.0, 0.8]]))
    weight.grad = torch.tensor([[math.nan, 0.0], [0.0, 4.0]]).to_sparse_csr()
    with pytest.raises(ArithmeticError, match="0 .*1 NaN"):
        clip_step([weight], nonfinite="raise")


@pytest.mark.parametrize("number", [np.float32(0.5), np.int64(1)])
def test_numpy_numbers_are_numbers(number):
    assert ClipRule(number).max_norm == number


SHAPES = [(1,), (7,), (64,), (3, 5), (8, 3, 3, 3), (MAX_SMALL_ENTRIES,), (MAX_SMALL_ENTRIES + 1,), (50, 100), ()]


@given(
    counts=st.lists(st.tuples(st.sampled_from(SHAPES), st.integers(1, 40)), min_size=1, max_size=4, unique_by=lambda each: each[0]),
    order=st.randoms(use_true_random=False),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]),
    p=st.sampled_from(NORM_TYPES),
)
@settings(max_examples=examples(150), deadline=None)
def test_buckets_have_the_bits_of_one_kernel_for_each_tensor(counts, order, dtype, p):
    shapes = [shape for shape, count in counts for _ in range(count)]
    order.shuffle(shapes)
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    alone = tensor_norms(tensors, p, is_uniform=True)
    buckets = Buckets.of(tensors)
    together = tensor_norms(tensors, p, is_uniform=True, buckets=buckets)
    assert torch.equal(alone, together)
    assert together.dtype is alone.dtype
    small = [count for shape, count in counts if shape and math.prod(shape) <= MAX_SMALL_ENTRIES]
    if buckets is None:
        assert max(small, default=0) < MIN_TENSORS_BESIDE_OTHERS
        assert len(small) < len(counts) or len(small) > 2 or min(small) < MIN_TENSORS


@pytest.mark.parametrize(
    ("counts", "planned"),
    [
        ([15], None),
        ([16], (1, 0)),
        ([16, 15], None),
        ([16, 16], (2, 0)),
        ([31, 1], None),
        ([32, 31, 1], (1, 32)),
        ([40, 16], (2, 0)),
    ],
)
def test_buckets_are_planned_where_they_pay(counts, planned):
    tensors = [torch.ones(1 + shape) for shape, count in enumerate(counts) for _ in range(count)]
    buckets = Buckets.of(tensors)
    assert planned == (buckets and (len(buckets.buckets), len(buckets.others)))


def test_a_bucket_is_read_in_pieces_of_bounded_size():
    tensors = [torch.randn(MAX_SMALL_ENTRIES) for _ in range(3 * MAX_BUCKET_ENTRIES // MAX_SMALL_ENTRIES + 1)]
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        together = tensor_norms(tensors, 2.0, is_uniform=True, buckets=Buckets.of(tensors))
    assert torch.equal(together, tensor_norms(tensors, 2.0, is_uniform=True))
    largest = max(event.cpu_memory_usage for event in profile.events() if event.name == "aten::stack")
    assert largest <= 4 * MAX_BUCKET_ENTRIES


def test_gradients_of_another_dtype_than_their_parameters():
    parameters = [nn.Parameter(torch.zeros(5, dtype=torch.bfloat16)) for _ in range(20)]
    for i, parameter in enumerate(parameters):
        if i % 2:
            parameter.grad_dtype = torch.float32
        parameter.grad = torch.ones(5, dtype=torch.float32 if i % 2 else torch.bfloat16)
    torch.testing.assert_close(measure(gradients_of(TensorTable.of_tensors(parameters)), 2.0).total, torch.tensor(10.0))


def test_sparse_gradients_beside_a_bucket():
    parameters = [nn.Parameter(torch.zeros(10, 2)) for _ in range(20)]
    for parameter in parameters:
        parameter.grad = torch.ones(10, 2)
    parameters[3].grad = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.ones(2, 2), (10, 2), check_invariants=True)
    expected = math.sqrt(19 * 20 + 2 * 2.0**2)
    torch.testing.assert_close(measure(gradients_of(TensorTable.of_tensors(parameters)), 2.0).total, torch.tensor(expected))


@given(
    norm=st.floats(0, 2.0**127, width=32) | st.floats(2.0**-20, 2.0**20, width=32),
    limit=st.floats(1e-30, 1e30) | st.floats(1e-3, 1e3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=examples(500), deadline=None)
def test_the_hosts_coefficient_has_the_bits_of_torchs(norm, limit, dtype):
    norms = torch.tensor([norm], dtype=dtype)
    ours, clips = coefficients(norms, limit)
    theirs = torch.clamp(limit / (norms + EPS), max=1.0) if norm else torch.ones(1, dtype=dtype)
    assert torch.equal(ours.reshape(1), theirs)
    assert clips is bool(theirs < 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", NORM_TYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_large_half_precision_tensors_are_read_piece_by_piece(dtype, p, transposed):
    large = torch.rand(3, CHUNK_ENTRIES // 2 + 7).to(dtype)
    tensors = [large.T if transposed else large, torch.rand(5).to(dtype)]
    exact = norms_in_float64(tensors, p).float()
    # torch's kernels add up to 10^5 terms one by one in float32
    torch.testing.assert_close(tensor_norms(tensors, p), exact, rtol=5e-4 if p < 1 else 5e-5, atol=0.0)
    assert torch.equal(tensor_norms(tensors, p), tensor_norms(tensors, p, is_uniform=True))


def test_large_half_precision_tensors_are_not_converted_as_a_whole():
    tensor = torch.rand(64, CHUNK_ENTRIES // 8).bfloat16()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        tensor_norms([tensor], 2.0)
    assert max(event.cpu_memory_usage for event in profile.events()) <= 4 * CHUNK_ENTRIES + 4096


PARTS = {
    "pairs": [0, 0, 1, 1, 2, 2],
    "uneven": [0, 0, 1, 2, 2, 2],
    "interleaved": [0, 1, 0, 1, 0, 1],
    "some-outside": [0, OUTSIDE, 1, 1, OUTSIDE, 2],
    "one-block-of-some": [0, 0, OUTSIDE, 0, 0, OUTSIDE],
    "one-large-among-small": [0] * 40 + [*range(1, 41)],
}


def test_each_of_several_blocks_is_clipped_with_the_bits_of_torch():
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.zeros(7, 5)) for _ in range(200)] for _ in range(2))
    for one, other in zip(ours, theirs, strict=True):
        one.grad = torch.randn(7, 5) * 10
        other.grad = one.grad.clone()
        nn.utils.clip_grad_norm_([other], 1.3)  # no power of two, of which products are exact
    clip_step(ours, rules=[ClipRule(1.3, "parameter")])
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("index", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("p", NORM_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30, 0.0, math.nan, math.inf])
def test_norms_of_blocks_equal_a_float64_loop(index, p, dtype, size):
    norms = torch.rand(len(index), generator=torch.Generator().manual_seed(0)).to(dtype) + 0.5
    norms[:2] *= size
    members = [[norm for norm, of in zip(norms.tolist(), index, strict=True) if of == block] for block in range(1 + max(index))]
    # the reference divides by the largest, and inf / inf is NaN
    expected = [math.inf if math.inf in each else reference.norm(each, p) for each in members]
    found = block_norms(norms, Partition([str(block) for block in range(len(members))], array("q", index)), p)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64).to(dtype), equal_nan=True)


@pytest.mark.parametrize("scope", ["global", "group", "layer", "parameter", "unit"])
def test_norms_of_blocks_that_nobody_asked_for_are_those_of_their_step(scope):
    """Where the total norm is far below the limit, no norm of a block is needed; the report adds them up when it is asked."""
    net = nn.Sequential(*[nn.Linear(3, 2) for _ in range(4)])
    for parameter in net.parameters():
        parameter.grad = torch.rand(parameter.shape)
    table = TensorTable.of_named(net.named_parameters())
    report, _ = clip_step(table, rules=[ClipRule(1e6, scope)])
    decided, _ = clip_step(table, rules=[ClipRule(1.0001 * float(report.total_norm), scope)])
    torch._foreach_zero_([parameter.grad for parameter in net.parameters()])
    clip_step(table, rules=[ClipRule(1e6, scope)])
    assert torch.equal(report.norms, decided.norms)
    assert report.norms.count_nonzero() == len(report.names)
    assert torch.equal(report.coefficients, torch.ones(len(report.names)))
