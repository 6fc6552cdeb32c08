"""What a step costs in a real Trainer, loggers and all: ``python -m benchmarks.trainer``."""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.timing import Ratio, machine, publish, table
from clip_callbacks import AccumulationRescaling, GradientClipping, GradientNormMonitor, NonFiniteGuard

WARM_UP = 20
"""Steps at the beginning of a fit that do not count; of a shorter fit half of them."""

BARE, REFERENCE, BY_HAND = "no clipping", "Trainer(gradient_clip_val=c)", "by hand: grad_norm + log_dict + isfinite + clip"


class Network(LightningModule):
    """Linear layers: two tensors each."""

    def __init__(self, width: int, layers: int, *, fused: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
        self.fused = fused

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """A regression to nothing."""
        loss: Tensor = self.net(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> Optimizer:
        """AdamW; the tables are about what comes before it."""
        return torch.optim.AdamW(self.parameters(), lr=1e-5, fused=self.fused)


class ByHand(Network):
    """What many write into their module."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the norms of all layers; look for NaN; clip."""
        self.log_dict(grad_norm(self, 2))
        if all(torch.isfinite(parameter.grad).all() for parameter in self.parameters() if parameter.grad is not None):
            nn.utils.clip_grad_norm_(self.parameters(), 1.0)


class Clock(Callback):
    """Seconds per step after the first ones. It is in every run."""

    def __init__(self, steps: int) -> None:
        self.start = self.end = 0.0
        self.steps, self.warm_up = steps, min(WARM_UP, steps // 2)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Begin when the caches are warm."""
        if trainer.global_step == self.warm_up:
            self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Note the time."""
        self.end = time.perf_counter()

    def per_step_s(self) -> float:
        """Mean seconds of a step."""
        return (self.end - self.start) / (self.steps - self.warm_up)


def all_callbacks(max_norm: float) -> list[Callback]:
    """Rescaling, guard, clipping and monitor together."""
    return [AccumulationRescaling(), NonFiniteGuard(), GradientClipping(max_norm), GradientNormMonitor()]


def candidates(
    width: int, layers: int, max_norm: float
) -> dict[str, Callable[[str], tuple[LightningModule, list[Callback], dict[str, Any]]]]:
    """Module, callbacks and Trainer options of each run."""
    plain, fused = partial(Network, width, layers), partial(Network, width, layers, fused=True)
    return {
        BARE: lambda _: (plain(), [], {}),
        REFERENCE: lambda _: (plain(), [], {"gradient_clip_val": max_norm}),
        "GradientClipping(c)": lambda _: (plain(), [GradientClipping(max_norm)], {}),
        "GradientClipping(c), scope layer": lambda _: (plain(), [GradientClipping(max_norm, scope="layer")], {}),
        "all four callbacks": lambda _: (plain(), all_callbacks(max_norm), {}),
        BY_HAND: lambda _: (ByHand(width, layers), [], {}),
        "fused AdamW, no clipping": lambda _: (fused(), [], {}),
        "fused AdamW, gradient_clip_val=c": lambda _: (fused(), [], {"gradient_clip_val": max_norm}),
        "fused AdamW, GradientClipping(c)": lambda _: (fused(), [GradientClipping(max_norm)], {}),
    }


def seconds_per_step(
    make: Callable[[str], tuple[LightningModule, list[Callback], dict[str, Any]]],
    width: int,
    steps: int,
    folder: str,
    *,
    batch_size: int = 8,
) -> float:
    """One fit."""
    torch.manual_seed(0)
    module, callbacks, options = make(folder)
    clock = Clock(steps)
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        callbacks=[*callbacks, clock],
        logger=CSVLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(batch_size * steps, width)), batch_size=batch_size))
    return clock.per_step_s()


def section(name: str, width: int, layers: int, max_norm: float, rounds: int, steps: int) -> str:
    """The table of one network."""
    runs = candidates(width, layers, max_norm)
    times: dict[str, list[float]] = {key: [] for key in runs}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(-1, rounds):
            order = list(runs.items())
            Random(number).shuffle(order)
            for key, make in order:
                seconds = seconds_per_step(make, width, steps, folder)
                if number >= 0:
                    times[key].append(seconds)
    rows = []
    for key, seconds in times.items():
        bare = times["fused AdamW, no clipping" if "fused" in key else BARE]
        base = times["fused AdamW, gradient_clip_val=c" if "fused" in key else REFERENCE]
        added = [1e6 * (a - b) for a, b in zip(seconds, bare, strict=True)]
        reference = sorted(a - b for a, b in zip(base, bare, strict=True))[rounds // 2]
        by_hand = sorted(a - b for a, b in zip(times[BY_HAND], times[BARE], strict=True))[rounds // 2]
        median = sorted(added)[rounds // 2]
        rows.append(
            [key, Ratio.of(seconds, bare), f"{median:.0f}", f"{1e-6 * median / reference:.2f}", f"{1e-6 * median / by_hand:.3f}"]
        )
    headers = ["", "step against no clipping: median (quartiles)", "added, us", "added / gradient_clip_val's", "added / by hand's"]
    return f"### {name}\n\n{table(rows, headers)}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--output", help="file in benchmarks/results to write")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    title = f"# A step in a Trainer, CPU\n\n{machine('cpu')}\n"
    note = (
        "Fits interleaved in one process, CSVLogger, `log_every_n_steps` at its default of 50: the logging step is in the mean. "
        "GradientClipping logs all its metrics, gradient_clip_val none. Made by `python -m benchmarks.trainer`.\n"
    )
    networks = (
        ("50 tensors of 16 x 16 and 16, nothing to clip", 16, 25, 1e6),
        ("50 tensors of 16 x 16 and 16, clipping every step", 16, 25, 1e-12),
        ("20 tensors of 512 x 512 and 512, clipping every step", 512, 10, 1e-12),
    )
    sections = [section(*network, arguments.rounds, arguments.steps) for network in networks]
    publish("\n".join([title, note, *(text + "\n" for text in sections)]).rstrip(), arguments.output)


if __name__ == "__main__":
    main()
