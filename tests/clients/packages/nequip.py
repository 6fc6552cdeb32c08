"""nequip: interatomic potentials. The loss needs gradients of gradients; weights are averaged by the module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from nequip.data.datamodule import NequIPDataModule
from nequip.train import EMALightningModule
from nequip.utils.global_state import set_global_state

from tests.clients.client import Client

LOADER = {"_target_": "torch.utils.data.DataLoader", "batch_size": 2}
RADIUS = 4.0
DATASET = {
    "_target_": "nequip.data.dataset.EMTTestDataset",
    "transforms": [
        {"_target_": "nequip.data.transforms.ChemicalSpeciesToAtomTypeMapper", "model_type_names": ["Cu"]},
        {"_target_": "nequip.data.transforms.NeighborListTransform", "r_max": RADIUS},
    ],
    "supercell": [2, 2, 2],
    "seed": 0,
    "num_frames": 8,
    "element": "Cu",
}
COEFFICIENTS = {"total_energy": 1.0, "forces": 1.0, "stress": 1.0}
MODULE = {
    "loss": {"_target_": "nequip.train.EnergyForceStressLoss", "per_atom_energy": True, "coeffs": COEFFICIENTS},
    "val_metrics": {
        "_target_": "nequip.train.EnergyForceStressMetrics",
        "coeffs": {f"{name}_mae": weight for name, weight in COEFFICIENTS.items()},
    },
    "optimizer": {"_target_": "torch.optim.Adam", "lr": 0.01},
    "model": {
        "_target_": "nequip.model.NequIPGNNModel",
        "seed": 0,
        "model_dtype": "float64",
        "type_names": ["Cu"],
        "r_max": RADIUS,
        "l_max": 1,
        "num_layers": 2,
        "num_features": 4,
        "radial_mlp_depth": 1,
        "radial_mlp_width": 4,
        "avg_num_neighbors": 12.0,
    },
}


class Package(Client):
    clip = 1e-3

    def fit(self, folder: Path, callbacks: list[Any], *, clip: float | None = None) -> Any:
        set_global_state()
        split = {"dataset": DATASET, "train": 6, "val": 2}
        data = NequIPDataModule(seed=0, split_dataset=split, train_dataloader=LOADER, val_dataloader=LOADER)
        module = EMALightningModule(**MODULE, num_datasets=data.num_datasets, info_dict={})
        options = self.trainer_options(folder, [*callbacks, ModelCheckpoint(folder, save_last=True)], clip)
        trainer = Trainer(**(options | {"enable_checkpointing": True}), inference_mode=False)
        trainer.fit(module, datamodule=data)
        return module

    def save_and_load(self, model: Any, folder: Path) -> Any:
        path = model.trainer.checkpoint_callback.last_model_path
        return EMALightningModule.load_from_checkpoint(path, weights_only=False)
