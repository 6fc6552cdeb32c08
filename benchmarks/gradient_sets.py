"""The gradients that a step is timed on, by the shapes of real networks."""

from __future__ import annotations

import torch
from torch import nn

Shape = tuple[int, ...]


def gpt2_small() -> list[Shape]:
    """GPT-2 small: 148 tensors, 124.4 M entries."""
    width = 768
    block: list[Shape] = [
        *[(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)],
        *[(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)],
    ]
    return [(50257, width), (1024, width), *block * 12, (width,), (width,)]


def resnet50() -> list[Shape]:
    """ResNet-50: 161 tensors, 25.6 M entries."""

    def norm(width: int) -> list[Shape]:
        return [(width,), (width,)]

    shapes: list[Shape] = [(64, 3, 7, 7), *norm(64)]
    inputs = 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(depth):
            shapes += [
                (width, inputs, 1, 1),
                *norm(width),
                (width, width, 3, 3),
                *norm(width),
                (4 * width, width, 1, 1),
                *norm(4 * width),
            ]
            if block == 0:
                shapes += [(4 * width, inputs, 1, 1), *norm(4 * width)]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


SETS: dict[str, list[Shape]] = {
    "GPT-2 small, 148 tensors, 124 M": gpt2_small(),
    "ResNet-50, 161 tensors, 25.6 M": resnet50(),
    "50 tiny (25 of 16 x 16, 25 of 16)": [(16, 16), (16,)] * 25,
    "400 small (200 of 32 x 32, 200 of 32)": [(32, 32), (32,)] * 200,
}


class Holder(nn.Module):
    """A module of bare parameters with gradients, and a copy of these to begin again from."""

    def __init__(self, shapes: list[Shape], device: str, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator(device).manual_seed(0)
        self.held = nn.ParameterList(nn.Parameter(torch.ones(shape, device=device, dtype=dtype)) for shape in shapes)
        for parameter in self.held:
            parameter.grad = torch.randn(parameter.shape, device=device, generator=generator).to(dtype)
        self.gradients = [parameter.grad for parameter in self.held]
        self._fresh = [gradient.clone() for gradient in self.gradients]
        self.total_norm = float(torch.stack([gradient.float().norm() for gradient in self.gradients]).norm())

    def refill(self) -> None:
        """Restore the original gradients."""
        for parameter, gradient in zip(self.held, self.gradients, strict=True):
            parameter.grad = gradient
        torch._foreach_copy_(self.gradients, self._fresh)
