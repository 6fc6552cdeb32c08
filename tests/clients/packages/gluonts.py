"""gluonts: probabilistic forecasts. It sets a ``gradient_clip_val`` of 10 and, after a fit, takes the weights of its best epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gluonts.dataset.common import ListDataset
from gluonts.model.predictor import Predictor
from gluonts.torch import SimpleFeedForwardEstimator
from lightning.pytorch import seed_everything
from torch import nn
from torch.distributions import Distribution

from tests.clients.client import Client

Distribution.set_default_validate_args(False)  # else a NaN is an error of the forward pass, which no guard sees


class Package(Client):
    resumes_exactly = False  # windows are drawn at random, from where the generator stands

    def fit(self, folder: Path, callbacks: list[Any], *, clip: float | None = None) -> Any:
        seed_everything(0, verbose=False)
        options = self.trainer_options(folder, [*callbacks], clip)
        del options["enable_checkpointing"]
        waves = [
            {"start": "2024-01-01", "target": 10 * np.sin(np.arange(60) / k) + np.random.default_rng(k).normal(size=60)}
            for k in (2, 3, 5)
        ]
        estimator = SimpleFeedForwardEstimator(
            prediction_length=4, context_length=8, hidden_dimensions=[8], batch_size=8, num_batches_per_epoch=4, lr=0.01,
            trainer_kwargs=options,
        )  # fmt: skip
        return estimator.train(ListDataset(waves, freq="D"))

    def module(self, model: Any) -> nn.Module:
        return model.prediction_net  # type: ignore[no-any-return]

    def save_and_load(self, model: Any, folder: Path) -> Any:
        model.serialize(folder)
        return Predictor.deserialize(folder)
