"""My loss turned NaN. Where did it begin?

    python examples/nan_questions.py    # four reports and a table, in a second; --quick is the same

Ask in this order: Is the loss NaN (forward pass)? If not, are gradients non-finite (backward pass)? Were parameters NaN before the
step? Or only after it (learning rate, optimizer)? NonFiniteGuard answers for four runs, each with one fault: it gives stage,
module, parameters, step and batch, in a warning and in a line of nonfinite_steps.jsonl beside the logs. After the first two faults
training goes on. In the other two the parameters themselves are NaN or infinite and stay so, and the guard ends the run with an
error.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.loggers import CSVLogger
from scaffold import command_line, quiet_trainer, start
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader

from clip_callbacks import NonFiniteGradientError, NonFiniteGuard

BATCHES, FAULTY = 8, 3


class Entropy(nn.Module):
    """Computes p log p without a check for 0: 0 times log 0 is NaN."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs() * x.abs().log()


class Root(nn.Module):
    """Computes a root, whose derivative at 0 is infinite."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs().sqrt()


class Network(LightningModule):
    """Two linear layers with another module between them."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        seed_everything(0, verbose=False)
        self.first, self.between, self.last = nn.Linear(4, 4, bias=False), between, nn.Linear(4, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.last(self.between(self.first(batch))) - 10.0).square().mean()

    def train_dataloader(self) -> DataLoader[Tensor]:
        batches = torch.randn(BATCHES, 16, 4)
        batches[FAULTY] = 0.0
        return DataLoader(batches, batch_size=None)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.001)


class SpoiltWeight(Network):
    """Starts with a NaN in a weight, as from a bad checkpoint."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__(between)
        with torch.no_grad():
            self.last.weight[0, 1] = math.nan


class HugeStep(Network):
    """Takes the step of batch 2 with an absurd learning rate: the parameters overflow, and batch 3 has a bad loss."""

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self.optimizers().param_groups[0]["lr"] = 3e38 if batch_idx == FAULTY - 1 else 0.001


FAULTS = {
    "log of zero": lambda: Network(Entropy()),
    "infinite derivative": lambda: Network(Root()),
    "spoilt weight": lambda: SpoiltWeight(nn.Tanh()),
    "huge learning rate": lambda: HugeStep(nn.Tanh()),
}


class Answer(NamedTuple):
    """Answers of the guard in one run: the warning as text, the lines of the journal, and whether the run reached its end."""

    text: str
    journal: list[dict[str, Any]]
    goes_on: bool


def ask(fault: str, folder: Path) -> Answer:
    """Train with a fault and the guard, and return its answers."""
    module, logger = FAULTS[fault](), CSVLogger(folder, name="", version=fault.replace(" ", "_"))
    guard, error = NonFiniteGuard(max_consecutive=2, trace_forward=True), None
    Path(logger.log_dir, "nonfinite_steps.jsonl").unlink(missing_ok=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            quiet_trainer(guard, max_epochs=1, logger=logger).fit(module)
        except NonFiniteGradientError as stop:
            error = stop
    (text,) = [str(warning.message) for warning in caught if "Non-finite gradients" in str(warning.message)]
    lines = Path(logger.log_dir, "nonfinite_steps.jsonl").read_text(encoding="utf-8").splitlines()
    return Answer(text, [json.loads(line) for line in lines], error is None)


def summary(fault: str, answer: Answer) -> tuple[Any, ...]:
    facts = answer.journal[0]
    names = ", ".join(tensor["name"] for tensor in facts["parameters"] or facts["gradients"])
    module = (facts["traced"] or "").partition(",")[0]
    return fault, facts["stage"], module, names, facts["step"], facts["batch"], "goes on" if answer.goes_on else "stopped"


def main(argv: Sequence[str] | None = None) -> None:
    arguments = start(command_line(__doc__, "nan_questions"), argv)
    answers = {fault: ask(fault, arguments.output) for fault in FAULTS}
    for fault, answer in answers.items():
        print(f"== {fault}\n{answer.text}\n")
    headers = ("fault", "stage", "first bad output", "bad parameters, or gradients", "step", "batch", "the run")
    print(tabulate([summary(fault, answer) for fault, answer in answers.items()], headers))


if __name__ == "__main__":
    main()
