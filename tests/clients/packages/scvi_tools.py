"""scvi-tools: variational autoencoders of single cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import scvi
from torch import nn
from torch.distributions import Distribution

from tests.clients.client import EPOCHS, Client

Distribution.set_default_validate_args(False)  # else a NaN is an error of the forward pass, which no guard sees


class Package(Client):
    resumes_exactly = False  # cells are shuffled, and codes drawn, from where the generator stands

    def fit(self, folder: Path, callbacks: list[Any], *, clip: float | None = None) -> Any:
        scvi.settings.seed = 0
        cells = scvi.data.synthetic_iid(batch_size=32, n_genes=20, n_proteins=0, n_regions=0)
        scvi.model.SCVI.setup_anndata(cells, batch_key="batch")
        model = scvi.model.SCVI(cells, n_hidden=8, n_latent=2, dropout_rate=0.0)
        options = self.trainer_options(folder, [*callbacks], clip) | {"max_epochs": EPOCHS}
        model.train(train_size=1.0, batch_size=16, **options)
        return model

    def module(self, model: Any) -> nn.Module:
        return model.module  # type: ignore[no-any-return]

    def save_and_load(self, model: Any, folder: Path) -> Any:
        model.save(str(folder / "model"), save_anndata=True)
        return scvi.model.SCVI.load(str(folder / "model"))
