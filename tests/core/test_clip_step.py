"""The public surface for plain loops: the arguments of ``clip_step``, the table of parameters, the report."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections import UserList, deque

import pytest
import torch
from torch import nn

from clip_callbacks import ClipRule, FixedLimit, GradientClipping, Limit, ParameterTable, QuantileLimit, clip_step
from clip_callbacks.core.rules import Plan
from tests.helpers.records import record_of


def weight(*entries):
    made = nn.Parameter(torch.zeros(len(entries)))
    made.grad = torch.tensor(entries)
    return made


def shown(thing):
    return {name for name in dir(thing) if not name.startswith("_")}


# ---- the table -----------------------------------------------------------------------------------------------------------------


def test_a_table_of_whatever_holds_parameters():
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD([{"params": [net.weight]}, {"params": [net.bias], "name": "biases"}], lr=0.1)
    named = dict(net.named_parameters())
    for parameters, names, groups in (
        (optimizer, ("pg1.0", "biases.0"), ("pg1", "biases")),
        (net.named_parameters(), ("weight", "bias"), ("pg1", "pg1")),
        (named, ("weight", "bias"), ("pg1", "pg1")),
        (net.parameters(), ("0", "1"), ("pg1", "pg1")),
        (net.weight, ("0",), ("pg1",)),
        ([], (), ()),
    ):
        table = ParameterTable(parameters)
        assert (table.names, table.groups, len(table)) == (names, groups, len(names))
    table = ParameterTable(optimizer, net.named_parameters())
    assert (table.names, table.groups) == (("weight", "bias"), ("pg1", "biases"))
    assert repr(table) == "ParameterTable(2 parameters in 2 groups)"
    assert shown(table) == {"names", "groups"}
    with pytest.raises(AttributeError):
        table.names = ("a", "b")


def test_what_holds_no_parameters_is_refused():
    net = nn.Sequential(nn.Linear(2, 2))
    for wrong in (net, net[0], [net[0].weight, ("bias", net[0].bias)]):
        with pytest.raises(TypeError, match="`parameters` must be an optimizer, tensors, or pairs .*, got .*Pass the optimizer"):
            ParameterTable(wrong)
        with pytest.raises(TypeError, match="`parameters` must be"):
            clip_step(wrong)
    with pytest.raises(ValueError, match="`named` must be left out unless `parameters` is an optimizer, got generator"):
        ParameterTable(net.parameters(), net.named_parameters())


def test_a_table_gives_the_same_step_as_what_it_is_made_of():
    results = []
    for make in (ParameterTable, lambda parameters: parameters):
        pair = {"a": weight(3.0, 4.0), "b": weight(12.0)}
        table, state = make(pair), None
        for _ in range(3):
            report, state = clip_step(table, state, rules=[ClipRule(QuantileLimit(0.5)), ClipRule(1.0, "parameter")])
        results.append([report.norms, report.limits, *(each.grad for each in pair.values())])
    torch.testing.assert_close(*results, rtol=0, atol=0)


class Late(nn.ModuleList):
    """Two layers, of which the second gets its shape when it runs: in a forward pass, or by other data."""

    def __init__(self, kind):
        super().__init__([nn.LazyLinear(3), nn.LazyLinear(2)])
        self.kind = kind
        if kind == "empty":
            self[1] = nn.Linear(3, 2)
            for parameter in self[1].parameters():
                parameter.data = torch.empty(0, *parameter.shape[1:])

    def backward(self, factor, *, both):
        self.zero_grad()
        if both and self.kind == "empty" and not self[1].weight.numel():
            self[1].weight.data, self[1].bias.data = torch.ones(2, 3), torch.ones(2)
        hidden = self[0](torch.ones(2, 4))
        ((self[1](hidden) if both else hidden).sum() * factor).backward()


@pytest.mark.parametrize("scope", ["global", "group", "layer", "parameter", "unit"])
@pytest.mark.parametrize("kind", ["lazy", "empty"])
def test_parameters_that_get_their_entries_after_the_first_step_are_clipped(kind, scope):
    net, rules, state = Late(kind), [ClipRule(1.0, scope)], None
    table = ParameterTable(net.named_parameters())
    for both in (False, False, True, True):
        net.backward(1e3, both=both)
        copies = {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}
        pairs = {name: nn.Parameter(torch.zeros_like(gradient)) for name, gradient in copies.items()}
        for name, pair in pairs.items():
            pair.grad = copies[name].clone()
        expected, _ = clip_step(pairs, rules=rules)
        report, state = clip_step(table, state, rules=rules)
        assert len(pairs) == (4 if both else 2)
        torch.testing.assert_close(report.total_norm, expected.total_norm)
        for name, parameter in net.named_parameters():
            if name in pairs:
                torch.testing.assert_close(parameter.grad, pairs[name].grad)
        if both:
            assert (list(report.names), report.norms.tolist()) == (list(expected.names), expected.norms.tolist())


@pytest.mark.parametrize("kind", ["lazy", "empty"])
def test_a_nan_in_a_parameter_that_got_its_entries_late_skips_the_step(kind):
    net, state = Late(kind), None
    table = ParameterTable(net.named_parameters())
    net.backward(1.0, both=False)
    _, state = clip_step(table, state)
    net.backward(1.0, both=True)
    net[1].weight.grad[0, 0] = math.nan
    report, _ = clip_step(table, state)
    assert report.skipped
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_table_with_parameters_that_never_get_entries_is_not_planned_anew_at_each_step():
    net = Late("lazy")
    table, plans = ParameterTable(net.named_parameters())._table, []
    rules = [ClipRule(1.0, "unit")]
    for _ in range(3):
        net.backward(1.0, both=False)
        clip_step(table, rules=rules)
        plans.append(Plan.of(table, rules, ()))
    assert plans[0] is plans[1] is plans[2]
    net.backward(1.0, both=True)
    clip_step(table, rules=rules)
    assert len(Plan.of(table, rules, ()).rules[0].partition.names) == 3 + 1 + 2 + 1
    assert not table.awaited


def test_a_memory_of_rows_does_not_go_on_once_there_are_more():
    net, rules = Late("lazy"), [ClipRule(QuantileLimit(0.5), "unit")]
    table = ParameterTable(net.named_parameters())
    net.backward(1.0, both=False)
    _, state = clip_step(table, rules=rules)
    net.backward(1.0, both=True)
    with pytest.raises(ValueError, match="or None once a parameter has got other rows"):
        clip_step(table, state, rules=rules)
    clip_step(table, rules=rules)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("grown", ["0.weight", "1.weight"])
def test_rows_of_a_parameter_that_has_grown_are_not_taken_for_those_of_the_next(grown, sparse):
    net = nn.ModuleList([nn.Embedding(3, 2, sparse=sparse), nn.Embedding(3, 2, sparse=sparse)])
    table = ParameterTable(net.named_parameters())

    def backward():
        net.zero_grad()
        sum(layer(torch.arange(len(layer.weight))).sum() for layer in net).backward()
        return [parameter.grad.to_dense().clone() for parameter in net.parameters()]

    backward()
    clip_step(table, rules=[ClipRule(1.0, "unit")])
    net.get_parameter(grown).data = torch.zeros(4, 2)
    before = backward()
    with pytest.raises(ValueError, match=rf'must not be "unit" once .* got 4 for {grown}, which had 3\. In a plain loop'):
        clip_step(table, rules=[ClipRule(1.0, "unit")])
    assert all(torch.equal(parameter.grad.to_dense(), each) for parameter, each in zip(net.parameters(), before, strict=True))
    for scope in ("global", "parameter"):
        backward()
        assert float(clip_step(table, rules=[ClipRule(1.0, scope)])[0].total_norm) == pytest.approx(math.sqrt(14))
    clip_step(ParameterTable(net.named_parameters()), rules=[ClipRule(1.0, "unit")])


# ---- groups of equal names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["pg2", None], ["pg2", "pg2-2"]),
        ([None, "pg1"], ["pg1", "pg1-2"]),
        (["x", "x", "x"], ["x", "x-2", "x-3"]),
        (["x", "x", "x-2"], ["x", "x-3", "x-2"]),
        (["x-2", "x", "x", "x-2"], ["x-2", "x", "x-3", "x-2-2"]),
        (["x", None, "y"], ["x", "pg2", "y"]),
    ],
)
def test_groups_of_equal_names_are_several(names, groups):
    weights = [weight(10.0**place) for place, _ in enumerate(names)]
    optimizer = torch.optim.SGD(
        [{"params": [each]} | ({"name": name} if name else {}) for each, name in zip(weights, names, strict=True)], lr=1.0
    )
    table = ParameterTable(optimizer)
    assert table.groups == tuple(groups)
    assert table.names == tuple(f"{group}.0" for group in groups)
    for scope in ("group", "parameter"):
        for place, each in enumerate(weights):
            each.grad = torch.tensor([10.0**place])
        report, _ = clip_step(table, rules=[ClipRule(1.0, scope)])
        assert [len(report.names), *report.norms.tolist()] == [len(names), *(10.0**place for place, _ in enumerate(names))]
        assert [float(each.grad) for each in weights] == pytest.approx([1.0] * len(names), rel=1e-4)


# ---- max_norm and rules --------------------------------------------------------------------------------------------------------


def norms_of(tensors):
    return [float(tensor.grad.norm()) for tensor in tensors if tensor.grad is not None]


def test_a_table_keeps_no_factors_of_other_steps_nor_of_its_copies():
    """The factors of a step are written into a buffer that a table keeps, with a view of each entry."""
    rules = [[ClipRule(limit, "parameter")] for limit in (1.0, 0.5, 0.25)]
    table = ParameterTable([weight(3.0, 4.0), weight(6.0, 8.0), weight(0.0, 0.1)])
    first, _ = clip_step(table, rules=rules[0])
    coefficients = first.coefficients.clone()
    twin = copy.deepcopy(table)
    for each, rule, limit in ((table, rules[1], 0.5), (twin, rules[2], 0.25), (table, rules[2], 0.25)):
        tensors = each._table.tensors
        tensors[0].grad, tensors[1].grad, tensors[2].grad = torch.tensor([3.0, 4.0]), None, torch.tensor([0.0, 0.1])
        clip_step(each, rules=rule)
        assert norms_of(tensors) == pytest.approx([limit, 0.1], rel=1e-4)
    assert torch.equal(first.coefficients, coefficients), "a report keeps what it showed"
    for tensor in table._table.tensors:  # norms, and with them the factors, are now in double precision
        tensor.grad, tensor.data = None, tensor.data.double()
        tensor.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    clip_step(table, rules=rules[0])
    assert norms_of(table._table.tensors) == pytest.approx([1.0] * 3)


@pytest.mark.parametrize("scope", ["unit", "parameter"])
def test_a_deferred_step_with_more_than_one_factor_is_refused_before_it_is_measured(scope):
    """Also if a parameter has no gradient."""
    tensors = [weight(3.0, 4.0), nn.Parameter(torch.zeros(3, 2))]
    optimizer = torch.optim.AdamW(tensors, fused=True)
    with pytest.raises(ValueError, match="one factor for all gradients"):
        clip_step(optimizer, rules=[ClipRule(1.0, scope)], fused=optimizer, deferred=True)


def test_a_deferred_step_with_a_clip_value_is_refused_from_the_first_step_on():
    """A first step with momentum, which the host would decide about, is no exception."""
    tensors = [weight(3.0, 4.0)]
    optimizer = torch.optim.SGD(tensors, lr=0.1, momentum=0.9, fused=True)
    with pytest.raises(ValueError, match="no `clip_value`: one factor for all gradients"):
        clip_step(tensors, fused=optimizer, clip_value=0.1, deferred=True)


@pytest.mark.parametrize("max_norm", [2.0, None, FixedLimit(2.0), QuantileLimit(0.5), math.inf])
def test_max_norm_is_one_global_rule(max_norm):
    plain, ruled = weight(3.0, 4.0), weight(3.0, 4.0)
    left, right = None, None
    for _ in range(3):
        ours, left = clip_step([plain], left, max_norm=max_norm)
        theirs, right = clip_step([ruled], right, rules=[ClipRule(max_norm)])
        assert torch.equal(plain.grad, ruled.grad)
        assert torch.equal(ours.max_norm, theirs.max_norm)
        torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_max_norm_beside_rules_is_refused():
    with pytest.raises(ValueError, match=r"`rules` must not be given beside `max_norm`, got rules and max_norm=2\.0\. Each"):
        clip_step([weight(1.0)], max_norm=2.0, rules=[ClipRule(1.0)])
    for wrong in (0.0, -1.0, True, "a"):
        with pytest.raises(ValueError, match="`max_norm` must be a number above 0, a Limit, or None"):
            clip_step([weight(1.0)], max_norm=wrong)


WRONG_LISTS = [
    ({"rules": ClipRule(1.0)}, TypeError, r"`rules` must be a list of ClipRule, got ClipRule\("),
    ({"rules": [1.0]}, TypeError, r"`rules` must be a list of ClipRule, got \[1.0\]"),
    ({"rules": (ClipRule(1.0), None)}, TypeError, r"`rules` must be a list of ClipRule, got \(ClipRule\("),
    ({"rules": "global"}, TypeError, "`rules` must be a list of ClipRule, got 'global'"),
    ({"rules": [ClipRule(name="a"), ClipRule(name="a")]}, ValueError, "`name` must differ between rules, got a, a: metrics"),
    ({"shadow": 0.5}, TypeError, "`shadow` must be a list of limits and numbers, got 0.5"),
    ({"shadow": 0.0}, TypeError, "`shadow` must be a list of limits and numbers, got 0.0"),
    ({"shadow": "0.5"}, TypeError, "`shadow` must be a list of limits and numbers, got '0.5'"),
    ({"shadow": FixedLimit(0.5)}, TypeError, "`shadow` must be a list of limits and numbers, got FixedLimit"),
    ({"shadow": [-1.0]}, ValueError, "`shadow` must be a number above 0 or a Limit, got -1.0"),
    ({"shadow": [[1.0]]}, ValueError, r"`shadow` must be a number above 0 or a Limit, got \[1.0\]"),
]
"""Mistakes in lists of limits, and the errors that both entries to the package raise."""


@pytest.mark.parametrize("entry", [lambda **options: clip_step([weight(3.0, 4.0)], **options), GradientClipping])
@pytest.mark.parametrize(("options", "error", "message"), WRONG_LISTS)
def test_wrong_lists_of_rules_and_shadows(entry, options, error, message):
    with pytest.raises(error, match=message):
        entry(**options)


def test_rules_that_can_be_read_only_once_are_refused():
    with pytest.raises(TypeError, match="`rules` must be a list of ClipRule, got <generator"):
        clip_step([weight(3.0, 4.0)], rules=(rule for rule in [ClipRule(1.0)]))


@pytest.mark.parametrize("rules", [(ClipRule(2.5),), deque([ClipRule(2.5)]), UserList([ClipRule(2.5)])])
def test_any_sequence_of_rules(rules):
    assert GradientClipping(rules=rules, shadow=UserList([0.5])).rules == [ClipRule(2.5)]
    report, _ = clip_step([weight(3.0, 4.0)], rules=rules, shadow=UserList([0.5]))
    assert (report.max_norm, len(report.shadows)) == (2.5, 1)


@pytest.mark.parametrize("value", [True, "adam", torch.nn.Linear(1, 1), [torch.optim.SGD([weight(1.0)], lr=1.0)]])
@pytest.mark.parametrize("deferred", [False, True])
def test_a_fused_optimizer_that_is_none(value, deferred):
    with pytest.raises(TypeError, match="`fused` must be the optimizer that steps next, or None, got "):
        clip_step([weight(3.0, 4.0)], fused=value, deferred=deferred)


class Unhashable(Limit):
    __hash__ = None

    def step(self, blocks, state):
        return torch.full_like(blocks.norms, 2.5), state


def test_a_limit_without_a_hash():
    report, _ = clip_step([weight(3.0, 4.0)], max_norm=Unhashable())
    assert report.max_norm == 2.5


def test_a_plain_max_norm_is_planned_once(monkeypatch):
    table, planned = ParameterTable([weight(3.0, 4.0)]), []
    of = Plan.of
    monkeypatch.setattr(Plan, "of", lambda *arguments: planned.append(of(*arguments)) or planned[-1])
    for _ in range(3):
        clip_step(table, max_norm=2.0)
    assert planned[0] is planned[1] is planned[2]


# ---- the report ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "options", "outcome"),
    [
        ((3.0, 4.0), {}, "taken"),
        ((math.nan, 4.0), {}, "skipped"),
        ((math.nan, 4.0), {"nonfinite": "zero"}, "zeroed"),
        ((math.nan, 4.0), {"nonfinite": "ignore"}, "ignored"),
        ((3.0, 4.0), {"skip_above": 4.0}, "skipped"),
        ((3.0, 4.0), {"nonfinite": "ignore", "deferred": True}, "pending"),
    ],
)
def test_an_outcome_compares_with_strings(entries, options, outcome):
    report, _ = clip_step([weight(*entries)], **options)
    assert report.outcome == outcome
    assert f"{report.outcome}" == str(report.outcome) == report.outcome.value == outcome
    assert {outcome: 1}[report.outcome] == 1
    assert json.dumps(report.outcome) == f'"{outcome}"'
    assert report.skipped.item() is report.outcome.is_skipped is (outcome == "skipped")


def test_a_report_shows_what_is_for_users():
    report, _ = clip_step({"a": weight(3.0, 4.0)}, shadow=[ClipRule(0.5), ClipRule(100.0)])
    assert shown(report) == {
        *("outcome", "skipped", "total_norm", "clipped_norm", "clip_coef", "max_norm"),
        *("names", "norms", "limits", "coefficients", "shadows", "metrics"),
    }
    assert [it.ndim for it in (report.skipped, report.total_norm, report.clipped_norm, report.clip_coef, report.max_norm)] == [
        0
    ] * 5
    assert (report.names, report.norms.tolist(), report.limits.tolist()) == (("global",), [5.0], [1.0])
    assert [shadow.limits for shadow in report.shadows] == [0.5, 100.0]
    assert repr(report).startswith("StepReport(taken, total_norm=tensor(5.), clip_coef=tensor(0.2")
    with pytest.raises(AttributeError):
        report.total_norm = 1.0


def test_a_report_can_be_copied_and_equals_itself_only():
    report, _ = clip_step([weight(3.0, 4.0)], rules=[ClipRule(1.0, "parameter")])
    other, _ = clip_step([weight(3.0, 4.0)], rules=[ClipRule(1.0, "parameter")])
    assert report == type(report)(record_of(report))
    assert len({report, type(report)(record_of(report)), other}) == 2
    assert report != other
    assert report != "taken"
    assert copy.copy(report) == report
    for copied in (copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
        assert (copied.outcome, copied.names) == ("taken", ("0",))
        assert torch.equal(copied.coefficients, report.coefficients)


def test_metrics_are_those_of_a_dashboard_with_the_rules_and_without_what_is_not_finite():
    pair = {"a": weight(3.0, 4.0), "b": weight(12.0)}
    rules = [ClipRule(6.5, name="all"), ClipRule(3.0, "parameter", name="each"), ClipRule(None, name="free")]
    report, _ = clip_step(pair, rules=rules)
    metrics = {name: value.item() for name, value in report.metrics().items()}
    assert metrics == {
        "grad/total_norm": 13.0,
        "grad/clipped_norm": pytest.approx(math.hypot(2.5, 3.0)),
        "grad/clip_coef": pytest.approx(math.hypot(2.5, 3.0) / 13),
        "grad/max_norm": 6.5,
        "grad/all/total_norm": 13.0,
        "grad/all/max_norm": 6.5,
        "grad/all/clip_coef": pytest.approx(0.5),
        "grad/each/total_norm": pytest.approx(6.5),
        "grad/each/max_norm": 3.0,
        "grad/each/clip_coef": pytest.approx(math.hypot(2.5, 3.0) / 6.5),
        "grad/free/total_norm": pytest.approx(math.hypot(2.5, 3.0)),
        "grad/free/clip_coef": 1.0,
    }
    assert {value.ndim for value in report.metrics().values()} == {0}
    for policy in ("skip", "ignore"):
        pair["a"].grad = torch.tensor([math.inf, 4.0])
        assert clip_step(pair, rules=rules, nonfinite=policy)[0].metrics() == {}


@pytest.mark.parametrize("value", [-1.0, 0.0, math.nan, "x"])
def test_a_clip_value_that_bounds_nothing_is_refused(value):
    parameter = weight(3.0)
    with pytest.raises(ValueError, match="`clip_value` must be a number above 0 or None, got "):
        clip_step([parameter], clip_value=value)
    assert parameter.grad == 3.0


def test_a_skip_above_out_of_range_is_named():
    with pytest.raises(ValueError, match="`skip_above` must be a number above 0 or a Limit, got -1"):
        clip_step([weight(3.0)], skip_above=-1.0)


def test_numbers_limits_and_rules_can_be_shadows():
    report, _ = clip_step([weight(3.0, 4.0)], max_norm=None, shadow=[2.5, FixedLimit(10.0), ClipRule(1.0, "parameter")])
    assert [each.coefficients.tolist() for each in report.shadows] == [pytest.approx([value]) for value in (0.5, 1.0, 0.2)]


def test_names_lose_what_wrappers_have_inserted_and_nothing_else():
    named = [("_orig_mod.a._orig_mod.b", weight(1.0)), ("my_orig_mod.x", weight(1.0)), ("_fsdp_wrapped_module.c", weight(1.0))]
    assert ParameterTable(named).names == ("a.b", "my_orig_mod.x", "c")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": -1.0}, "`scale` must be a number above 0 and finite, got -1.0"),
        ({"scale": "x"}, "`scale` must be a number above 0 and finite, got 'x'"),
        ({"scale": math.nan}, "`scale` must be a number above 0 and finite, got nan"),
        ({"nonfinite": "drop"}, "`nonfinite` must be one of skip, raise, zero, ignore, got 'drop'"),
        ({"max_norm": 10**400}, "`max_norm` must be a number above 0"),
    ],
)
def test_arguments_are_checked_on_healthy_steps_too(options, message):
    with pytest.raises(ValueError, match=message):
        clip_step([weight(3.0)], **options)
