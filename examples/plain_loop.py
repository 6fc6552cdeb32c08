"""A plain PyTorch loop: accumulate, measure, guard, clip, report; norms in a CSV file.

    python examples/plain_loop.py
    clip-callbacks report logs/plain_loop

A recurrent network learns to add up the two marked ones of fifty numbers: long products of Jacobians, whose gradients explode.
With --poison one micro-batch of step 5 is NaN: that step never happened, and the printed line counts it.
"""

import argparse
import csv
import json
import math
from pathlib import Path

import torch
from torch import nn

from clip_callbacks import ClipRule, ParameterTable, RobustZScoreLimit, clip_step

MICRO_BATCHES, BATCH, LENGTH = 2, 32, 50


class Adder(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.RNN(2, 64, batch_first=True), nn.Linear(64, 1)

    def forward(self, sequences):
        return self.head(self.rnn(sequences)[0][:, -1]).squeeze(-1)


def draw():
    """Make sequences of (number, mark), and the sums of the marked numbers."""
    numbers, marks = torch.rand(BATCH, LENGTH), torch.zeros(BATCH, LENGTH)
    marks.scatter_(1, torch.rand(BATCH, LENGTH).topk(2).indices, 1.0)
    return torch.stack([numbers, marks], -1), (numbers * marks).sum(1)


def train(steps, poison, folder):
    model = Adder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    table = ParameterTable.of(model.named_parameters())  # made once: names for the report, and no work at each step
    rules, state, skipped, rows = [ClipRule(1.0)], None, 0, []
    for step in range(steps):
        for micro_batch in range(MICRO_BATCHES):
            inputs, sums = draw()
            loss = nn.functional.mse_loss(model(inputs), sums)
            (loss * math.nan if poison and (step, micro_batch) == (5, 1) else loss).backward()
        # the mean over the micro-batches; save `state` with your checkpoint: limits remember norms
        report, state = clip_step(
            table, state, rules=rules, scale=1 / MICRO_BATCHES, skip_above=RobustZScoreLimit(20.0), fused=optimizer
        )
        optimizer.step()  # changes nothing if the step is skipped: there are no gradients then
        optimizer.zero_grad()
        skipped += int(report.skipped)
        metrics = {name: float(value) for name, value in report.metrics().items() if value.isfinite()}
        rows.append({"step": step, "train_loss": loss.item(), "grad/skipped_steps": skipped} | metrics)
    write(rows, folder)
    return rows


def write(rows, folder):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--poison", action="store_true", help="make one micro-batch of step 5 NaN")
parser.add_argument("--folder", type=Path, default=Path("logs/plain_loop"))

if __name__ == "__main__":
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(json.dumps(train(arguments.steps, arguments.poison, arguments.folder)[-1]))
