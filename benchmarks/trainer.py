"""What a step costs in a real Trainer, loggers and all: ``python -m benchmarks.trainer``."""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.gradient_sets import gpt2_small
from benchmarks.lockstep import BLOCK, WARM_UP, Added, Fit, Pause, seconds_per_step
from benchmarks.timing import machine, publish, table
from clip_callbacks import AccumulationRescaling, GradientClipping, GradientNormMonitor, NonFiniteGuard

BARE, REFERENCE, BY_HAND = "no clipping", "Trainer(gradient_clip_val=c)", "by hand: grad_norm + log_dict + isfinite + clip"
OURS, OURS_BY_LAYER, FAMILY = "GradientClipping(c)", "GradientClipping(c), scope layer", "all four callbacks"
FUSED_BARE, FUSED_REFERENCE, FUSED_OURS, FUSED_FAMILY = (
    f"fused optimizer, {name}" for name in (BARE, "gradient_clip_val=c", OURS, FAMILY)
)
FLOOR = "one bare read of the gradients"

NOTHING_TO_CLIP, CLIPPING = 1e6, 1e-6
"""Values of c that no gradient exceeds, and that each one does."""


class Network(LightningModule):
    """Linear layers: two tensors each."""

    def __init__(self, width: int, layers: int, *, fused: bool = False, batch_size: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
        self.width, self.fused, self.batch_size = width, fused, batch_size

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """A regression to nothing."""
        loss: Tensor = self.net(batch[0]).square().mean()
        return loss

    def train_dataloader(self) -> DataLoader[Any]:
        """A thousand batches."""
        return DataLoader(TensorDataset(torch.randn(1000 * self.batch_size, self.width)), batch_size=self.batch_size)

    def configure_optimizers(self) -> Optimizer:
        """AdamW; the tables are about what comes before it."""
        return torch.optim.AdamW(self.parameters(), lr=1e-5, fused=self.fused)


class Parameters(LightningModule):
    """The parameters of a large network without its layers: forward and backward pass take a read and a write of them."""

    def __init__(self, shapes: list[tuple[int, ...]], *, fused: bool = False) -> None:
        super().__init__()
        self.held = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in shapes)
        self.fused = fused

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """A sum."""
        return torch.stack([parameter.sum() for parameter in self.held]).sum()

    def train_dataloader(self) -> DataLoader[Any]:
        """Numbers, since no batch is used."""
        return DataLoader(range(1000), batch_size=1)

    def configure_optimizers(self) -> Optimizer:
        """SGD, which keeps no state: several of these networks are in memory at a time."""
        return torch.optim.SGD(self.parameters(), lr=1e-5, fused=self.fused)


class Read(Callback):
    """Reads the gradients once, and uses nothing of it: the floor."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Read them."""
        torch._foreach_norm([parameter.grad for group in optimizer.param_groups for parameter in group["params"]])


class ByHand(Callback):
    """What many write into their module."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Log the norms of all layers; look for NaN; clip."""
        pl_module.log_dict(grad_norm(pl_module, 2))
        if all(torch.isfinite(parameter.grad).all() for parameter in pl_module.parameters() if parameter.grad is not None):
            nn.utils.clip_grad_norm_(pl_module.parameters(), 1.0)


def all_callbacks(max_norm: float) -> list[Callback]:
    """Rescaling, guard, clipping and monitor together."""
    return [AccumulationRescaling(), NonFiniteGuard(), GradientClipping(max_norm), GradientNormMonitor()]


Candidate = tuple[LightningModule, list[Callback], dict[str, Any]]
"""Module, callbacks and Trainer options of a fit."""


@dataclass(frozen=True)
class Case:
    """A network, and the steps that are timed on it."""

    name: str
    make: Callable[..., LightningModule]
    steps: int = WARM_UP + 8 * BLOCK


NETWORKS = (
    Case("50 tensors of 16 x 16 and 16", partial(Network, 16, 25)),
    Case("20 tensors of 512 x 512 and 512", partial(Network, 512, 10), steps=WARM_UP + 6 * BLOCK),
    Case("148 tensors of GPT-2 small", partial(Parameters, gpt2_small()), steps=20),
)


def candidates(make: Callable[..., LightningModule], max_norm: float) -> dict[str, Callable[[], Candidate]]:
    """What is compared."""
    fused = partial(make, fused=True)
    return {
        BARE: lambda: (make(), [], {}),
        FLOOR: lambda: (make(), [Read()], {}),
        REFERENCE: lambda: (make(), [], {"gradient_clip_val": max_norm}),
        OURS: lambda: (make(), [GradientClipping(max_norm)], {}),
        OURS_BY_LAYER: lambda: (make(), [GradientClipping(max_norm, scope="layer")], {}),
        FAMILY: lambda: (make(), all_callbacks(max_norm), {}),
        BY_HAND: lambda: (make(), [ByHand()], {}),
        FUSED_BARE: lambda: (fused(), [], {}),
        FUSED_REFERENCE: lambda: (fused(), [], {"gradient_clip_val": max_norm}),
        FUSED_OURS: lambda: (fused(), [GradientClipping(max_norm)], {}),
        FUSED_FAMILY: lambda: (fused(), all_callbacks(max_norm), {}),
    }


@contextmanager
def fits(candidates: Mapping[str, Callable[[], Candidate]], **options: Any) -> Iterator[dict[str, Fit]]:
    """Fits for :func:`~benchmarks.lockstep.seconds_per_step`, with a logger each."""
    with tempfile.TemporaryDirectory() as folder:

        def fit(make: Callable[[], Candidate], pause: Pause) -> None:
            torch.manual_seed(0)
            module, callbacks, own = make()
            quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
            trainer = Trainer(max_epochs=-1, callbacks=[*callbacks, pause], logger=CSVLogger(folder), **quiet, **options, **own)
            trainer.fit(module)

        yield {name: partial(fit, make) for name, make in candidates.items()}


def measure(case: Case, max_norm: float, *, steps: int | None = None, only: Collection[str] = ()) -> dict[str, list[float]]:
    """Seconds of each step of each candidate on one network.

    Args:
        case: The network.
        max_norm: The threshold c.
        steps: Steps of each fit; None takes as many as the network needs.
        only: Names of candidates; if empty, all.
    """
    chosen = {name: make for name, make in candidates(case.make, max_norm).items() if not only or name in only}
    with fits(chosen) as running:
        return seconds_per_step(running, steps or case.steps)


def section(case: Case, max_norm: float, steps: int | None) -> str:
    """The table of one network and one threshold."""
    times = measure(case, max_norm, steps=steps)
    plain, fused = Added(times, BARE), Added(times, FUSED_BARE)
    rows = []
    for name in times:
        is_fused = name.startswith("fused")
        added, reference = (fused, FUSED_REFERENCE) if is_fused else (plain, REFERENCE)
        lower, upper = added.spread(name)
        rows.append(
            [
                name,
                f"{1 + added.seconds(name) / added.bare_s:.3f}",
                f"{1e6 * added.seconds(name):.0f} ({1e6 * lower:.0f} to {1e6 * upper:.0f})",
                f"{added.ratio(name, reference):.2f}",
                "" if is_fused else f"{added.ratio(name, BY_HAND):.3f}",
            ]
        )
    title = f"{case.name}, {'nothing to clip' if max_norm == NOTHING_TO_CLIP else 'clipping every step'}"
    lengths = f"A step without clipping takes {1e3 * plain.bare_s:.2f} ms, on a fused optimizer {1e3 * fused.bare_s:.2f} ms."
    headers = [
        "",
        "step / step without clipping",
        "added, us: median (quartiles)",
        "added / gradient_clip_val's",
        "added / by hand's",
    ]
    return f"### {title}\n\n{lengths}\n\n{table(rows, headers)}"


def silence() -> None:
    """Keep the logs of many Trainers out of the tables."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, help="steps of each fit, the first of which do not count")
    parser.add_argument("--networks", nargs="*", default=["50", "20", "148"], help="beginnings of the names of networks")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--output", help="file in benchmarks/results to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    silence()
    note = (
        "Fits in lockstep in one process, CSVLogger, `log_every_n_steps` at its default of 50: the logging step is in the mean. "
        "(Fits of GPT-2 small end before it, and take 10 GB.) "
        "Our callbacks log all their metrics, gradient_clip_val none. Made by `python -m benchmarks.trainer`."
    )
    parts = [f"# A step in a Trainer, CPU\n\n{machine('cpu')}\n\n{note}"]
    for case in NETWORKS:
        if case.name.startswith(tuple(arguments.networks)):
            parts += [section(case, max_norm, arguments.steps) for max_norm in (NOTHING_TO_CLIP, CLIPPING)]
    publish("\n\n".join(parts), arguments.output)


if __name__ == "__main__":
    main()
