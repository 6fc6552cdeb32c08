"""neuralforecast: forecasts by neural networks. The callbacks become hyperparameters of its models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from neuralforecast import NeuralForecast
from neuralforecast.models import NHITS
from torch import nn

from clip_callbacks import FaultInjection
from tests.clients.client import Client


class Package(Client):
    resumes_exactly = False  # windows are drawn at random, from where the generator stands

    def fit(self, folder: Path, callbacks: list[Any], *, clip: float | None = None) -> Any:
        days = pd.date_range("2024-01-01", periods=60)
        wave = 10 * np.sin(np.arange(60) / 3) + np.random.default_rng(0).normal(size=60)
        options = self.trainer_options(folder, callbacks, clip)
        del options["max_epochs"]  # counted in steps
        model = NHITS(h=4, input_size=8, max_steps=6, mlp_units=[[8, 8]] * 3, windows_batch_size=16, random_seed=0, **options)
        forecast = NeuralForecast(models=[model], freq="D")
        forecast.fit(pd.DataFrame({"unique_id": "a", "ds": days, "y": wave}))
        return forecast

    def module(self, model: Any) -> nn.Module:
        return model.models[0]  # type: ignore[no-any-return]

    def trained(self, model: Any, callbacks: list[Any]) -> list[Any]:
        return self.module(model).trainer_kwargs["callbacks"][: len(callbacks)]  # type: ignore[index, no-any-return]

    def nan_batch(self) -> Any:
        return FaultInjection("nan", step=self.poisoned_step)  # a NaN loss is an exception of its training step

    def save_and_load(self, model: Any, folder: Path) -> Any:
        model.save(str(folder / "model"), overwrite=True)
        return NeuralForecast.load(str(folder / "model"))
