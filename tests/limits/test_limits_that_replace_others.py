"""Resuming with another limit: blocks with a state of the same kind keep it, all others begin anew."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from clip_callbacks import ClipRule, QuantileLimit, ZScoreLimit, clip_step
from clip_callbacks.clipping.clipper import Clipper
from clip_callbacks.core.blocks import SCOPES
from clip_callbacks.core.limits import kind
from clip_callbacks.trainer.optimizer_context import OptimizerContext
from tests.helpers.laws import LIMITS, MAKERS, with_gradients


def attached(rules, *optimizers, saved=None, shadows=()):
    """Return a Clipper attached to optimizers that hold some layers of one network each."""
    module = with_gradients(0)
    clipper = Clipper(rules, shadows, None, saved or {})
    contexts = []
    for index, layers in enumerate(optimizers or [[0, 1, 2]]):
        groups = [{"params": list(module[layer].parameters())} for layer in layers]
        suffix = f"-SGD-{index}" if optimizers[1:] else ""
        contexts.append(OptimizerContext(index, torch.optim.SGD(groups, lr=0.1), module, suffix, lambda _: None))
    clipper.attach(contexts, [], renewed=False)
    return clipper, contexts


def trained(rules, *optimizers, shadows=(), steps=4, **options):
    """Return the state after a few steps."""
    clipper, contexts = attached(rules, *optimizers, shadows=shadows, **options)
    for step in range(steps):
        step_of(clipper, contexts, step)
    return deepcopy(clipper.state_dict())


def step_of(clipper, contexts, seed):
    source = dict(with_gradients(seed).named_parameters())
    for context in contexts:
        for name, tensor in zip(context.table.names, context.table.tensors, strict=True):
            tensor.grad = source[name].grad.clone()
        rules, shadows = (of(context.index) for of in (clipper.rules_of, clipper.shadows_of))
        assert not shadows
        _, states = clip_step(context.table, clipper.limit_states(context.index), rules=rules)
        clipper.save_limit_states(context.index, states)


def kept(state, index=0, name="rule_1"):
    return state["limits"][index][name]


def same(left, right):
    return left["state"].keys() == right["state"].keys() and all(
        torch.equal(left["state"][key], right["state"][key]) for key in left["state"]
    )


@pytest.mark.parametrize("before", MAKERS)
def test_any_limit_may_replace_any_other(before):
    state = trained([ClipRule(MAKERS[before](1.0), "layer")])
    old = kept(state)
    for make in LIMITS:
        limit = make(1.0)
        clipper, contexts = attached([ClipRule(limit, "layer")], saved=deepcopy(state))
        held, blank = kept(clipper.state_dict()), limit.init(4)
        mismatch = clipper.mismatch()
        shapes = [{key: value.shape for key, value in each.items()} for each in (old["state"], blank)]
        if kind(limit) == old["kind"] and shapes[0] == shapes[1]:
            assert same(held, old)
            assert not mismatch.missing + mismatch.unexpected
        else:
            assert all(torch.equal(held["state"][key], blank[key]) for key in blank)
            assert mismatch.missing == [f"the limit of rule_1 ({kind(limit)})"] * bool(blank)
            assert mismatch.unexpected == [f"the state of {old['kind']}, which was the limit of rule_1"] * bool(old["state"])
        step_of(clipper, contexts, 9)


@pytest.mark.parametrize("before", SCOPES)
@pytest.mark.parametrize("after", SCOPES)
def test_any_scope_may_replace_any_other(before, after):
    """A bias is a parameter and a unit at once: it keeps its state between these scopes."""
    rules = [[ClipRule(ZScoreLimit(), scope)] for scope in (before, after)]
    clipper, contexts = attached(rules[1], saved=trained(rules[0]))
    counts = kept(clipper.state_dict())["state"]["count"].tolist()
    anew = clipper.mismatch().missing
    if before == after:
        assert set(counts) == {4}
        assert not anew
    elif {before, after} == {"unit", "parameter"}:
        names = list(contexts[0].table.partition(after).names)
        assert {name for name, count in zip(names, counts, strict=True) if count} == {"0.bias", "1.weight", "1.bias", "2.1.bias"}
        which = f"{counts.count(0)} of {len(counts)} blocks of the limit of rule_1 (ZScoreLimit), the first of them {names[0]}"
        assert anew == [which]
    else:
        assert set(counts) == {0}
        assert anew == ["the limit of rule_1 (ZScoreLimit)"]
    step_of(clipper, contexts, 9)


def test_one_block_of_everything_goes_on_as_one_group_of_everything():
    clipper, _ = attached([ClipRule(ZScoreLimit(), "group")], [0], saved=trained([ClipRule(ZScoreLimit(), "global")], [0]))
    assert kept(clipper.state_dict())["state"]["count"].tolist() == [4]


def test_rules_without_names_may_change_places():
    rules = [ClipRule(ZScoreLimit(), "layer"), ClipRule(1.0), ClipRule(QuantileLimit(window=10))]
    state = trained(rules)
    clipper, _ = attached([rules[2], ClipRule(0.5, "unit"), rules[0]], saved=state)
    after = clipper.state_dict()
    assert same(kept(after, name="rule_3"), kept(state, name="rule_1"))
    assert same(kept(after, name="rule_1"), kept(state, name="rule_3"))
    assert not clipper.mismatch().missing + clipper.mismatch().unexpected


def test_a_rule_more_begins_anew_and_takes_nothing_from_another_one():
    state = trained([ClipRule(ZScoreLimit(), "layer")])
    clipper, _ = attached([ClipRule(ZScoreLimit(), "layer"), ClipRule(ZScoreLimit(), "layer")], saved=state)
    counts = [set(kept(clipper.state_dict(), name=name)["state"]["count"].tolist()) for name in ("rule_1", "rule_2")]
    assert counts == [{4}, {0}]
    assert clipper.mismatch().missing == ["the limit of rule_2 (ZScoreLimit)"]


def test_a_shadow_becomes_the_rule_and_the_rule_a_shadow():
    state = trained([ClipRule(ZScoreLimit(), "layer")])
    state["shadows"] = trained([ClipRule(QuantileLimit(window=10), "layer")])["limits"]
    state["shadows"][0]["QuantileLimit-window_10"] = state["shadows"][0].pop("rule_1")
    clipper, _ = attached([ClipRule(QuantileLimit(0.5, window=10), "layer")], shadows=[ZScoreLimit(2.0)], saved=deepcopy(state))
    after = clipper.state_dict()
    assert same(kept(after), state["shadows"][0]["QuantileLimit-window_10"])
    assert same(after["shadows"][0]["ZScoreLimit-z_2"], kept(state))
    assert not clipper.mismatch().missing + clipper.mismatch().unexpected


def test_shadows_come_and_go():
    state = trained([ClipRule(1.0)])
    state["shadows"] = {0: {"ZScoreLimit": kept(trained([ClipRule(ZScoreLimit())]))}}
    clipper, _ = attached([ClipRule(1.0)], shadows=[QuantileLimit()], saved=state)
    assert clipper.mismatch().missing == ["shadow QuantileLimit (QuantileLimit)"]
    assert clipper.mismatch().unexpected == ["the state of ZScoreLimit, which was shadow ZScoreLimit"]


def test_blocks_go_along_with_their_parameters_to_another_optimizer():
    rules = [ClipRule(ZScoreLimit(), "parameter")]
    clipper, _ = attached(rules, [0], [1, 2], saved=trained(rules))
    counts = [set(kept(clipper.state_dict(), index)["state"]["count"].tolist()) for index in (0, 1)]
    assert counts == [{4}, {4}]


def test_a_state_of_another_precision_begins_anew():
    state = trained([ClipRule(ZScoreLimit(), "layer")])
    for key, value in kept(state)["state"].items():
        if value.is_floating_point():
            kept(state)["state"][key] = value.half()
    clipper, contexts = attached([ClipRule(ZScoreLimit(), "layer")], saved=state)
    assert set(kept(clipper.state_dict())["state"]["count"].tolist()) == {0}
    step_of(clipper, contexts, 9)


def test_layers_that_are_called_like_scopes_are_no_scopes():
    module = nn.ModuleDict({"global": nn.Linear(2, 2)})
    context = OptimizerContext(0, torch.optim.SGD(module.parameters(), lr=0.1), module, "", lambda _: None)
    state = trained([ClipRule(ZScoreLimit(), "global")])
    clipper = Clipper([ClipRule(ZScoreLimit(), "layer")], (), None, state)
    clipper.attach([context], [], renewed=False)
    assert kept(clipper.state_dict())["state"]["count"].tolist() == [0]
