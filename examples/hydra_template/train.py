"""Train with Hydra, laid out as lightning-hydra-template: each part of a training, callbacks too, is a file under configs/.

    python examples/hydra_template/train.py
    python examples/hydra_template/train.py callbacks=local_norms trainer.max_epochs=5
    python examples/hydra_template/train.py -m callbacks.clip.max_norm=0.5,1.0
    clip-callbacks report logs/hydra_template    # all of its runs in one page

Copy configs/callbacks/ into your own template. `_convert_: all` in local_norms.yaml keeps Hydra from turning rules back into
configurations.
"""

import sys
from pathlib import Path

import hydra
from lightning.pytorch import Trainer, seed_everything
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).parent))  # so that configurations find src from any working directory


@hydra.main(version_base="1.3", config_path="configs", config_name="train.yaml")
def main(config: DictConfig) -> float:
    """Train as configured, and return the validation loss, which a sweeper minimizes."""
    seed_everything(config.seed)
    datamodule, model = hydra.utils.instantiate(config.data), hydra.utils.instantiate(config.model)
    callbacks = [hydra.utils.instantiate(each) for each in config.callbacks.values()]
    logger = [hydra.utils.instantiate(each) for each in config.logger.values()]
    trainer: Trainer = hydra.utils.instantiate(config.trainer, callbacks=callbacks, logger=logger)
    trainer.fit(model, datamodule)
    return float(trainer.callback_metrics["val_loss"])


if __name__ == "__main__":
    main()
