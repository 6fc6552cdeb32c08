"""chemprop: properties of molecules by message passing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from chemprop import data, models, nn
from chemprop.models import load_model, save_model
from lightning.pytorch import Trainer, seed_everything

from tests.clients.client import Client

SMILES = ["CCO", "CCN", "c1ccccc1", "CC(=O)O", "CCCl", "C1CCCCC1", "CC(C)O", "c1ccncc1", "CCOC", "CC#N", "CCS", "OCCO"]


class Package(Client):
    def fit(self, folder: Path, callbacks: list[Any], *, clip: float | None = None) -> Any:
        seed_everything(0, verbose=False)
        targets = np.random.default_rng(0).normal(scale=5.0, size=(len(SMILES), 1))
        points = [data.MoleculeDatapoint.from_smi(smiles, y=y) for smiles, y in zip(SMILES, targets, strict=True)]
        loader = data.build_dataloader(data.MoleculeDataset(points), batch_size=4, shuffle=False)
        model = models.MPNN(
            nn.BondMessagePassing(d_h=16, depth=2),
            nn.MeanAggregation(),
            nn.RegressionFFN(input_dim=16, hidden_dim=8),
            batch_norm=True,
        )
        trainer = Trainer(**self.trainer_options(folder, callbacks, clip))
        trainer.fit(model, loader)
        return model

    def save_and_load(self, model: Any, folder: Path) -> Any:
        save_model(folder / "model.pt", model)
        return load_model(folder / "model.pt")
