"""pytorch-tabular: networks for tables. It sets a ``gradient_clip_val`` of 0, and saves callbacks with a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
from pytorch_tabular.models import CategoryEmbeddingModelConfig
from torch import nn

from tests.clients.client import EPOCHS, Client


class Package(Client):
    resumes_exactly = False  # rows are shuffled from where the generator stands

    def fit(self, folder: Path, callbacks: list[Any], *, clip: float | None = None) -> Any:
        rows = np.random.default_rng(0).normal(size=(40, 3))
        table = pd.DataFrame(rows, columns=["a", "b", "y"]).assign(y=lambda frame: 10 * frame.a - frame.b)
        options = self.trainer_options(folder, [], None)
        quiet = {name: options[name] for name in ("default_root_dir", "enable_model_summary", "log_every_n_steps")}
        clipping = {} if clip is None else {"gradient_clip_val": clip}
        model = TabularModel(
            data_config=DataConfig(target=["y"], continuous_cols=["a", "b"]),
            model_config=CategoryEmbeddingModelConfig(task="regression", layers="8-4", dropout=0.0),
            optimizer_config=OptimizerConfig(),
            trainer_config=TrainerConfig(
                max_epochs=EPOCHS, batch_size=8, accelerator="cpu", checkpoints=None, early_stopping=None, load_best=False,
                progress_bar="none", trainer_kwargs=quiet, **clipping,
            ),
            verbose=False,
        )  # fmt: skip
        model.fit(train=table, callbacks=[*callbacks])
        return model

    def module(self, model: Any) -> nn.Module:
        return model.model  # type: ignore[no-any-return]

    def save_and_load(self, model: Any, folder: Path) -> Any:
        model.save_model(str(folder / "model"))
        return TabularModel.load_model(str(folder / "model"))
