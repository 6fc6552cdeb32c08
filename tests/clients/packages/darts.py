"""darts: forecasts of time series. Its Trainer is made anew in each fit; it is of ``pytorch_lightning``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from darts import TimeSeries
from darts.models import NBEATSModel
from torch import nn

from tests.clients.client import EPOCHS, Client


class Package(Client):
    def fit(self, folder: Path, callbacks: list[Any], *, clip: float | None = None) -> Any:
        options = self.trainer_options(folder, callbacks, clip)
        del options["enable_checkpointing"], options["max_epochs"]  # arguments of the model
        model = NBEATSModel(
            input_chunk_length=8, output_chunk_length=4, num_stacks=2, num_blocks=1, num_layers=2, layer_widths=8,
            batch_size=8, n_epochs=EPOCHS, random_state=0, pl_trainer_kwargs=options,
        )  # fmt: skip
        wave = 10 * np.sin(np.arange(40) / 3) + np.random.default_rng(0).normal(size=40)
        model.fit(TimeSeries.from_values(wave.astype(np.float32)), dataloader_kwargs={"shuffle": False})
        return model

    def module(self, model: Any) -> nn.Module:
        return model.model  # type: ignore[no-any-return]

    def save_and_load(self, model: Any, folder: Path) -> Any:
        model.save(str(folder / "model.pt"))
        return NBEATSModel.load(str(folder / "model.pt"), trusted=True)  # it holds the callbacks
