"""Tensors of kinds that torch has no arithmetic for: dtypes, packed codes, subclasses that leave functions out."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

aten = torch.ops.aten


class Opaque(Tensor):
    """Codes and a scale that look like floats from outside, as low-bit weights and states do; no copy can be made of it."""

    @staticmethod
    def __new__(cls, codes, scale):
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __repr__(self):
        return f"{type(self).__name__}({list(self.shape)})"

    @classmethod
    def of(cls, values):
        scale = values.abs().amax().clamp(min=1e-8) / 127
        return cls((values / scale).round().to(torch.int8), scale.reshape(1))

    def values(self):
        return self.codes.float() * self.scale

    def set(self, values):
        coded = self.of(values)
        self.codes.copy_(coded.codes)
        self.scale.copy_(coded.scale)

    KNOWN: ClassVar = {aten.detach.default, aten.alias.default}

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function not in cls.KNOWN:
            raise NotImplementedError(f"{cls.__name__} has no {function}")
        copies = function is aten.clone.default
        first = args[0]
        return cls(*(part.clone() if copies else part for part in (first.codes, first.scale)))


class Cloned(Opaque):
    """The same with ``clone``."""

    KNOWN: ClassVar = {*Opaque.KNOWN, aten.clone.default}


class Coded(Opaque):
    """The same, which tells what it is made of, as most subclasses do."""

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, parts, context, size, stride):
        return cls(parts["codes"], parts["scale"])


def frozen_tensors():
    """One of each kind, 8 rows of 4."""
    codes = torch.arange(32).reshape(8, 4)
    looks_like_nan = torch.full((8, 4), -1, dtype=torch.int32)
    dtypes = (torch.uint8, torch.int8, torch.int32, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)
    return {str(dtype).removeprefix("torch."): codes.to(dtype) for dtype in dtypes} | {
        "uint4": codes.to(torch.uint8).view(torch.uint4),
        "qint8": torch.quantize_per_tensor(codes.float(), 0.25, 0, torch.qint8),
        "per channel": torch.quantize_per_channel(codes.float(), torch.ones(8), torch.zeros(8), 0, torch.qint8),
        "packed float32": looks_like_nan.view(torch.float32),
        "packed bfloat16": looks_like_nan.view(torch.bfloat16),
        "meta": torch.empty(8, 4, device="meta"),
        "coded": Coded.of(codes.float()),
        "cloned": Cloned.of(codes.float()),
        "opaque": Opaque.of(codes.float()),
    }
