"""One optimizer step's clipping against torch, users' own lines, peers and a bare read: ``python -m benchmarks.step``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from benchmarks import rivals
from benchmarks.gradient_sets import SETS, Holder
from benchmarks.lockstep import Pause, PausedFit
from benchmarks.timing import Ratio, interleaved, machine, publish, rounds_for, table
from benchmarks.trainer import all_callbacks, silence
from clip_callbacks import ClipRule, GradientClipping, ParameterTable, clip_grad_norm_, clip_step

REFERENCE, FLOOR = "torch clip_grad_norm_", "one bare read"
OURS = "clip_step, global"
LOCAL = "clip_step, per parameter"
AMONG_FITS = "clip_step, global, between fits"
NO_HOOK, HOOK, HOOKS = "hooks of no callback", "hook of GradientClipping", "hooks of all four callbacks"
LOCAL_HOOK = "hook of GradientClipping, per parameter"
WITH_ADAMW = "fused AdamW after torch's clip"
COLUMNS = {"nothing to clip": 1e3, "clipping": 0.5}
"""Thresholds, as multiples of the total norm."""


def ours(holder: Holder, max_norm: float) -> dict[str, Callable[[], object]]:
    """What this package does on one set of gradients, and the floor."""
    named = ParameterTable(holder.named_parameters())
    local = [ClipRule(max_norm / len(named) ** 0.5, "parameter")]
    parameters = list(holder.parameters())
    fused = torch.optim.AdamW(parameters, fused=True)
    held = ParameterTable(fused)
    runs: dict[str, Callable[[], object]] = {
        REFERENCE: rivals.torch_clip(holder, max_norm),
        FLOOR: rivals.bare_read(holder),
        "one copy of the same bytes": rivals.copy(holder),
        OURS: lambda: clip_step(named, max_norm=max_norm),
        LOCAL: lambda: clip_step(named, rules=local),
        "clip_step applied by a fused optimizer": lambda: clip_step(held, max_norm=max_norm, fused=fused),
        "clip_grad_norm_ of clip_callbacks": lambda: clip_grad_norm_(parameters, max_norm),
    }
    if not parameters[0].is_cpu:
        runs["clip_step, deferred"] = lambda: clip_step(held, max_norm=max_norm, fused=fused, deferred=True)
    return runs


def in_a_trainer(holder: Holder, max_norm: float) -> dict[str, Callable[[], object]]:
    """The hooks for complete gradients in real fits, as Lightning calls them; between them caches are as cold as in any fit."""
    named = ParameterTable(holder.named_parameters())
    local = partial(GradientClipping, max_norm / len(named) ** 0.5, scope="parameter")
    made: dict[str, Callable[[], list[Callback]]] = {
        NO_HOOK: list,
        HOOK: lambda: [GradientClipping(max_norm)],
        HOOKS: lambda: all_callbacks(max_norm),
        LOCAL_HOOK: lambda: [local()],
    }

    def fit(make: Callable[[], list[Callback]], first: Pause, last: Pause) -> None:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        Trainer(max_epochs=-1, callbacks=[first, *make(), last], accelerator=accelerator, devices=1, **quiet).fit(Endless(holder))

    accelerator = "cpu" if holder.gradients[0].is_cpu else "gpu"
    return {
        REFERENCE: rivals.torch_clip(holder, max_norm),
        AMONG_FITS: lambda: clip_step(named, max_norm=max_norm),
        **{name: PausedFit(partial(fit, make)) for name, make in made.items()},
    }


class Endless(LightningModule):
    """Trains the smallest parameter of a holder by a rate of 0: the gradients of a step come from elsewhere."""

    def __init__(self, holder: Holder) -> None:
        super().__init__()
        self.holder = holder
        self.smallest = min(holder.parameters(), key=torch.Tensor.numel)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """A sum."""
        return self.smallest.sum()

    def train_dataloader(self) -> DataLoader[Any]:
        """Numbers, since no batch is used."""
        return DataLoader(range(1000), batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD, which keeps no state."""
        return torch.optim.SGD(self.holder.parameters(), lr=0.0)


def theirs(holder: Holder, max_norm: float) -> dict[str, Callable[[], object]]:
    """What others do."""
    return {
        REFERENCE: rivals.torch_clip(holder, max_norm),
        "by hand: grad_norm + isfinite loop + clip": rivals.by_hand(holder, max_norm),
        "smartclip AutoClip": rivals.smartclip_autoclip(holder),
        "smartclip AGC": rivals.smartclip_agc(holder),
        "pytorch_optimizer AGC": rivals.pytorch_optimizer_agc(holder),
    }


def with_optimizer(holder: Holder, max_norm: float) -> dict[str, Callable[[], object]]:
    """The clip and the step of a fused AdamW together, since the step applies the clip."""
    parameters = list(holder.parameters())
    fused = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    held = ParameterTable(fused)

    def after_torch() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        fused.step()

    def with_clip_step() -> None:
        clip_step(held, max_norm=max_norm, fused=fused, deferred=not parameters[0].is_cpu)
        fused.step()

    return {WITH_ADAMW: after_torch, "fused AdamW alone": fused.step, "fused AdamW applying clip_step": with_clip_step}


def measure(holder: Holder, runs: Mapping[str, Callable[[], object]], *, budget_s: float) -> dict[str, list[float]]:
    """Seconds of each candidate, round by round."""
    device = holder.gradients[0].device
    synchronize = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    paused = [run for run in runs.values() if isinstance(run, PausedFit)]

    def prepare() -> None:
        for fit in paused:
            fit.prepare()
        holder.refill()

    first = interleaved(runs, prepare, rounds=1, synchronize=synchronize)
    rounds = rounds_for(2 * sum(times[0] for times in first.values()), budget_s)
    times = interleaved(runs, prepare, rounds=rounds, synchronize=synchronize)
    for fit in paused:
        fit.end()
    holder.refill()
    return times


def section(name: str, device: str, dtype: torch.dtype, budget_s: float) -> str:
    """The table of one set of gradients."""
    holder = Holder(SETS[name], device, dtype)
    rows: dict[str, list[Ratio]] = {}
    milliseconds = []
    for column, factor in COLUMNS.items():
        max_norm = factor * holder.total_norm
        for group in (ours, in_a_trainer, theirs, with_optimizer):
            times = measure(holder, group(holder, max_norm), budget_s=budget_s)
            reference = WITH_ADAMW if group is with_optimizer else REFERENCE
            for candidate in times.keys() - (set() if group in (ours, with_optimizer) else {REFERENCE}):
                rows.setdefault(candidate, []).append(Ratio.of(times[candidate], times[reference]))
            if group is ours:
                rows.setdefault("per-parameter scope against global scope", []).append(Ratio.of(times[LOCAL], times[OURS]))
                milliseconds.append(f"{column} {1e3 * median(times[REFERENCE]):.3g} ms")
    order = [
        *ours(holder, 1.0),
        "per-parameter scope against global scope",
        *[AMONG_FITS, NO_HOOK, HOOK, HOOKS, LOCAL_HOOK],
        *list(theirs(holder, 1.0))[1:],
        *with_optimizer(holder, 1.0),
    ]
    body = table([[candidate, *rows[candidate]] for candidate in order], ["ratio: median (quartiles)", *COLUMNS])
    return f"### {name}\n\ntorch's clip: {', '.join(milliseconds)}.\n\n{body}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--budget-s", type=float, default=10.0, help="seconds for each quarter of a column")
    parser.add_argument("--sets", nargs="*", default=list(SETS), help="beginnings of the names of gradient sets")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--output", help="file in benchmarks/results to write")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    silence()
    names = [name for name in SETS if name.startswith(tuple(arguments.sets))]
    dtype = getattr(torch, arguments.dtype)
    title = f"# One step's clipping, {arguments.device}, {arguments.dtype}\n\n{machine(arguments.device)}\n"
    note = (
        "Ratios to torch's `clip_grad_norm_` of the same round, interleaved in one process; for lines with AdamW, to torch's clip "
        "and the same step. Made by `python -m benchmarks.step`.\n"
    )
    sections = [section(name, arguments.device, dtype, arguments.budget_s) for name in names]
    publish("\n".join([title, note, *(text + "\n" for text in sections)]).rstrip(), arguments.output)


if __name__ == "__main__":
    main()
