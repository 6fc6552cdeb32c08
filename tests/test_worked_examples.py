"""Figures from public write-ups on gradient clipping, to their digits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from clip_callbacks import ClipRule, clip_step
from clip_callbacks.tensor_norms import tensor_norms

GRADIENT = (125.0, 75.0, 45.0, 15.0, 5.0)


def clipped(gradient, max_norm=1.0, norm_type=2.0):
    weight = nn.Parameter(torch.zeros(len(gradient)))
    weight.grad = torch.tensor(gradient)
    return clip_step([weight], rules=[ClipRule(max_norm)], norm_type=norm_type)[0]


def assert_figures(report, total_norm, clip_coef, max_norm=1.0):
    # the source read float32 norms and divided in float64; ours divides in float32, as torch's clip does
    assert np.float32(report.total_norm.item()) == np.float32(total_norm)
    assert max_norm / (report.total_norm.item() + 1e-6) == pytest.approx(clip_coef, rel=1e-15)
    torch.testing.assert_close(report.clip_coef, torch.tensor(clip_coef))


@pytest.mark.parametrize(
    ("norm_type", "total_norm", "clip_coef"),
    [
        (1, 265.0, 0.0037735848914204344),
        (2, 153.3786163330078, 0.006519813631054263),
        (3, 135.16899108886716, 0.007398146457602848),
        (4, 129.34915161132812, 0.007731013151704421),
    ],
)
def test_norm_types(norm_type, total_norm, clip_coef):
    report = clipped(GRADIENT, norm_type=norm_type)
    assert np.float32(report.total_norm.item()) == np.float32(total_norm)
    # exactly what the printed norm gives; for p = 3 the source's own norm differs from its float32 value in the last digit
    assert 1.0 / (total_norm + 1e-6) == pytest.approx(clip_coef, rel=2e-9)
    torch.testing.assert_close(report.clip_coef, torch.tensor(clip_coef))


def test_infinity_norm():
    report = clipped(GRADIENT, norm_type=math.inf)
    assert report.total_norm.item() == 125.0
    assert f"{report.clip_coef.item():.4f}" == "0.0080"


@pytest.mark.parametrize(
    ("factor", "total_norm", "clip_coef"),
    [
        (1, 153.3786163330078, 0.006519813631054263),
        (2, 265.3299865722656, 0.003768891745519864),
        (3, 385.389404296875, 0.0025947781289671814),
        (4, 507.83856201171875, 0.001969129705451148),
    ],
)
def test_a_growing_entry(factor, total_norm, clip_coef):
    assert_figures(clipped((125.0 * factor, *GRADIENT[1:])), total_norm, clip_coef)


@pytest.mark.parametrize(
    ("max_norm", "clip_coef"),
    [(1, 0.006519813631054263), (2, 0.013039627262108526), (3, 0.01955944089316279), (4, 0.02607925452421705)],
)
def test_thresholds(max_norm, clip_coef):
    assert_figures(clipped(GRADIENT, max_norm), 153.3786163330078, clip_coef, max_norm)


def test_a_larger_norm_type_never_gives_a_larger_norm():
    for seed in range(50):
        torch.manual_seed(seed)
        gradient = torch.randn(17) * 10 ** torch.randint(-3, 4, ()).item()
        norms = [tensor_norms([gradient.double()], p).item() for p in (0.5, 1, 2, 3, 4, 8, math.inf)]
        assert norms == sorted(norms, reverse=True)


def test_clipping_shrinks_and_never_enlarges():
    vanishing = clipped((1e-4, 1e-5, 0.0, 0.0, 0.0))
    assert vanishing.clip_coef.item() == 1.0
    assert vanishing.clipped_norm.item() == vanishing.total_norm.item()
    exploding = clipped((1e9, 1e5, 1.0, 0.0, 0.0))
    assert exploding.clipped_norm.item() == pytest.approx(1.0)


class FourLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(4))
        for layer in self.layers:
            nn.init.constant_(layer.weight, 0.5)

    def forward(self, x):
        for layer in self.layers:
            x = torch.sigmoid(layer(x))
        return x


def test_where_the_clip_belongs_between_backward_and_step():
    model = FourLayers()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    nn.functional.mse_loss(model(torch.tensor([[0.1]])), torch.tensor([[1.0]])).backward()
    before = [layer.weight.grad.item() for layer in model.layers]
    expected = [-3.959321111324243e-05, -0.0016243279678747058, -0.014529166743159294, -0.11987950652837753]
    np.testing.assert_allclose(before, expected, rtol=2e-6)

    report, _ = clip_step(optimizer, rules=[ClipRule(0.01208)])
    assert f"{report.total_norm.item():.4f}" == "0.1208"
    after = [layer.weight.grad.item() for layer in model.layers]
    # the source's threshold is rounded to four digits
    np.testing.assert_allclose(
        after, [-3.960347839893075e-06, -0.00016247491294052452, -0.001453293371014297, -0.01199105940759182], rtol=5e-4
    )

    optimizer.step()
    stepped = [layer.weight.item() for layer in model.layers]
    np.testing.assert_allclose(
        stepped, [0.5000039339065552, 0.5001624822616577, 0.5014532804489136, 0.5119910836219788], rtol=1.3e-5
    )
    assert all(layer.weight.grad is not None for layer in model.layers), "gradients stay after the step: zero_grad is needed"


def accumulation_problem():
    inputs, targets = torch.ones(5), torch.zeros(3)
    w = nn.Parameter(torch.tensor([[1.0, 2.0, 3.0]]).repeat(5, 1))
    b = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    return w, b, lambda: nn.functional.binary_cross_entropy_with_logits(inputs @ w + b, targets)


def test_backward_adds_and_a_scale_makes_the_mean():
    w, b, loss = accumulation_problem()
    loss().backward()
    digits = [round(x, 4) for x in w.grad[0].tolist()]
    assert digits == [0.3325, 0.3333, 0.3333]
    loss().backward()
    assert [round(x, 4) for x in w.grad[0].tolist()] == [0.6650, 0.6667, 0.6667]
    assert torch.equal(w.grad[0], b.grad)
    clip_step([w, b], rules=[], scale=0.5)
    assert [round(x, 4) for x in w.grad[0].tolist()] == digits


def test_clipped_logits_stay_bounded():
    finals = {}
    for max_norm in (1.0, None):
        w, b, loss = accumulation_problem()
        optimizer = torch.optim.SGD([w, b], lr=0.0009)
        for _ in range(10_000):
            optimizer.zero_grad()
            loss().backward()
            clip_step(optimizer, rules=[ClipRule(max_norm)])
            optimizer.step()
        finals[max_norm] = (torch.ones(5) @ w + b).detach()
    assert (finals[None] < finals[1.0]).all(), "unclipped logits drift further down"
    assert finals[1.0].abs().max() < 20


def test_frozen_layers_take_no_part():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Linear(8, 2))
    for block in model[0].layers[:2]:
        block.requires_grad_(requires_grad=False)
    model(torch.randn(2, 5, 8)).square().sum().backward()
    report, _ = clip_step(model.named_parameters(), rules=[ClipRule(0.1, "parameter")])
    frozen = [i for i, name in enumerate(report.names) if name.startswith(("0.layers.0", "0.layers.1"))]
    assert len(frozen) == 24
    assert report.norms[frozen].abs().sum() == 0
    assert all(parameter.grad is None for block in model[0].layers[:2] for parameter in block.parameters())
    assert report.clip_coef < 1
