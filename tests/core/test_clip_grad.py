"""``clip_grad_norm_`` against torch's own, and against the checks of torch's tests."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clip_callbacks import clip_grad_norm_, clip_step
from tests.helpers import reference
from tests.helpers.matrix import examples


def parameters(*gradients):
    made = [nn.Parameter(torch.zeros(gradient.shape, dtype=gradient.dtype)) for gradient in gradients]
    for parameter, gradient in zip(made, gradients, strict=True):
        parameter.grad = gradient.clone()
    return made


@given(
    seed=st.integers(0, 10_000),
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=12),
    max_norm=st.sampled_from([1e-3, 0.1, 1.0, 7.0, 1e4]),
    p=st.sampled_from([1.0, 2.0, 3.0, math.inf]),
)
@settings(max_examples=examples(150), deadline=None)
def test_bits_of_torch_in_float32(seed, sizes, max_norm, p):
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(n, generator=generator) for n in sizes]
    ours, theirs = parameters(*gradients), parameters(*gradients)
    assert torch.equal(clip_grad_norm_(ours, max_norm, p), torch.nn.utils.clip_grad_norm_(theirs, max_norm, p))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.grad, b.grad)


@given(seed=st.integers(0, 10_000), count=st.integers(20, 60), p=st.sampled_from([1.0, 2.0]))
@settings(max_examples=examples(150), deadline=None)
def test_bits_of_torch_beside_gradients_without_entries(seed, count, p):
    """Their norms of 0 shift the order in which torch's kernel adds up the others."""
    dice = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(dice.choice([0, 1, 3, 35, 100]), generator=generator) for _ in range(count)]
    ours, theirs, deferred = (parameters(*gradients) for _ in range(3))
    for place in dice.sample(range(count), count // 10):
        ours[place].grad = theirs[place].grad = deferred[place].grad = None
    expected = torch.nn.utils.clip_grad_norm_(theirs, 1.0, p)
    assert torch.equal(clip_grad_norm_(ours, 1.0, p), expected)
    assert torch.equal(clip_step(deferred, norm_type=p, nonfinite="ignore", deferred=True)[0].total_norm, expected)
    for each in zip(ours, deferred, theirs, strict=True):
        a, b, c = (parameter.grad for parameter in each)
        assert c is None or (torch.equal(a, c) and torch.equal(b, c))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("p", [0.5, 1.0, 1.5, 2, 4, "inf"])
@pytest.mark.parametrize("foreach", [None, True, False])
def test_against_a_float64_loop(dtype, p, foreach):
    gradients = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in [(10, 10), (10,), ()]]
    made = parameters(*gradients)
    expected = reference.norm([x for gradient in gradients for x in reference.entries(gradient)], float(p))
    norm = clip_grad_norm_(made, 2.0, p, foreach=foreach)
    torch.testing.assert_close(norm, torch.tensor(expected, dtype=norm.dtype))
    coefficient = reference.coefficient(expected, 2.0)
    for parameter, gradient in zip(made, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, (gradient * coefficient).to(dtype))


def test_small_gradients_keep_their_bits():
    made = parameters(torch.rand(10, 10) / 1000, torch.ones(10) / 500)
    before = [parameter.grad.clone() for parameter in made]
    versions = [parameter.grad._version for parameter in made]
    assert clip_grad_norm_(made, 2.0) <= 2.0
    assert all(torch.equal(parameter.grad, gradient) for parameter, gradient in zip(made, before, strict=True))
    assert [parameter.grad._version for parameter in made] == versions, "a coefficient of 1 writes nothing"


def test_one_tensor_and_a_generator():
    one, two = parameters(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0]))
    assert clip_grad_norm_(one, 1.0) == clip_grad_norm_((p for p in [two]), 1.0)
    assert torch.equal(one.grad, two.grad)


def test_nothing_to_clip():
    assert clip_grad_norm_([nn.Parameter(torch.zeros(3))], 1.0).item() == 0.0
    assert clip_grad_norm_([], 1.0).item() == 0.0
    with pytest.warns(UserWarning, match="empty generator"):
        clip_grad_norm_((p for p in []), 1.0)


@pytest.mark.parametrize("p", [-2.0, -0.5, 0.0])
def test_orders_that_torch_takes_are_taken(p):
    ours, theirs = parameters(torch.rand(5), torch.rand(3)), None
    theirs = parameters(*[parameter.grad for parameter in ours])
    assert torch.equal(clip_grad_norm_(ours, 0.5, p), torch.nn.utils.clip_grad_norm_(theirs, 0.5, p))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("only_one", [True, False])
@pytest.mark.parametrize("p", [0.1, 1.0, 2.0, 3.5, math.inf])
@pytest.mark.parametrize("raises", [True, False])
def test_a_nonfinite_gradient_leaves_all_gradients_alone(bad, only_one, p, raises):
    gradient = torch.ones(10, dtype=torch.float64)
    gradient[: 1 if only_one else None] = bad
    made = parameters(torch.ones(3, dtype=torch.float64), gradient)
    if raises:
        with pytest.raises(RuntimeError, match=f"The total norm of order {p} for gradients from `parameters` is non-finite"):
            clip_grad_norm_(made, 1.0, p, error_if_nonfinite=True)
    else:
        assert not torch.isfinite(clip_grad_norm_(made, 1.0, p))
    assert torch.equal(made[0].grad, torch.ones(3, dtype=torch.float64))
    assert torch.equal(made[1].grad.isnan(), gradient.isnan())


@pytest.mark.parametrize("p", [0.1, 1.0, 2.0, 3.5, math.inf])
@pytest.mark.parametrize("size", [2e22, -2e22, 2e200])
def test_large_finite_gradients_are_no_error(p, size):
    # torch calls the norm of 2e200 non-finite for p = 2 and 3.5; it is not: 2e200 * n^(1/p)
    made = parameters(torch.full((10,), size, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    norm = clip_grad_norm_(made, 1.0, p, error_if_nonfinite=True)
    expected = reference.norm([abs(size)] * 10 + [1.0] * 3, p)
    assert norm.item() == pytest.approx(expected)
    assert clip_grad_norm_(made, 1.0, p).item() == pytest.approx(1.0)


@pytest.mark.parametrize("max_norm", [-1.0, math.nan])
def test_a_negative_or_nan_threshold_is_an_error(max_norm):
    made = parameters(torch.ones(3))
    with pytest.raises(ValueError, match=r"`max_norm` must be at least 0, got"):
        clip_grad_norm_(made, max_norm)
    assert torch.equal(made[0].grad, torch.ones(3))


def test_zero_threshold_clears_as_in_torch():
    made = parameters(torch.ones(3))
    clip_grad_norm_(made, 0.0)
    assert made[0].grad.abs().sum() == 0


def test_where_torch_fails():
    embedding = nn.Embedding(10, 3, sparse=True)
    embedding(torch.tensor([1, 1, 2])).sum().backward()
    with pytest.raises(NotImplementedError):
        torch.nn.utils.clip_grad_norm_(embedding.parameters(), 1.0)
    assert clip_grad_norm_(embedding.parameters(), 1.0).item() == pytest.approx(15**0.5)

    made = parameters(torch.empty(0), torch.tensor([3.0]))
    with pytest.raises(RuntimeError):
        torch.nn.utils.clip_grad_norm_(made, 1.0, "inf")
    assert clip_grad_norm_(made, 10.0, "inf").item() == 3.0

    ours, theirs = (parameters(torch.full((100_000,), 1000.0, dtype=torch.float16)) for _ in range(2))
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    clip_grad_norm_(ours, 1.0)
    assert theirs[0].grad.abs().sum() == 0
    assert ours[0].grad.float().norm().item() == pytest.approx(1.0, rel=5e-3)  # float16 holds 1/316 to 11 bits

    tied = nn.Parameter(torch.zeros(2))
    tied.grad = torch.tensor([3.0, 4.0])
    assert clip_grad_norm_([tied, tied], 100.0).item() == 5.0
