"""pytorch-forecasting: a temporal fusion transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from lightning.pytorch import Trainer, seed_everything
from pytorch_forecasting import QuantileLoss, TemporalFusionTransformer, TimeSeriesDataSet

from clip_callbacks import FaultInjection
from tests.clients.client import Client


class Package(Client):
    def fit(self, folder: Path, callbacks: list[Any], *, clip: float | None = None) -> Any:
        seed_everything(0, verbose=False)
        steps = np.arange(40)
        table = pd.DataFrame(
            {"step": steps, "series": "a", "value": 10 * np.sin(steps / 3) + np.random.default_rng(0).normal(size=40)}
        )
        windows = TimeSeriesDataSet(
            table, time_idx="step", target="value", group_ids=["series"], max_encoder_length=8, max_prediction_length=4,
            time_varying_unknown_reals=["value"], time_varying_known_reals=["step"],
        )  # fmt: skip
        model = TemporalFusionTransformer.from_dataset(
            windows,
            hidden_size=4,
            attention_head_size=1,
            hidden_continuous_size=4,
            dropout=0.0,
            loss=QuantileLoss(),
            log_interval=-1,
        )
        trainer = Trainer(**self.trainer_options(folder, callbacks, clip))
        trainer.fit(model, windows.to_dataloader(train=True, batch_size=8, shuffle=False))
        return model

    def nan_batch(self) -> Any:
        # of a NaN batch its losses make a constant, and the backward pass fails; a NaN that comes later can be skipped
        return FaultInjection("nan", step=self.poisoned_step)

    def save_and_load(self, model: Any, folder: Path) -> Any:
        model.trainer.save_checkpoint(folder / "model.ckpt")
        return TemporalFusionTransformer.load_from_checkpoint(folder / "model.ckpt", weights_only=False)
