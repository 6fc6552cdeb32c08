"""asteroid: separation of sources of sound. Its ``System`` is a module of ``pytorch_lightning``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from asteroid.engine import System
from asteroid.losses import PITLossWrapper, pairwise_neg_sisdr
from asteroid.models import ConvTasNet
from pytorch_lightning import Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.clients.client import Client


class Package(Client):
    def fit(self, folder: Path, callbacks: list[Any], *, clip: float | None = None) -> Any:
        seed_everything(0, verbose=False)
        sources = torch.randn(12, 2, 400, generator=torch.Generator().manual_seed(0))
        network = ConvTasNet(
            n_src=2, n_filters=8, kernel_size=16, n_blocks=1, n_repeats=1, bn_chan=4, hid_chan=8, skip_chan=4, sample_rate=8000
        )
        loader = DataLoader(TensorDataset(sources.sum(1), sources), batch_size=4)
        loss = PITLossWrapper(pairwise_neg_sisdr, pit_from="pw_mtx")
        system = System(network, torch.optim.Adam(network.parameters(), lr=0.01), loss, loader, loader)
        Trainer(**self.trainer_options(folder, callbacks, clip), limit_val_batches=0).fit(system)
        return system

    def module(self, model: Any) -> nn.Module:
        return model.model if isinstance(model, System) else model

    def save_and_load(self, model: Any, folder: Path) -> Any:
        torch.save(model.model.serialize(), folder / "model.pt")
        # not by its path: from_pretrained takes no weights_only=False, and the file holds the versions of what wrote it
        return ConvTasNet.from_pretrained(torch.load(folder / "model.pt", weights_only=False))
