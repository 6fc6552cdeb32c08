"""Detection and false alarms of thresholds on the loss, on the norm, and on both, where losses and norms move together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.limits.common import Section, panels, percent
from benchmarks.limits.streams import Sizes, clipped
from benchmarks.timing import table
from clip_callbacks import RobustZScoreLimit

KINDS = ("normal", "Student-t", "falling")
ON_NORM = RobustZScoreLimit(4.0)
ON_LOSS = RobustZScoreLimit(4.0, floor=0.01, scale="linear")
ON_LOG_LOSS = RobustZScoreLimit(4.0, floor=0.01)

ORDINARY, POISONED, HARD, STEEP = range(4)
RARE = 0.005
"""Share of the steps of each kind of event."""

NOISE_OF_LOSS, NOISE_OF_LOG_NORM, CORRELATION = 0.05, 0.3, 0.5
HEIGHTS, FACTORS = (3.0, 20.0), (3.0, 10.0)
"""What an event adds to the loss, in standard deviations, and what it multiplies the norm by; uniform between the two."""

SIGMAS, ROLLING, LEAST = 6.0, 128, 64
"""OLMo-core's SkipStepOptimizer: standard deviations, and the number of values that they are taken over, at most and at least."""

RECENT, RTOL, SPIKE_WARMUP = 10, 2.0, 1
"""Defaults of Lightning's SpikeDetection."""

BINS = 8

STYLES = {
    "norm": ("tab:green", "-"),
    "loss": ("tab:blue", "-"),
    "loss, log scale": ("tab:blue", ":"),
    "norm or loss": ("tab:purple", "-"),
    "norm and loss": ("tab:red", "-"),
    "norm, mean + 6 std": ("tab:green", "--"),
    "loss, mean + 6 std": ("tab:blue", "--"),
    "norm or loss, mean + 6 std (OLMo-core)": ("tab:purple", "--"),
    "norm and loss, mean + 6 std": ("tab:red", "--"),
    "loss, SpikeDetection (Lightning)": ("black", "-."),
}

SHOWN = (
    "On normal noise, and while the loss falls, the median and the MAD find more spikes than mean + 6 std, whose standard "
    "deviation takes in the spikes before. Under heavy tails the linear scale finds fewer (43 % against 57 %), with a quarter of "
    "the false alarms; the logarithmic one takes tails for normal ones, finds most, and skips 30 times as many ordinary batches. "
    "Skipping by norm or loss finds the most, but also skips healthy batches that raise one of them alone. Only norm and loss "
    "together leaves those in the training, at the price of the spikes that either misses. The defaults of SpikeDetection ask for "
    "a loss three times the recent mean, which none of these spikes reaches."
)

FULL, QUICK = Sizes(64, 3000, 600), Sizes(4, 300, 150)


@dataclass(frozen=True)
class Streams:
    """Losses and norms of many runs, each of shape ``(steps, streams)``.

    Args:
        losses: The losses.
        norms: The total norms.
        events: What each step is: ordinary, poisoned (loss and norm are raised), hard (the loss is), or steep (the norm is).
        heights: What an event adds to the loss, in standard deviations of ordinary losses.
    """

    losses: Tensor
    norms: Tensor
    events: Tensor
    heights: Tensor


def drawn(sizes: Sizes) -> Streams:
    """Draw them, streams of one kind beside each other."""
    dice = torch.Generator().manual_seed(3)
    shape = sizes.steps, len(KINDS) * sizes.streams
    heavy = torch.arange(shape[1]) // sizes.streams == KINDS.index("Student-t")
    falls = torch.arange(shape[1]) // sizes.streams == KINDS.index("falling")
    left = torch.exp(-torch.arange(sizes.steps, dtype=torch.float64)[:, None] / 400.0) * falls
    shared, of_loss, of_norm = (_noise(shape, heavy, dice) for _ in range(3))
    apart = (1.0 - CORRELATION**2) ** 0.5
    heights, factors = (low + (high - low) * torch.rand(shape, generator=dice).double() for low, high in (HEIGHTS, FACTORS))
    events = (torch.rand(shape, generator=dice) / RARE).floor().long() + 1
    events[events > STEEP] = ORDINARY
    noise = CORRELATION * shared + apart * of_loss
    losses = 3.0 + 5.0 * left + NOISE_OF_LOSS * (noise + heights * torch.isin(events, torch.tensor([POISONED, HARD])))
    logs = 1.5 * left + NOISE_OF_LOG_NORM * (CORRELATION * shared + apart * of_norm)
    raised = torch.isin(events, torch.tensor([POISONED, STEEP]))
    return Streams(losses, logs.exp() * torch.where(raised, factors, 1.0), events, heights)


def _noise(shape: tuple[int, int], heavy: Tensor, dice: torch.Generator) -> Tensor:
    """Normal numbers, in heavy streams those of Student's t with 5 degrees of freedom."""
    normal = torch.randn(shape, generator=dice, dtype=torch.float64)
    square = torch.randn(5, *shape, generator=dice, dtype=torch.float64).square().mean(0)
    return torch.where(heavy, normal / square.sqrt(), normal)


def above_mean(values: Tensor) -> Tensor:
    """Which values are more than 6 standard deviations from the mean of the last 128, which take in every value as it is."""
    found = torch.zeros(values.shape, dtype=torch.bool)
    for step in range(LEAST, len(values)):
        deviation, mean = torch.std_mean(values[max(0, step - ROLLING) : step], 0)
        found[step] = (values[step] - mean).abs() > SIGMAS * deviation
    return found


def by_spike_detection(losses: Tensor) -> Tensor:
    """Which losses rise, and lie as far from the mean of the last 10 as twice that mean; the mean leaves them out."""
    recent = losses[:1].repeat(RECENT, 1)  # as many as there are, at first
    count, last = torch.ones(losses.shape[1], dtype=torch.long), losses[0]
    found = torch.zeros(losses.shape, dtype=torch.bool)
    for step in range(SPIKE_WARMUP, len(losses)):
        known = torch.arange(RECENT)[:, None] < count
        mean = (recent * known).sum(0) / known.sum(0)
        is_spike = (losses[step] > last) & ((losses[step] - mean).abs() >= RTOL * mean.abs())
        place = (count % RECENT)[None]
        recent = recent.scatter(0, place, torch.where(is_spike, recent.gather(0, place)[0], losses[step])[None])
        count, last, found[step] = count + ~is_spike, torch.where(is_spike, last, losses[step]), is_spike
    return found


def skipped(streams: Streams) -> dict[str, Tensor]:
    """Which steps each candidate skips, bool, shape ``(steps, streams)``."""
    norm, loss = clipped(ON_NORM, streams.norms), clipped(ON_LOSS, streams.losses, are_losses=True)
    log_loss = clipped(ON_LOG_LOSS, streams.losses, are_losses=True)
    norm_of_field, loss_of_field = above_mean(streams.norms), above_mean(streams.losses)
    each = [norm, loss, log_loss, norm | loss, norm & loss]
    each += [norm_of_field, loss_of_field, norm_of_field | loss_of_field, norm_of_field & loss_of_field]
    return dict(zip(STYLES, [*each, by_spike_detection(streams.losses)], strict=True))


def _rows(found: dict[str, Tensor], streams: Streams, event: int, sizes: Sizes) -> dict[str, list[float]]:
    """Share of the steps of one kind that each candidate skips, by the kind of stream."""
    which = (streams.events == event)[sizes.unseen :].unflatten(1, (len(KINDS), -1))
    shares = {}
    for name, each in found.items():
        hits = each[sizes.unseen :].unflatten(1, (len(KINDS), -1))
        shares[name] = [float(hits[:, kind][which[:, kind]].double().mean()) for kind in range(len(KINDS))]
    return shares


def _table(title: str, shares: dict[str, list[float]]) -> str:
    return table([[name, *map(percent, each)] for name, each in shares.items()], [title, *KINDS])


def _draw(found: dict[str, Tensor], streams: Streams, sizes: Sizes) -> Figure:
    figure, axes = panels(1, len(KINDS), width=4.6, height=4.6)
    for kind, axis in enumerate(axes):
        columns = slice(kind * sizes.streams, (kind + 1) * sizes.streams)
        _draw_detection(axis, {name: each[sizes.unseen :, columns] for name, each in found.items()}, streams, sizes, columns)
        axis.set(title=KINDS[kind], xlabel="rise of a poisoned batch's loss (standard deviations)", ylim=(-2, 102))
    axes[0].set_ylabel("poisoned batches skipped (%)")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _draw_detection(axis: Axes, found: dict[str, Tensor], streams: Streams, sizes: Sizes, columns: slice) -> None:
    poisoned = streams.events[sizes.unseen :, columns] == POISONED
    edges = torch.linspace(*HEIGHTS, BINS + 1, dtype=torch.float64)
    place = torch.bucketize(streams.heights[sizes.unseen :, columns][poisoned], edges[1:-1])
    for name, each in found.items():
        hits = each[poisoned].double()
        shares = [100 * float(hits[place == number].mean()) for number in range(BINS)]
        colour, style = STYLES[name]
        axis.plot((edges[1:] + edges[:-1]) / 2, shares, style, color=colour, label=name)


def section(quick: bool) -> Section:
    """Run it."""
    sizes = QUICK if quick else FULL
    streams = drawn(sizes)
    found = skipped(streams)
    titles = {
        POISONED: "skipped of poisoned batches (loss and norm raised)",
        ORDINARY: "skipped of ordinary batches",
        HARD: "skipped of hard batches (loss alone raised)",
        STEEP: "skipped of batches with a large gradient (norm alone raised)",
    }
    return Section(
        "(f) Loss spikes: thresholds on the loss, the norm, and both",
        f"{sizes.streams} streams of each kind, {sizes.steps} steps each, of which the first {sizes.unseen} do not count. The loss "
        f"is 3 with a standard deviation of {NOISE_OF_LOSS:g}, and the logarithm of the norm has one of {NOISE_OF_LOG_NORM:g}, "
        f"with a correlation of {CORRELATION**2:g}. The noise is normal, or Student's t with 5 degrees of freedom, or normal on a "
        "loss that falls from 8 to 3 while norms fall 4.5-fold. Three kinds of events take "
        f"{percent(RARE)} of the steps each: they add {HEIGHTS[0]:g} to {HEIGHTS[1]:g} standard deviations to the loss, or "
        f"multiply the norm by {FACTORS[0]:g} to {FACTORS[1]:g}, or do both. Ours are `skip_above=RobustZScoreLimit(4.0)`, "
        '`loss_above=RobustZScoreLimit(4.0, floor=0.01, scale="linear")` or without `scale`, and both with `both=True` or without. '
        "OLMo-core's SkipStepOptimizer skips beyond 6 standard deviations from the mean of the last 128, of loss or norm; the "
        "separate rows show what each does alone. Lightning's SpikeDetection has its defaults; it ends the run at a spike, and is "
        "taken here to leave the batch out and go on.",
        [_table(title, _rows(found, streams, event, sizes)) for event, title in titles.items()],
        SHOWN,
        lambda: _draw(found, streams, sizes),
    )
