"""Modules rebuilt from the user's script or its configuration."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from tests.helpers import forked
from tests.helpers.replaying import Net, config, refused, replayed, suspects

pytestmark = [
    pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Spike at:RuntimeWarning"),
]


SCRIPT = """
    import sys
    from pathlib import Path
    import torch
    from lightning.pytorch import Callback, LightningDataModule
    from lightning.pytorch.cli import LightningCLI
    from torch.utils.data import DataLoader, TensorDataset
    import beside
    from tests.helpers.replaying import Net as Base, samples

    class Net(Base):
        def __init__(self, kind: str = "plain", zeros: int = 0) -> None:
            super().__init__(kind)
            self.zeros = zeros

        def training_step(self, batch, batch_idx):
            return super().training_step([batch[0] * (1 - self.zeros)], batch_idx)

    class Data(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(TensorDataset(samples(8)), batch_size=4)

    class Loud(Callback):
        def __init__(self):
            Path(__file__).with_name("loud").touch()

    class CLI(LightningCLI):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            print("not to be reached in a replay")
            Path(__file__).with_name("trained").touch()

        def add_arguments_to_parser(self, parser):
            parser.add_argument("--zeros", type=int, default=0)
            parser.link_arguments("zeros", "model.zeros")

    def cli_main():
        CLI(Net, Data, **RUN)

    if __name__ == "__main__":
        cli_main()
"""


@pytest.fixture
def script(tmp_path):
    """A training script that imports a file beside it, with its configuration and the bundle of a run."""

    def make(run="{}", command=("fit",)):
        folder = tmp_path / "script"
        folder.mkdir()
        (folder / "beside.py").touch()
        source = textwrap.dedent(SCRIPT)
        (folder / "train.py").write_text(source.replace("**RUN", f"**{run}"))
        (folder / "cfg.yaml").write_text(
            yaml.safe_dump(
                {
                    "seed_everything": 3,
                    "model": {"kind": "log"},
                    "zeros": 1,
                    "trainer": {
                        "max_epochs": 1,
                        "accelerator": "cpu",
                        "enable_progress_bar": False,
                        "enable_checkpointing": False,
                        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder / "logs")}},
                        "callbacks": [
                            {"class_path": "__main__.Loud"},
                            {
                                "class_path": "clip_callbacks.NonFiniteGuard",
                                "init_args": {"bundles": {"folder": str(folder / "bad"), "max_count": 1}},
                            },
                        ],
                    },
                }
            )
        )
        done = forked.run("train.py", *command, "--config", "cfg.yaml", cwd=folder)
        assert done.returncode == 0, done.stderr[-2000:]
        (bundle,) = (folder / "bad").iterdir()
        return folder, bundle

    return make


def test_scripts_with_their_own_cli_are_run_up_to_the_module(script, capsys):
    folder, bundle = script()
    for name in ("trained", "loud"):
        (folder / name).unlink()
    path, before = list(sys.path), sys.modules["__main__"]
    code, found = replayed(capsys, bundle, "--script", folder / "train.py", "--config", folder / "cfg.yaml")
    assert code == 0
    assert suspects(found) == {"output": "net.0"}
    assert found["weights"].startswith("as the configuration initializes them")
    assert found["micro_batches"][0]["same_loss"], "the seed of the configuration makes the weights of the run"
    assert not (folder / "trained").exists()
    assert not (folder / "loud").exists(), "what the Trainer of the configuration has is not made"
    assert sys.path == path
    assert sys.modules["__main__"] is before
    sys.modules.pop("beside", None)
    (saved,) = (folder / "logs").rglob("config.yaml")
    assert replayed(capsys, bundle, "--script", folder / "train.py", "--config", saved)[0] == 0
    assert replayed(capsys, bundle, "--script", folder / "train.py", "--config", bundle / "config.yaml")[0] == 0
    sections = folder / "sections.yaml"
    sections.write_text(yaml.safe_dump({"fit": yaml.safe_load((folder / "cfg.yaml").read_text())}))
    assert replayed(capsys, bundle, "--script", folder / "train.py", "--config", sections)[0] == 0
    line = refused(capsys, bundle, "--config", folder / "cfg.yaml")
    assert "(the bundle was made by train.py)" in line


def test_scripts_that_do_not_run_their_cli_work_too(script, capsys):
    folder, bundle = script("""{"trainer_defaults": {"max_steps": 1}}""")
    source = (folder / "train.py").read_text()
    (folder / "train.py").write_text(source.replace('"trainer_defaults": {"max_steps": 1}', '"run": False'))
    code, found = replayed(capsys, bundle, "--script", folder / "train.py", "--config", folder / "cfg.yaml")
    assert code == 0
    assert suspects(found) == {"output": "net.0"}


def test_scripts_that_make_no_cli_or_fail_are_refused(bad, tmp_path, capsys):
    good, path = config(tmp_path, Net, kind="log"), tmp_path / "main.py"
    path.write_text("print('nothing')")
    assert "must be a script that makes a LightningCLI when it is run" in refused(capsys, bad, *good, "--script", path)
    path.write_text(f"from lightning.pytorch import Trainer\nTrainer().fit(None)\nopen({str(tmp_path / 'after')!r}, 'w')")
    assert "Leave it out, and name the class of the model in a YAML file" in refused(capsys, bad, *good, "--script", path)
    assert not (tmp_path / "after").exists(), "its own training must not begin again"
    path.write_text("\n1 / 0")
    assert f"main.py raised ZeroDivisionError: division by zero ({path}, line 2)" in refused(capsys, bad, *good, "--script", path)


def test_the_optimizer_of_a_configuration_is_bound_to_the_module_that_runs(bad, tmp_path, capsys):
    arguments = config(tmp_path, Net, kind="log")
    path = Path(arguments[1])
    path.write_text(path.read_text() + "optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.1}}\n")
    code, found = replayed(capsys, bad, *arguments, "--bisect", "--detect-anomaly")
    assert code == 0
    assert found["bisection"]["samples"] == [1]
