"""Seed the accelerators that are there, and no others.

``torch.manual_seed`` also notes the seed for each kind of accelerator that may yet be initialized, with the stack of its caller in
words. Under pytest that takes longer than to make and step a small network, and all of it is kept.
"""

from __future__ import annotations

import torch


def of_what_is_there() -> None:
    """Have nothing noted for accelerators that this machine lacks."""
    for backend in (torch.cuda, torch.xpu, torch.mtia):
        if not backend.is_available():
            backend.manual_seed_all = _nothing


def _nothing(seed: int) -> None: ...
