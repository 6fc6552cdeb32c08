"""Laws that hold for every limit, scope and norm type, and references for their arithmetic."""

from __future__ import annotations

import io
import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clip_callbacks import (
    ClipRule,
    FixedLimit,
    ParameterTable,
    clip_step,
)
from clip_callbacks.core.blocks import SCOPES
from clip_callbacks.core.tensor_table import TensorTable
from tests.helpers import reference
from tests.helpers.laws import MAKERS, NORM_TYPES, every, gradients, run, with_gradients
from tests.helpers.matrix import matrix
from tests.helpers.records import record_of
from tests.helpers.training import assert_same_bits


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("p", NORM_TYPES)
@given(seed=st.integers(0, 1000), limit=st.floats(0.01, 20))
@settings(max_examples=25, deadline=None)
def test_fixed_limit_equals_a_plain_loop(scope, p, seed, limit):
    module = with_gradients(seed)
    before = gradients(module)
    norms, coefficients = reference.clip(before, limit, scope, p)
    report, _ = run(module, limit, scope, p)
    assert list(report.names) == list(norms)
    torch.testing.assert_close(report.norms, torch.tensor(list(norms.values())))
    torch.testing.assert_close(report.coefficients, torch.tensor(list(coefficients.values())))
    for name, gradient in gradients(module).items():
        labels = {"global": "global", "group": "pg1", "layer": reference.layer_of(name), "parameter": name}
        blocks = [labels.get(scope) or reference.unit_of(name, gradient, place) for place in range(gradient.numel())]
        expected = torch.tensor([coefficients[block] for block in blocks]).view_as(gradient) * before[name]
        torch.testing.assert_close(gradient, expected)


@every
def test_coefficients_and_norms_are_bounded(make, scope, p):
    limit, state = make(1.0), None
    for seed in range(8):
        module = with_gradients(seed, size=10.0 ** (seed % 5))
        report, state = run(module, limit, scope, p, state)
        assert ((report.coefficients >= 0) & (report.coefficients <= 1)).all()
        after = clip_step(module.named_parameters(), rules=[ClipRule(None, scope)], norm_type=p)[0]
        assert (after.norms <= report.limits * (1 + 1.3e-6)).all()  # float32, as in assert_close
        torch.testing.assert_close(after.total_norm, report.clipped_norm)
        torch.testing.assert_close(report.clipped_norm / report.total_norm, report.clip_coef)


@every
def test_below_the_limit_gradients_keep_their_bits(make, scope, p):
    limit, state = make(1.0), None
    for seed in range(6):
        module = with_gradients(seed, size=[1e-3, 1.0, 0.7, 3.0, 1.0, 1.1][seed])
        before = gradients(module)
        report, state = run(module, limit, scope, p, state)
        below = report.norms < report.limits * (1 - 1e-5 if isinstance(limit, FixedLimit) else 1)  # 1e-6 is added to the norm
        assert (report.coefficients[below] == 1.0).all()
        table = TensorTable.of_named(module.named_parameters())
        kept = table.partition(scope, by_unit=True).spread(below).expand(len(table.units))
        for name, gradient in gradients(module).items():
            rows = [rows for position, other in enumerate(table.names) if other == name for rows in table.rows(position, gradient)]
            for entries, units, _ in rows:
                same = before[name].view_as(entries) == entries
                assert same[kept[units]].all()


@every
def test_direction_is_kept_within_a_block(make, scope, p):
    _, state = run(with_gradients(0), make(1.0), scope, p)
    module = with_gradients(1, size=50.0)
    before = gradients(module)
    run(module, make(1.0), scope, p, state)
    for name, gradient in gradients(module).items():
        ratio = gradient / before[name]
        ratio = ratio.flatten(1) if scope == "unit" and ratio.ndim > 1 else ratio.view(1, -1)
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("p", NORM_TYPES)
def test_a_limit_without_state_is_idempotent(scope, p):
    module = with_gradients(2, size=50.0)
    run(module, FixedLimit(0.7), scope, p)
    once = gradients(module)
    report, _ = run(module, FixedLimit(0.7), scope, p)
    assert (report.coefficients > 1 - 1e-5).all()
    for name, gradient in gradients(module).items():
        torch.testing.assert_close(gradient, once[name])


@every
def test_gradients_and_limit_scaled_together_give_the_same_coefficients(make, scope, p):
    states = {1.0: None, 1024.0: None, 2.0**-10: None}
    for seed in range(8):
        found = {}
        for scale, state in states.items():
            module = with_gradients(seed, size=4.0 * 3.0 ** (seed % 3) * scale)
            found[scale], states[scale] = run(module, make(scale), scope, p, state)
        if isinstance(make(1.0), FixedLimit):  # not to the bit: 1e-6 is added to a norm of any size
            torch.testing.assert_close(found[1.0].coefficients, found[1024.0].coefficients)
        else:
            for scale in (1024.0, 2.0**-10):
                torch.testing.assert_close(found[1.0].coefficients, found[scale].coefficients)


@every
def test_scale_is_part_of_the_gradient(make, scope, p):
    limit = make(1.0)
    scaled, multiplied = with_gradients(4, size=3.0), with_gradients(4, size=3.0)
    for parameter in multiplied.parameters():
        parameter.grad.mul_(1.5)
    left, _ = run(scaled, limit, scope, p, scale=1.5)
    right, _ = run(multiplied, limit, scope, p)
    torch.testing.assert_close(left.norms, right.norms)
    for a, b in zip(scaled.parameters(), multiplied.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@every
def test_the_old_state_is_not_changed_and_the_new_one_can_be_saved(make, scope, p):
    limit = make(1.0)
    _, state = run(with_gradients(5), limit, scope, p)
    before = [{key: value.clone() for key, value in rule.items()} for rule in state]
    _, after = run(with_gradients(6), limit, scope, p, state)
    assert all(torch.equal(rule[key], old[key]) for rule, old in zip(state, before, strict=True) for key in rule)
    buffer = io.BytesIO()
    torch.save(after, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert all(torch.equal(rule[key], saved[key]) for rule, saved in zip(after, loaded, strict=True) for key in rule)


@contextmanager
def defaults(device, dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@every
def test_the_defaults_of_torch_do_not_matter(make, scope, p):
    """Norms are read on the host, and not in half precision, whatever ``torch.set_default_device`` and ``…_dtype`` name."""
    results = []
    for device, dtype in [("cpu", torch.float32), ("meta", torch.float16), ("cpu", torch.float64)]:
        state, clipped = None, []
        # the last norm overflows float32, and is measured again
        for seed, size in enumerate([1.0, 1.0, 1.0, 1e25]):
            module = with_gradients(seed, size)
            with defaults(device, dtype):
                report, state = run(module, make(1.0), scope, p, state, shadow=[ClipRule(0.1, scope)])
            assert not report.skipped
            clipped += [report.total_norm, *gradients(module).values()]
        results.append(clipped)
    for others in results[1:]:
        assert_same_bits(results[0], others)


@matrix(make=MAKERS, scope=SCOPES, p=NORM_TYPES, bad=[math.nan, math.inf], policy=["skip", "ignore"], step=[0, 2])
def test_a_nonfinite_step_leaves_no_trace_in_the_state(make, scope, p, bad, policy, step):
    limit, states = make(1.0), {}
    for poisoned in (True, False):
        state = None
        for seed in range(4):
            if seed == step and poisoned:
                module = with_gradients(99)
                module[0].weight.grad[0, 0] = bad
                report, state = run(module, limit, scope, p, state, nonfinite=policy)
                assert not report.total_norm.isfinite()
                assert report.outcome == {"skip": "skipped", "ignore": "ignored"}[policy]
            _, state = run(with_gradients(seed), limit, scope, p, state)
        states[poisoned] = state
    for left, right in zip(states[True], states[False], strict=True):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)


@matrix(make=MAKERS, p=NORM_TYPES, rules=[1, 2])
def test_decided_on_the_device_as_on_the_host(make, p, rules):
    """Equal coefficients, gradients and states over a history with bad steps, the first one among them."""
    limit, states = make(1.0), {True: None, False: None}
    for seed in range(8):
        reports, written = {}, {}
        for deferred in (True, False):
            module = with_gradients(seed, size=10.0 ** (seed % 3))
            if seed in {0, 5}:
                module[0].weight.grad[0, 0] = (math.nan, math.inf)[seed % 2]
            stages = [ClipRule(limit), ClipRule(0.2)][:rules]
            reports[deferred], states[deferred] = clip_step(
                module.named_parameters(),
                states[deferred],
                rules=stages,
                shadow=[ClipRule(limit)],
                norm_type=p,
                nonfinite="ignore",
                deferred=deferred,
            )
            written[deferred] = gradients(module)
        ours, theirs = record_of(reports[True]).to_host().decided_on_host(), record_of(reports[False])
        torch.testing.assert_close(written[True], written[False], equal_nan=True)
        torch.testing.assert_close(ours.coefficients, theirs.coefficients)
        torch.testing.assert_close(ours.norms, theirs.norms, equal_nan=True)
        assert (ours.clipped, bool(ours.finite)) == (theirs.clipped, bool(theirs.finite))
        assert [outcome.clips for outcome in ours.shadows] == [outcome.clips for outcome in theirs.shadows]
        for left, right in zip(*states.values(), strict=True):
            torch.testing.assert_close(left, right)


def test_global_then_local_from_one_read():
    module = with_gradients(8, size=5.0)
    before = gradients(module)
    report, _ = clip_step(module.named_parameters(), rules=[ClipRule(3.0), ClipRule(0.5, "parameter")])
    _norms, first = reference.clip(before, 3.0, "global", 2.0)
    halfway = {name: gradient.double() * first["global"] for name, gradient in before.items()}
    _, second = reference.clip(halfway, 0.5, "parameter", 2.0)
    for name, gradient in gradients(module).items():
        torch.testing.assert_close(gradient, (halfway[name] * second[name]).float())
    assert report.names[0] == "global"
    assert len(report.names) == 1 + len(before)
    assert report.max_norm.item() == 3.0


def test_a_rule_holds_for_its_parameters_only():
    module = with_gradients(9, size=5.0)
    before = gradients(module)
    report, _ = clip_step(module.named_parameters(), rules=[ClipRule(0.1, include="bias"), ClipRule(None)])
    for name, gradient in gradients(module).items():
        assert torch.equal(gradient, before[name]) is ("bias" not in name)
    biases = [x for name, gradient in before.items() if "bias" in name for x in reference.entries(gradient)]
    torch.testing.assert_close(report.norms[0], torch.tensor(reference.norm(biases, 2.0)))


def test_clip_value_afterwards():
    module = with_gradients(10, size=5.0)
    before = gradients(module)
    clip_step(module.named_parameters(), rules=[ClipRule(3.0)], clip_value=0.2)
    coefficient = reference.clip(before, 3.0, "global", 2.0)[1]["global"]
    for name, gradient in gradients(module).items():
        torch.testing.assert_close(gradient, (before[name] * coefficient).clamp(-0.2, 0.2))


def test_clip_value_of_sparse_and_complex_gradients():
    embedding, weight = nn.Embedding(5, 2, sparse=True), nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    (3.0 * embedding(torch.tensor([1, 1, 2]))).sum().backward()
    weight.grad = torch.tensor([3 + 4j, 0.1 - 9j])
    clip_step([embedding.weight, weight], rules=[], clip_value=4.0)
    assert embedding.weight.grad.to_dense()[1].tolist() == [4.0, 4.0]
    assert embedding.weight.grad.to_dense()[2].tolist() == [3.0, 3.0]
    torch.testing.assert_close(weight.grad, torch.tensor([3 + 4j, 0.1 - 4j]))


def test_shared_parameters_count_once_under_their_first_name():
    module = nn.Module()
    module.first, module.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    module.second.weight = module.first.weight
    module.first.weight.grad = torch.full((2, 2), 3.0)
    report, _ = clip_step([("first.weight", module.first.weight), ("second.weight", module.second.weight)], rules=[ClipRule(3.0)])
    assert report.total_norm.item() == 6.0
    torch.testing.assert_close(module.first.weight.grad, torch.full((2, 2), 1.5))


def test_groups_are_those_of_the_optimizer():
    module = with_gradients(11, size=5.0)
    optimizer = torch.optim.SGD(
        [{"params": module[0].parameters(), "name": "stem"}, {"params": [*module[1].parameters(), *module[2].parameters()]}], lr=0.1
    )
    report, _ = clip_step(ParameterTable(optimizer, module.named_parameters()), rules=[ClipRule(1.0, "group")])
    assert report.names == ("stem", "pg2")
    stem = [x for parameter in module[0].parameters() for x in reference.entries(parameter.grad)]
    assert reference.norm(stem, 2.0) == pytest.approx(1.0, rel=1e-5)


def test_unused_parameters_keep_the_shape_of_the_report():
    module = with_gradients(12)
    module[0].bias.grad = None
    report, _ = run(module, FixedLimit(0.1), "parameter", 2.0)
    assert report.names[1] == "0.bias"
    assert report.norms[1].item() == 0.0
    assert report.coefficients[1].item() == 1.0
    assert module[0].bias.grad is None


def test_names_without_a_module():
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    optimizer = torch.optim.SGD([weight], lr=0.1)
    assert clip_step(optimizer, rules=[ClipRule(1.0, "parameter")])[0].names == ("pg1.0",)
    assert clip_step({"w": weight}, rules=[ClipRule(1.0, "layer")])[0].names == ("(root)",)
    assert clip_step(weight, rules=[ClipRule(1.0, "parameter")])[0].names == ("0",)


@pytest.mark.parametrize("policy", ["skip", "zero", "ignore", "raise"])
def test_policies_of_a_plain_loop(policy):
    from clip_callbacks import NonFiniteGradientError

    module = with_gradients(13, size=5.0)
    module[2][0].weight.grad[0, 0] = math.nan
    module[2][0].weight.grad[0, 1] = -math.inf
    before = gradients(module)
    if policy == "raise":
        with pytest.raises(NonFiniteGradientError, match=r"2\.0\.weight \[2, 4\]: 1 NaN and 1 inf"):
            run(module, FixedLimit(1.0), "global", 2.0, nonfinite=policy)
        assert all(torch.equal(gradient.nan_to_num(7), before[name].nan_to_num(7)) for name, gradient in gradients(module).items())
        return
    report, _ = run(module, FixedLimit(1.0), "global", 2.0, nonfinite=policy)
    assert report.outcome == {"skip": "skipped", "zero": "zeroed", "ignore": "ignored"}[policy]
    assert report.skipped.item() is (policy == "skip")
    if policy == "skip":
        assert all(parameter.grad is None for parameter in module.parameters())
    if policy == "zero":
        zeroed = {name: gradient.nan_to_num(0, 0, 0) for name, gradient in before.items()}
        coefficient = reference.clip(zeroed, 1.0, "global", 2.0)[1]["global"]
        for name, gradient in gradients(module).items():
            torch.testing.assert_close(gradient, zeroed[name] * coefficient)
    if policy == "ignore":
        assert all(torch.equal(gradient.nan_to_num(7), before[name].nan_to_num(7)) for name, gradient in gradients(module).items())


def test_ignored_nan_in_one_block_does_not_keep_others_from_being_clipped():
    module = with_gradients(14, size=5.0)
    module[2][0].weight.grad[0, 0] = math.nan
    before = gradients(module)
    report, _ = run(module, FixedLimit(0.1), "parameter", 2.0, nonfinite="ignore")
    assert torch.equal(module[2][0].weight.grad.nan_to_num(7), before["2.0.weight"].nan_to_num(7))
    torch.testing.assert_close(module[0].weight.grad.norm(), torch.tensor(0.1), rtol=1e-4, atol=0)  # 1e-6 beside the norm
    assert report.coefficients[report.names.index("2.0.weight")].item() == 1.0
