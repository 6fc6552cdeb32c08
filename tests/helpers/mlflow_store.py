"""Databases of MLflow, empty: to make one takes six seconds, so each process makes one and writes its bytes elsewhere."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger


def in_file(folder: Path) -> str:
    """Put a database into a folder; its address."""
    path = folder / "mlflow.db"
    path.write_bytes(_empty())
    return f"sqlite:///{path}"


def three_loggers(folder: Path, experiment: str) -> list[Logger]:
    """Loggers of a CSV file, of TensorBoard and of MLflow in a folder."""
    return [
        CSVLogger(folder, "csv", version="run"),
        TensorBoardLogger(folder, "board", version="run"),
        MLFlowLogger(experiment, run_name="run", tracking_uri=in_file(folder)),
    ]


@cache
def _empty() -> bytes:
    from mlflow.tracking import MlflowClient

    with TemporaryDirectory() as scratch:
        path = Path(scratch, "mlflow.db")
        MlflowClient(f"sqlite:///{path}").search_experiments()
        return path.read_bytes()
