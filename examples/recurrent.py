"""What does a long sequence do to the gradients of an RNN, a GRU and an LSTM, and what does clipping change?

    python examples/recurrent.py            # three tables, and two pictures in logs/recurrent, in half a minute
    python examples/recurrent.py --quick    # seconds

The first table shows where such a gradient comes from: a cell is called at every time step, so the gradient of its weights is the
sum over all calls, and backward passes at each time step add up to one backward pass of the summed loss. The second part shows the
size of this gradient at the start of training, over the length of the sequence, for torch's vanilla RNN, one with large recurrent
weights, a GRU and an LSTM. The norm of the weights' gradient explodes or not; the gradient at the first input explodes with it, or
vanishes. Clipping reduces exploding gradients, and leaves vanished ones as they are. The third part trains with and without
clipping (is the sum of one number of each input positive?): clipping prevents jumps in the loss of the vanilla RNN, but only the
gates of a GRU or an LSTM learn the task.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule, seed_everything
from scaffold import BLUE, GREEN, GREY, ORANGE, RED, command_line, quiet_trainer, save, sheet, start
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from clip_callbacks import GradientClipping, clip_step

INPUTS, STATES, MAX_NORM = 8, 32, 1.0
KINDS = ("RNN", "RNN, large weights", "GRU", "LSTM")
COLORS = dict(zip(KINDS, (BLUE, RED, GREEN, ORANGE), strict=True))


def network(kind: str, dtype: torch.dtype = torch.float32) -> nn.RNNBase:
    torch.manual_seed(0)
    rnn = getattr(nn, kind.partition(",")[0])(INPUTS, STATES, batch_first=True, dtype=dtype)
    if kind.endswith("large weights"):
        nn.init.orthogonal_(rnn.weight_hh_l0, gain=2.0)
    return rnn


def noise(samples: int, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(samples, length, INPUTS, generator=torch.Generator().manual_seed(1), dtype=dtype)


def summed_and_stepwise(length: int = 12) -> dict[str, Tensor]:
    """Compute the gradient of the recurrent weights in four ways, in double precision."""
    sequence = noise(4, length, torch.float64)
    rnn = network("RNN", torch.float64)
    gradients = {}

    def read(states: Sequence[Tensor], name: str, weights: Sequence[Tensor], *, stepwise: bool = False) -> None:
        losses = [state.square().mean() for state in states]
        if stepwise:
            for loss in losses:
                loss.backward(retain_graph=True)
        else:
            torch.stack(losses).sum().backward()
        gradients[name] = torch.stack([weight.grad for weight in weights]).sum(0)
        rnn.zero_grad()

    def calls(copies: Sequence[Tensor]) -> list[Tensor]:
        """Return the states of a cell that is called once for each time step, with its own copy of the weights each time."""
        states = [sequence.new_zeros(4, STATES)]
        for step, copy in enumerate(copies):
            inputs = sequence[:, step] @ rnn.weight_ih_l0.T + rnn.bias_ih_l0
            states.append(torch.tanh(inputs + states[-1] @ copy.T + rnn.bias_hh_l0))
        return states[1:]

    weight = rnn.weight_hh_l0
    read(rnn(sequence)[0].unbind(1), "nn.RNN, summed loss", [weight])
    read(calls([weight] * length), "cell, summed loss", [weight])
    read(calls([weight] * length), "cell, backward at each time step", [weight], stepwise=True)
    copies = [weight.detach().clone().requires_grad_() for _ in range(length)]
    read(calls(copies), "sum over calls, each with its own weights", copies)
    return gradients


def norms(kind: str, length: int) -> dict[str, float]:
    """Return norms of the gradient at the start of training, for a loss on the last state."""
    rnn, sequence = network(kind), noise(32, length).requires_grad_()
    rnn(sequence)[0][:, -1].square().sum(1).mean().backward()
    report, _ = clip_step(rnn.named_parameters(), max_norm=MAX_NORM)
    return {
        "total_norm": report.total_norm.item(),
        "clipped_norm": report.clipped_norm.item(),
        "first input": sequence.grad[:, 0].norm().item(),
    }


class SumOfFirst(LightningModule):
    """Classifies sequences by the sign of the sum of their first numbers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.rnn, self.head, self.losses = network(kind), nn.Linear(STATES, 1), []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        logits = self.head(self.rnn(batch[0])[0][:, -1])[:, 0]
        loss = nn.functional.binary_cross_entropy_with_logits(logits, (batch[0][:, :, 0].sum(1) > 0).float())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)


def train(kind: str, max_norm: float | None, steps: int, length: int = 30) -> list[float]:
    """Train, and return the loss of each step."""
    seed_everything(0, verbose=False)
    module = SumOfFirst(kind)
    data = DataLoader(TensorDataset(noise(32 * steps, length)), batch_size=32)
    quiet_trainer(GradientClipping(max_norm), max_epochs=1).fit(module, data)
    return module.losses


def norm_picture(lengths: list[int], found: dict[str, list[dict[str, float]]]):
    figure, axes = sheet(columns=2)
    for kind, each in found.items():
        axes[0].loglog(lengths, [norm["total_norm"] for norm in each], color=COLORS[kind], label=kind)
        axes[0].loglog(lengths, [norm["clipped_norm"] for norm in each], ":", color=COLORS[kind])
        axes[1].loglog(lengths, [norm["first input"] or float("nan") for norm in each], color=COLORS[kind], label=kind)
    axes[0].plot([], [], ":", color=GREY, label=f"after clipping, max_norm {MAX_NORM:g}")
    axes[0].set(ylabel="norm of all gradients (log scale)", title="Clipping bounds exploding gradients")
    axes[1].set(ylabel="gradient norm at the first input (log scale)", title="Gradients at the first input explode or vanish")
    for axis in axes:
        axis.set_xlabel("sequence length (time steps, log scale)")
        axis.legend(fontsize=8)
    return figure


def training_picture(losses: dict[tuple[str, float | None], list[float]]):
    figure, axes = sheet(columns=2)
    for (kind, max_norm), each in losses.items():
        smooth = torch.tensor(each).unfold(0, 20, 1).mean(1)
        axes[max_norm is not None].semilogy(range(20, len(each) + 1), smooth, color=COLORS[kind], label=kind)
    for axis, title in zip(axes, ("Without clipping", f"With max_norm {MAX_NORM:g}"), strict=True):
        axis.set(xlabel="optimizer step", ylabel="loss (nats, mean of 20 steps, log scale)", title=title, ylim=(0.05, 5))
        axis.axhline(0.693, color=GREY, linestyle="--", linewidth=0.8, label="loss of guessing")
        axis.legend(fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    arguments = start(command_line(__doc__, "recurrent"), argv)
    ways = summed_and_stepwise()
    reference = next(iter(ways.values()))
    rows = [(name, float(gradient.norm()), float((gradient - reference).abs().max())) for name, gradient in ways.items()]
    print(tabulate(rows, ("recurrent weights' gradient", "norm", "largest difference"), floatfmt=("", ".15f", ".1e")), end="\n\n")

    lengths = [1, 4, 16, 64] if arguments.quick else [1, 2, 4, 8, 16, 32, 64, 128, 256]
    found = {kind: [norms(kind, length) for length in lengths] for kind in KINDS}
    for name in ("total_norm", "clipped_norm", "first input"):
        rows = [(kind, *(norm[name] for norm in each)) for kind, each in found.items()]
        print(tabulate(rows, (f"{name}, at length", *lengths), floatfmt=".2e"), end="\n\n")
    save(norm_picture(lengths, found), arguments.output / "norms.png")

    steps, kinds = 30 if arguments.quick else 300, ("RNN", "GRU", "LSTM")
    losses = {(kind, max_norm): train(kind, max_norm, steps) for kind in kinds for max_norm in (None, MAX_NORM)}
    rows = [(kind, max_norm, max(each), sum(each[-20:]) / 20) for (kind, max_norm), each in losses.items()]
    print(tabulate(rows, ("", "max_norm", "largest loss", "mean of the last 20"), floatfmt=".3f", missingval="none"), end="\n\n")
    save(training_picture(losses), arguments.output / "training.png")


if __name__ == "__main__":
    main()
