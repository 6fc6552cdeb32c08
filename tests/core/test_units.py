"""scope="unit": one norm for each output row, from one read."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clip_callbacks import ClipRule, RatioLimit, clip_step
from clip_callbacks.core.rules import selection_of
from clip_callbacks.core.tensor_table import TensorTable
from clip_callbacks.core.units import Units
from tests.helpers import reference
from tests.helpers.matrix import examples
from tests.helpers.operations import SYNCS, count
from tests.helpers.records import record_of


def unit_norms(gradient, p):
    rows = gradient.reshape(1, -1) if gradient.ndim <= 1 else gradient.reshape(len(gradient), -1)
    return [reference.norm(reference.entries(row), p) for row in rows]


class Mixed(nn.Module):
    """A layer of every kind that has output rows, and parameters that are one unit."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(7, 3, dtype=dtype), nn.Linear(3, 5, dtype=dtype)
        self.conv = nn.Conv2d(2, 4, 3, dtype=dtype).to(memory_format=torch.channels_last)
        self.transposed, self.norm = nn.ConvTranspose1d(3, 2, 2, dtype=dtype), nn.LayerNorm(6, dtype=dtype)
        self.scalar, self.flat = nn.Parameter(torch.ones((), dtype=dtype)), nn.Parameter(torch.ones(1, 9, dtype=dtype))

    def fill(self, size=1.0, seed=0):
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.grad = torch.empty_like(parameter).copy_(size * torch.randn(parameter.shape, generator=generator))
        return self


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_norms_and_coefficients_of_every_kind_of_layer(p, dtype):
    module = Mixed(dtype).fill(3.0)
    before = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    report, _ = clip_step(module.named_parameters(), rules=[ClipRule(2.0, "unit")], norm_type=p)
    expected = [norm for gradient in before.values() for norm in unit_norms(gradient, p)]
    assert len(report.names) == len(expected) == 7 + 5 + 1 + 4 + 1 + 3 + 1 + 2 + 1 + 1
    torch.testing.assert_close(report.norms.double(), torch.tensor(expected, dtype=torch.float64), rtol=1.3e-6, atol=1e-5)
    coefficients = [reference.coefficient(norm, 2.0) for norm in expected]
    torch.testing.assert_close(
        report.coefficients.double(), torch.tensor(coefficients, dtype=torch.float64), rtol=1.3e-6, atol=1e-5
    )
    left = iter(coefficients)
    for name, parameter in module.named_parameters():
        rows = 1 if parameter.ndim <= 1 else len(parameter)
        factors = torch.tensor([next(left) for _ in range(rows)], dtype=torch.float64)
        shape = factors.shape + (1,) * (parameter.ndim - 1) if parameter.ndim else ()
        torch.testing.assert_close(parameter.grad, (before[name].double() * factors.view(shape)).to(dtype))
    torch.testing.assert_close(report.total_norm.double().item(), reference.norm(expected, p), rtol=1.3e-6, atol=1e-5)
    torch.testing.assert_close(
        record_of(report).parameter_norms.double(),
        torch.tensor([reference.norm(reference.entries(gradient), p) for gradient in before.values()], dtype=torch.float64),
        rtol=1.3e-6,
        atol=1e-5,
    )


def test_names_say_the_row():
    module = Mixed()
    names = TensorTable.of_named(module.named_parameters()).partition("unit").names
    assert (names[0], names[1], names[2], names[-1]) == ("scalar", "flat[0]", "embedding.weight[0]", "norm.bias")
    assert list(names[2:4]) == ["embedding.weight[0]", "embedding.weight[1]"]
    assert "linear.bias" in names
    assert "linear.bias[0]" not in names
    with pytest.raises(IndexError):
        names[len(names)]


def test_the_clipped_norm_is_that_of_the_gradients_that_are_left():
    module = Mixed().fill(3.0)
    report, _ = clip_step(module.named_parameters(), rules=[ClipRule(2.0, "unit")])
    left = math.sqrt(math.fsum(x * x for parameter in module.parameters() for x in reference.entries(parameter.grad)))
    assert report.clipped_norm.item() == pytest.approx(left, rel=1e-6)
    assert report.clip_coef.item() == pytest.approx(left / report.total_norm.item(), rel=1e-6)


def test_units_then_all_together_then_layers():
    """Every scope can stand beside the finest one."""
    module = Mixed().fill(3.0)
    rules = [
        ClipRule(2.0, "unit", exclude="norm"),
        ClipRule(3.0),
        ClipRule(0.5, "layer"),
        ClipRule(0.4, "parameter", include="conv"),
    ]
    clip_step(module.named_parameters(), rules=rules)
    slow = Mixed().fill(3.0)
    for rule in rules:
        for_each = [(name, parameter) for name, parameter in slow.named_parameters() if name in selection_of(rule)]
        clip_step(for_each, rules=[ClipRule(rule.max_norm, rule.scope)])
    for ours, theirs in zip(module.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_rule_of_patterns_leaves_other_rows_their_bits():
    module = Mixed().fill(3.0)
    before = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    clip_step(module.named_parameters(), rules=[ClipRule(0.1, "unit", include="weight", exclude=r"^embedding|^norm")])
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.grad, before[name]) is (name not in {"linear.weight", "conv.weight", "transposed.weight"})


def test_sparse_embeddings():
    sparse, dense = nn.Embedding(6, 3, sparse=True), nn.Embedding(6, 3)
    dense.load_state_dict(sparse.state_dict())
    for embedding in (sparse, dense):
        (torch.arange(1.0, 4.0) * embedding(torch.tensor([4, 1, 4]))).sum().backward()
        report, _ = clip_step(embedding.named_parameters(), rules=[ClipRule(4.0, "unit")])
        assert report.norms.tolist() == pytest.approx([0, 14**0.5, 0, 0, 2 * 14**0.5, 0])
    torch.testing.assert_close(sparse.weight.grad.to_dense(), dense.weight.grad)


def test_sparse_gradients_without_rows_are_refused():
    weight = nn.Parameter(torch.zeros(3, 4))
    weight.grad = torch.eye(3, 4).to_sparse()
    with pytest.raises(ValueError, match='`scope` must not be "unit" beside sparse gradients .* got .* for w'):
        clip_step({"w": weight}, rules=[ClipRule(1.0, "unit")])


@pytest.mark.parametrize(("size", "all_of_them"), [(1e-18, 1.0), (1e30, 1.0), (1.0, 1e-30), (1e-8, 1e-30), (1e3, 1e30)])
def test_rows_whose_squares_leave_float32(size, all_of_them):
    """But for those that vanish beside others: a row of 1e-30 beside rows of 1 counts as 0, which most rows of 0 are."""
    module = Mixed().fill(all_of_them)
    with torch.no_grad():
        module.linear.weight.grad[2] *= size
        module.embedding.weight.grad[3] = 0.0
    rows = {name: unit_norms(parameter.grad, 2.0) for name, parameter in module.named_parameters()}
    report, _ = clip_step(module.named_parameters(), rules=[ClipRule(None, "unit")])
    expected = torch.tensor([norm for norms in rows.values() for norm in norms], dtype=torch.float64)
    torch.testing.assert_close(report.norms.double(), expected, rtol=1.3e-6, atol=0)
    assert report.outcome == "taken"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_is_named_and_scales_nothing(bad):
    module = Mixed().fill(3.0)
    module.linear.weight.grad[2, 1] = bad
    before = [parameter.grad.clone() for parameter in module.parameters()]
    report, _ = clip_step(module.named_parameters(), rules=[ClipRule(0.1, "unit")], nonfinite="ignore")
    assert report.outcome == "ignored"
    assert report.coefficients[list(report.names).index("linear.weight[2]")] == 1.0
    places = [name for name, _ in module.named_parameters()]
    assert torch.equal(module.linear.weight.grad[2].nan_to_num(7), before[places.index("linear.weight")][2].nan_to_num(7))
    assert module.linear.weight.grad[1].norm() < 0.11


def test_one_read_one_write_and_no_sync():
    layers = [nn.Linear(4, 3) for _ in range(50)]
    for layer in layers:
        layer.weight.grad, layer.bias.grad = torch.ones(3, 4), torch.ones(3)
    counts = count(TensorTable.of_named(nn.ModuleList(layers).named_parameters()), rules=[ClipRule(0.1, "unit"), ClipRule(1.0)])
    assert counts["aten.linalg_vector_norm"] == 100 + 3, "each tensor once; of rows, the norms of tensors, and the total norm twice"
    assert counts["aten._foreach_mul_"] == 1
    assert not SYNCS & set(counts)


def test_the_ratio_limit_is_that_of_the_published_formula():
    """Brock et al., equation 3, in float64, row by row."""
    torch.manual_seed(0)
    module = Mixed().fill(0.3)
    nn.init.zeros_(module.norm.bias)
    expected = []
    for parameter in module.parameters():
        weights, gradients = (it.detach().double().reshape(len(it) if it.ndim > 1 else 1, -1) for it in (parameter, parameter.grad))
        limits = 0.1 * weights.norm(dim=1).clamp(min=1e-3)
        norms = gradients.norm(dim=1)
        expected.append((gradients * torch.where(norms > limits, limits / norms, 1.0)[:, None]).view_as(parameter).float())
    clip_step(module.named_parameters(), rules=[ClipRule(RatioLimit(0.1), "unit")])
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@given(shape=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3)), data=st.data())
@settings(max_examples=examples(60), deadline=None)
def test_flat_pieces_hold_each_entry_of_each_row_once(shape, data):
    """As FullyShardedDataParallel cuts flattened parameters: anywhere."""
    size = math.prod(shape)
    cuts = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=3))})
    whole = torch.arange(size, dtype=torch.float64)
    units, sums = Units(((2,), shape)), torch.zeros(1 + shape[0], dtype=torch.float64)
    for start, stop in itertools.pairwise(cuts):
        for entries, which, _ in units.of_shard(1, whole[start:stop], 0, start):
            sums[which] += entries.flatten(1).sum(1)
    torch.testing.assert_close(sums[1:], whole.view(shape[0], -1).sum(1))
