"""Modules with bad steps, and replays of these."""

from __future__ import annotations

import dataclasses
import json
import math

import torch
import yaml
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from clip_callbacks import Bundles, NonFiniteGuard
from clip_callbacks.bundles.bundle import FACTS
from clip_callbacks.cli import main

WIDTH = 8


class Log(nn.Module):
    def forward(self, x):
        return x.log()


class Exp(nn.Module):
    def forward(self, x):
        return x.exp()


class Root(nn.Module):
    """Takes the square root, which is finite at 0, while its derivative is not."""

    def forward(self, x):
        return x.sqrt()


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


class Net(LightningModule):
    """A network of layers that a test chooses; its loss is the mean square of the output."""

    def __init__(self, kind: str = "log") -> None:
        super().__init__()
        layers = {
            "log": lambda: [Log(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1)],
            "inner": lambda: [nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Softplus(), Log()), nn.Linear(WIDTH, 1)],
            "root": lambda: [nn.Linear(WIDTH, WIDTH), Scale(0.0), Root(), nn.Linear(WIDTH, 1)],
            "spike": lambda: [nn.Linear(WIDTH, WIDTH), Scale(1e4), nn.Linear(WIDTH, 1)],
            "plain": lambda: [nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)],
            "norm": lambda: [nn.BatchNorm1d(WIDTH), Scale(40.0), Exp(), nn.Linear(WIDTH, 1)],
        }
        self.net = nn.Sequential(*layers[kind]())

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def samples(count=16, width=WIDTH):
    return torch.rand(count, width, generator=torch.Generator().manual_seed(1)) + 0.5


def fitted(trainer, tmp_path, module, inputs, batch_size=4, *, weights="full", options=None, callbacks=(), **guard):
    """The bundle of the only bad step of a fit."""
    fit = trainer(*callbacks, NonFiniteGuard(bundles=Bundles(tmp_path / "bad", weights=weights), **guard), **(options or {}))
    fit.fit(module, DataLoader(TensorDataset(inputs), batch_size=batch_size))
    (bundle,) = (tmp_path / "bad").iterdir()
    return bundle


def config(tmp_path, module, **arguments):
    path = tmp_path / "cfg.yaml"
    path.write_text(
        yaml.safe_dump(
            {"seed_everything": 0, "model": {"class_path": f"{module.__module__}.{module.__qualname__}", "init_args": arguments}}
        )
    )
    return ["--config", str(path)]


def replayed(capsys, bundle, *arguments):
    """Replay a bundle; return the exit code and the report."""
    capsys.readouterr()
    code = main(["replay", str(bundle), *map(str, arguments), "--json"])
    said = capsys.readouterr()
    assert code != 2, said.err
    return code, json.loads(said.out)


def refused(capsys, bundle, *arguments):
    """Replay a bundle that is refused; return the last line on stderr."""
    capsys.readouterr()
    assert main(["replay", str(bundle), *map(str, arguments)]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def suspects(found):
    """The names of the suspect modules, by fault."""
    return {culprit["fault"]: culprit["name"] for culprit in found["suspects"]}


class Gan(LightningModule):
    """A GAN in manual optimization; the generator's loss is NaN when the state of the other optimizer counts three steps."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.discriminator = nn.Linear(WIDTH, 1)

    def training_step(self, batch, batch_idx):
        discriminator, generator = self.optimizers()
        made = self.generator(batch[0])
        loss = (self.discriminator(made.detach()) - self.discriminator(batch[0])).mean()
        self.one_step(discriminator, loss)
        steps = next(iter(discriminator.optimizer.state.values()))["step"]
        self.one_step(generator, -self.discriminator(made).mean() * (math.nan if steps >= 3 else 1))

    def one_step(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(net.parameters(), lr=1e-2) for net in (self.discriminator, self.generator)]


@dataclasses.dataclass
class Item:
    x: Tensor
    names: list[str]
    temperature: Tensor


def rewrite(bundle, name, content):
    """Replace a file of a bundle, and its size and hash in bundle.json, as an attacker would."""
    import hashlib

    if isinstance(content, str):
        (bundle / name).write_text(content)
    else:
        torch.save(content, bundle / name)
    data = (bundle / name).read_bytes()
    facts = json.loads((bundle / FACTS).read_text())
    facts["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (bundle / FACTS).write_text(json.dumps(facts))
