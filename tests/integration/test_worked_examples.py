"""Figures from public write-ups on gradient clipping, to their digits, as the scripts in examples/ compute and print them."""

from __future__ import annotations

import importlib
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clip_callbacks import AccumulationRescaling, ClipRule, GradientClipping, NonFiniteGuard, RobustZScoreLimit, clip_step
from tests.helpers.matrix import examples

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    """Import an example as its neighbours do."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.fixture
def quick(example, tmp_path, capsys):
    """Run an example's command in quick mode; what it printed."""

    def run(name, *options):
        example(name).main(["--quick", "--output", str(tmp_path), *options])
        return capsys.readouterr().out

    return run


def assert_pictures(folder, *names):
    assert sorted(path.name for path in folder.glob("*.png")) == sorted(names)
    for name in names:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


# A. Norm types and thresholds


def assert_figures(row, label, total_norm, clip_coef):
    # the source read float32 norms and divided in float64; the package divides in float32, as torch's clip does
    found_label, found_norm, in_float32, in_float64 = row
    assert found_label == label
    assert np.float32(found_norm) == np.float32(total_norm)
    assert in_float32 == pytest.approx(clip_coef, rel=2**-22)
    return in_float64


@pytest.mark.parametrize(
    ("place", "norm_type", "total_norm", "clip_coef"),
    [
        (0, 1, 265.0, 0.0037735848914204344),
        (1, 2, 153.3786163330078, 0.006519813631054263),
        (2, 3, 135.16899108886716, 0.007398146457602848),
        (3, 4, 129.34915161132812, 0.007731013151704421),
    ],
)
def test_norm_types(example, place, norm_type, total_norm, clip_coef):
    in_float64 = assert_figures(example("norms").by_norm_type()[place], norm_type, total_norm, clip_coef)
    # for p = 3 the source's own norm differs from its float32 value in the last digit
    assert in_float64 == pytest.approx(clip_coef, rel=2e-9 if norm_type == 3 else 1e-15)


def test_infinity_norm(example):
    norm_type, total_norm, clip_coef, _ = example("norms").by_norm_type()[4]
    assert (norm_type, total_norm) == (math.inf, 125.0)
    assert f"{clip_coef:.4f}" == "0.0080"


@pytest.mark.parametrize(
    ("factor", "total_norm", "clip_coef"),
    [
        (1, 153.3786163330078, 0.006519813631054263),
        (2, 265.3299865722656, 0.003768891745519864),
        (3, 385.389404296875, 0.0025947781289671814),
        (4, 507.83856201171875, 0.001969129705451148),
    ],
)
def test_a_growing_entry(example, factor, total_norm, clip_coef):
    in_float64 = assert_figures(example("norms").by_entry()[factor - 1], factor, total_norm, clip_coef)
    assert in_float64 == pytest.approx(clip_coef, rel=1e-15)


@pytest.mark.parametrize(
    ("max_norm", "clip_coef"),
    [(1, 0.006519813631054263), (2, 0.013039627262108526), (3, 0.01955944089316279), (4, 0.02607925452421705)],
)
def test_thresholds(example, max_norm, clip_coef):
    in_float64 = assert_figures(example("norms").by_threshold()[max_norm - 1], max_norm, 153.3786163330078, clip_coef)
    assert in_float64 == pytest.approx(clip_coef, rel=1e-15)


ENTRIES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20)


def with_gradient(entries):
    weight = nn.Parameter(torch.zeros(len(entries), dtype=torch.float64))
    weight.grad = torch.tensor(entries, dtype=torch.float64)
    return weight


@settings(max_examples=examples(200), deadline=None)
@given(ENTRIES, st.floats(0.5, 16), st.one_of(st.floats(1, 4), st.just(math.inf)))
def test_a_larger_norm_type_never_gives_a_larger_total_norm(entries, norm_type, factor):
    smaller, larger = (
        clip_step([with_gradient(entries)], rules=[], norm_type=p)[0].total_norm.item() for p in (norm_type, norm_type * factor)
    )
    assert larger <= smaller * (1 + 1e-12), "but for the rounding of powers and roots in float64"


@settings(max_examples=examples(200), deadline=None)
@given(ENTRIES, st.floats(1e-6, 1e6), st.sampled_from([1.0, 2.0, 3.0, math.inf]))
def test_clipping_shrinks_and_never_enlarges(entries, max_norm, norm_type):
    weight = with_gradient(entries)
    before = weight.grad.clone()
    report, _ = clip_step([weight], rules=[ClipRule(max_norm)], norm_type=norm_type)
    assert (weight.grad.abs() <= before.abs()).all()
    assert report.clipped_norm <= report.total_norm
    if report.total_norm + 1e-6 < 0.999 * max_norm:
        assert torch.equal(weight.grad, before), "a gradient that vanishes is left to vanish"


def test_norms_prints_its_tables_and_finds_no_exception(quick, tmp_path):
    printed = quick("norms")
    for figure in ("153.378616333007", "265.329986572265", "385.389404296875", "507.838562011718", "0.026079254524217"):
        assert figure in printed
    assert "Of 50 random gradients, norms that rise with norm_type: 0; enlarged: 0" in printed
    assert_pictures(tmp_path, "norms.png")


# B. Between backward and step


def test_where_the_clip_belongs_between_backward_and_step(example):
    seen, total_norm = example("where_to_clip").one_step()
    expected = {
        "gradient": [-3.959321111324243e-05, -0.0016243279678747058, -0.014529166743159294, -0.11987950652837753],
        "after clip": [-3.960347839893075e-06, -0.00016247491294052452, -0.001453293371014297, -0.01199105940759182],
        "weight after the step": [0.5000039339065552, 0.5001624822616577, 0.5014532804489136, 0.5119910836219788],
    }
    assert f"{total_norm:.4f}" == "0.1208"
    for name, figures in expected.items():
        # float32, with a unit in the last place for another order of sums
        np.testing.assert_allclose(seen[name], figures, rtol=2**-22, err_msg=name)
    assert seen["gradient then"] == seen["after clip"], "gradients stay after the step: zero_grad is needed"


def test_a_clip_elsewhere_does_nothing(example, quick):
    module = example("where_to_clip")
    nowhere, before, between, after = (module.weights_with_clip_at(place) for place in module.PLACES)
    assert before == after == nowhere
    assert between == module.one_step()[0]["weight after the step"]
    printed = quick("where_to_clip")
    assert "-3.96034784e-06" in printed
    assert "0.511991084" in printed


# C. Global against local norms


def test_an_outlier_shrinks_everybody_under_a_global_norm_and_stays_alone_under_local_ones(example):
    module = example("global_and_local")
    shrunk, cosine = module.shrinking("global")
    assert set(map("{:.6f}".format, shrunk.values())) == {f"{shrunk[module.OUTLIER]:.6f}"}
    assert shrunk[module.OUTLIER] < 0.01
    assert cosine == pytest.approx(1.0, abs=1e-9)
    alone, turned = module.shrinking("local")
    assert alone.pop(module.OUTLIER) < 0.01
    assert set(alone.values()) == {1.0}
    assert turned < 0.9
    both, _ = module.shrinking("global, then local")
    assert both.pop(module.OUTLIER) == pytest.approx(shrunk[module.OUTLIER] / 8, rel=1e-3)
    assert both == pytest.approx({name: shrunk[name] for name in both}, rel=1e-5)
    clamped, _ = module.shrinking("value")
    assert clamped.pop(module.OUTLIER) < 1.0
    assert set(clamped.values()) == {1.0}


def test_the_simple_rnn_is_the_one_that_is_described(example):
    module = example("global_and_local")
    rnn, (inputs, targets) = module.SimpleRNN(), module.sequences(3).tensors
    assert (rnn.rnn.input_size, rnn.rnn.hidden_size, rnn.fc.out_features) == (10, 20, 5)
    assert (inputs.shape, targets.shape) == ((96, 20, 10), (96, 5))
    optimizer = rnn.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_norms_of_every_way_are_in_tensorboard(example, quick, tmp_path, monkeypatch):
    module = example("global_and_local")
    monkeypatch.setattr(module, "EventAccumulator", cache(module.EventAccumulator))  # reads a file once for all curves in it
    printed = quick("global_and_local")
    assert "FixedLimit-0.5" in printed
    assert_pictures(tmp_path, "outlier.png", "training.png")
    for way in module.WAYS:
        folder = tmp_path / way.replace(", ", "_").replace(" ", "_")
        total, clipped = (dict(module.curve(folder, f"grad/{name}")) for name in ("total_norm", "clipped_norm"))
        assert list(total) == list(range(40))
        assert max(total.values()) > 10, "the spoilt batch is there"
        assert dict(module.curve(folder, f"grad_norm/{module.OUTLIER}")).keys() == total.keys()
        bound = {"none": math.inf, "global": 0.5, "local": 0.5 * 6**0.5, "global, then local": 0.5, "value": math.inf}[way]
        assert max(clipped.values()) <= bound * (1 + 1e-6), "a float32 norm"
        assert (clipped == total) == (bound == math.inf)


def test_penalties_are_in_the_norm_and_dropout_is_on(example, tmp_path):
    module = example("global_and_local")
    module.train("global", 4, tmp_path, l1=0.01, l2=0.02)
    (_, logged), *_ = module.curve(tmp_path, "grad/total_norm")
    torch.manual_seed(0)
    rnn = module.SimpleRNN()
    inputs, targets = module.sequences(1).tensors
    nn.functional.mse_loss(rnn(inputs), targets).backward()
    gradients = [parameter.grad + 0.01 * parameter.sign() + 0.04 * parameter for parameter in rnn.parameters()]
    assert logged == pytest.approx(torch.cat([gradient.flatten() for gradient in gradients]).norm().item(), rel=1e-5)
    dropping = module.SimpleRNN(dropout=0.5)
    assert not torch.equal(dropping(inputs), dropping(inputs))


# D. Accumulation


def test_backward_adds(example):
    module = example("accumulation")
    for backwards, figures in ((1, ["0.3325", "0.3333", "0.3333"]), (2, ["0.6650", "0.6667", "0.6667"])):
        w, b = module.added_gradients(backwards)
        assert [f"{x:.4f}" for x in b] == figures
        assert w == [b] * 5


def test_a_scale_makes_the_mean(example):
    module = example("accumulation")
    w, b, logits = module.problem()
    for _ in range(2):
        module.loss(logits()).backward()
    clip_step([w, b], rules=[], scale=0.5)
    assert (w.grad.tolist(), b.grad.tolist()) == module.added_gradients(1)


def test_windows_are_large_batches_the_short_last_one_too(example):
    module = example("accumulation")
    large, plain, rescaled = (
        module.large_batch_gradients(),
        module.window_gradients(),
        module.window_gradients(AccumulationRescaling()),
    )
    assert len(large) == 3, "windows of 4, 4 and 2 micro-batches: a step on the last batch too"
    torch.testing.assert_close(rescaled, large)
    torch.testing.assert_close(plain, [*large[:2], large[2] / 2])


@pytest.mark.parametrize("steps", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_clipped_logits_drift_less_far_down(example, steps):
    module = example("accumulation")
    clipped, unclipped = module.drift(steps, 1.0), module.drift(steps, None)
    assert clipped[0].tolist() == [6.0, 12.0, 18.0]
    assert (unclipped[-1] < clipped[-1]).all()
    assert clipped.abs().max() <= 18.0
    # each clipped step moves the logits by at most lr * max_norm * sqrt(5 inputs and a bias)
    assert clipped.diff(dim=0).norm(dim=1).max() <= 0.0009 * 6**0.5 * (1 + 1e-3), "logits of float32 are rounded"


def test_accumulation_prints_its_tables(quick, tmp_path):
    printed = quick("accumulation")
    for figure in ("0.3325", "0.6650", "0.6667", "0.5000", "Logits after 1000 steps"):
        assert figure in printed
    assert_pictures(tmp_path, "logits.png")


# E. Frozen layers


@pytest.mark.parametrize("holds_frozen", [True, False], ids=["held", "not held"])
def test_frozen_layers_take_no_part(example, holds_frozen):
    module = example("frozen")
    steps, _, network = module.train(holds_frozen=holds_frozen, batches=2, epochs=1)
    frozen = [parameter for part in network.frozen_parts() for parameter in part.parameters()]
    assert len(frozen) == 26
    assert all(parameter.grad is None for parameter in frozen)
    assert list(module.in_the_norm(steps.norms[0]).values()) == ["0 of 1"] * 2 + ["0 of 12"] * 2 + ["12 of 12"] * 2 + ["2 of 2"]
    for norms, total in zip(steps.norms, steps.totals, strict=True):
        moving = [norm for name, norm in norms.items() if not name.startswith(module.FROZEN)]
        assert total == pytest.approx(math.hypot(*moving), rel=1e-5)


def test_parts_join_the_norm_when_base_finetuning_unfreezes_them(example):
    module = example("frozen")
    steps, trainer, network = module.train(module.Unfreezing(1), holds_frozen=False, batches=2, epochs=2)
    shares = [module.in_the_norm(norms)["encoder.layers.0"] for norms in steps.norms]
    assert shares == ["0 of 12"] * 2 + ["12 of 12"] * 2
    for norms, total in zip(steps.norms, steps.totals, strict=True):
        assert total == pytest.approx(math.hypot(*norms.values()), rel=1e-5)
    last, weights = steps.clipping.last_report, [parameter.clone() for parameter in network.parameters()]
    trainer.validate(network, module.digits(2)[1], verbose=False)
    assert steps.clipping.last_report == last, "evaluation is never clipped"
    assert all(torch.equal(x, y) for x, y in zip(weights, network.parameters(), strict=True))


def test_frozen_prints_its_table(quick, tmp_path):
    printed = quick("frozen")
    (row,) = [line for line in printed.splitlines() if line.startswith("encoder.layers.1")]
    assert row.split("  ")[-1].strip() == "12 of 12"
    assert row.count("0 of 12") == 3
    assert "in evaluation: 0" in printed
    assert_pictures(tmp_path, "norms.png")


# F. A loss that turned NaN


@pytest.mark.parametrize(
    ("fault", "stage", "traced", "offenders", "step", "goes_on"),
    [
        ("log of zero", "loss", "between (Entropy), output [16, 4]: 64 NaN, inputs finite", "gradients", 3, True),
        ("infinite derivative", "gradient", None, "gradients", 3, True),
        ("spoilt weight", "parameter", "last (Linear), output [16, 1]: 16 NaN, inputs finite", "parameters", 0, False),
        ("huge learning rate", "step", "first (Linear)", "parameters", 3, False),
    ],
)
def test_each_fault_is_found_and_named(example, tmp_path, fault, stage, traced, offenders, step, goes_on):
    answer = example("nan_questions").ask(fault, tmp_path)
    facts = answer.journal[0]
    assert (facts["stage"], facts["step"], facts["batch"]) == (stage, step, step)
    assert answer.goes_on == goes_on
    assert len(answer.journal) == (1 if goes_on else 2)
    assert f"at step {step}, epoch 0, batch {step}, rank 0" in answer.text
    assert facts["message"] in answer.text
    assert (facts["traced"] or "").startswith(traced or "")
    assert bool(facts["traced"]) == bool(traced)
    names = [offender["name"] for offender in facts[offenders]]
    expected = {
        "log of zero": ["first.weight", "last.weight", "last.bias"],
        "infinite derivative": ["first.weight"],
        "spoilt weight": ["last.weight"],
        "huge learning rate": ["first.weight", "last.weight", "last.bias"],
    }
    assert names == expected[fault]
    assert all(name in answer.text for name in names)


@pytest.mark.slow
def test_nan_questions_prints_reports_and_a_table(quick):
    printed = quick("nan_questions")
    assert printed.count("Stage: ") == 4
    rows = [line.split() for line in printed.splitlines() if line.startswith(("log of zero  ", "spoilt weight  "))]
    assert [row[3] if row[0] == "log" else row[2] for row in rows] == ["loss", "parameter"]


# G. Recurrent networks


def test_stepwise_backward_is_backward_of_the_summed_loss_is_the_sum_over_calls(example):
    gradients = example("recurrent").summed_and_stepwise()
    reference, *others = gradients.values()
    assert len(others) == 3
    assert reference.dtype is torch.float64
    assert reference.norm() > 0.1
    for gradient in others:
        torch.testing.assert_close(gradient, reference)


def test_gradients_explode_or_vanish_over_the_length_of_a_sequence(example):
    module = example("recurrent")
    short, long = ({kind: module.norms(kind, length) for kind in module.KINDS} for length in (4, 64))
    exploding = "RNN, large weights"
    assert long[exploding]["total_norm"] > 1000 * short[exploding]["total_norm"]
    for kind in set(module.KINDS) - {exploding}:
        assert long[kind]["total_norm"] < 10 * short[kind]["total_norm"]
        assert long[kind]["first input"] < 1e-9 * short[kind]["first input"]
    for norms in long.values():
        assert norms["clipped_norm"] == pytest.approx(min(norms["total_norm"], module.MAX_NORM), rel=1e-5)


@pytest.mark.slow
def test_recurrent_prints_its_tables(quick, tmp_path):
    printed = quick("recurrent")
    rows = [line.split() for line in printed.splitlines() if line.startswith(("RNN   ", "GRU   ", "LSTM  "))]
    trained = [row for row in rows if len(row) == 4 and "e" not in row[2]]
    assert [row[1] for row in trained] == ["none", "1.000"] * 3
    assert "nn.RNN, summed loss" in printed
    assert_pictures(tmp_path, "norms.png", "training.png")


# H. Optimizers


@pytest.mark.parametrize("name", ["SGD, whole set", "SGD, mini-batches", "momentum", "Adagrad", "RMSprop", "Adam"])
@pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning")
def test_who_notices_the_scale_of_a_gradient(example, name):
    module = example("optimizers")
    row, runs = module.compare(module.WAYS[name], 10)
    if name in {"Adagrad", "RMSprop", "Adam"}:
        assert row["x 0.1"] == pytest.approx(1.0, abs=1e-3), "eps beside the gradients' size"
        assert row["x 10"] == pytest.approx(1.0, abs=1e-3)
        assert row["clipped / unclipped"] > 0.9
    else:
        assert row["x 0.1"] == pytest.approx(0.1, rel=0.1)
        assert row["x 10"] > 5
        assert row["clipped / unclipped"] < 0.01
    assert row["clipped, x 10 / x 1"] == pytest.approx(1.0, abs=1e-3), "below every norm a threshold sets the scale"
    assert row["skipped"] == 1
    assert row["as if never drawn"]
    assert len(runs[1.0].losses) == 10


@pytest.mark.slow
def test_optimizers_prints_its_table(quick, tmp_path):
    printed = quick("optimizers")
    rows = [line for line in printed.splitlines() if line.endswith("True")]
    assert len(rows) == 6
    assert_pictures(tmp_path, "scales.png")


# I. Loss spikes


def test_the_gpt_is_causal_and_learns_from_the_next_character(example):
    module = example("spikes")
    torch.manual_seed(0)
    model = module.GPT(layers=2, width=16)
    inputs, targets = module.pieces(bytes(range(32, 127)) * 2, 3, torch.Generator().manual_seed(0))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    logits, changed = model(inputs), inputs.clone()
    changed[:, 20] = (changed[:, 20] + 1) % module.SYMBOLS
    moved = (model(changed) - logits).abs().amax(dim=(0, 2)) > 0
    assert not moved[:20].any()
    assert moved[20:].all()
    torch.testing.assert_close(model.loss((inputs, targets)), nn.functional.cross_entropy(logits.mT, targets))


def test_poison_shuffles_the_targets_of_its_batch_and_changes_nothing_else(example):
    module = example("spikes")
    text = bytes(range(32, 127)) * 20
    clean, poisoned = (module.batches(text, 5, 0, places) for places in (set(), {3}))
    for step, ((inputs, targets), (same, maybe_shuffled)) in enumerate(zip(clean, poisoned, strict=True)):
        assert torch.equal(inputs, same)
        assert torch.equal(targets, maybe_shuffled) == (step != 3)
        assert torch.equal(targets.flatten().sort().values, maybe_shuffled.flatten().sort().values)
    places = [module.poisoned_steps(800, seed) for seed in range(20)]
    assert all(sorted(step // module.EVERY for step in each) == [0, 1, 2, 3] for each in places)
    assert len(set(map(frozenset, places))) > 1


def test_damage_and_spikes_are_those_of_the_healthy_batches(example):
    module = example("spikes")
    losses = [2.0 + 0.1 * (step % 2) for step in range(60)]
    clean = module.Run(losses, losses, [False] * 60, [False] * 60, 2.0)
    assert clean.spikes(10) == 0
    worse = [loss + (3.0 if step == 20 else 0.5 * (step in {21, 22, 50})) for step, loss in enumerate(losses)]
    run = module.Run(worse, losses, [step == 20 for step in range(60)], [step in {20, 50} for step in range(60)], 2.0)
    assert run.damage(clean) == pytest.approx(2 * 0.5 / module.AFTER)
    assert run.spikes(10) == 2, "those of the steps 21 and 50: step 22 compares with a window that holds step 21"
    assert [run.count(poisoned=bad, skipped=True) for bad in (True, False)] == [1, 1]


@pytest.mark.filterwarnings("ignore:Spike at:RuntimeWarning")
def test_a_threshold_on_the_loss_skips_the_poisoned_batch_alone(example):
    module = example("spikes")
    sizes, text = module.Sizes(layers=1, width=32, steps=70, seeds=1), (EXAMPLES / "spikes.py").read_bytes()
    limit = RobustZScoreLimit(3.0, window=25, floor=0.01)
    each = NonFiniteGuard(loss_above=limit), GradientClipping(None)
    guarded, unguarded = (module.train(callback, 0, sizes, (text, text), {60}) for callback in each)
    assert [step for step, skipped in enumerate(guarded.skipped) if skipped] == [60]
    assert guarded.losses[:61] == unguarded.losses[:61]
    assert guarded.norms[:61] == unguarded.norms[:61]
    assert not any(unguarded.skipped)
    assert guarded.losses[60] > max(guarded.losses[50:60]) > guarded.losses[61]


@pytest.mark.slow
def test_spikes_prints_its_table(quick, tmp_path):
    printed = quick("spikes")
    rows = [line for line in printed.splitlines() if line.endswith((" of 59", " of 60"))]
    assert len(rows) >= 7
    assert_pictures(tmp_path, "methods.png", "steps.png")
