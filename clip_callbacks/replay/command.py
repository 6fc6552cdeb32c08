"""The command ``clip-callbacks replay``: its options, and what it does with them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clip_callbacks.bundles.bundle import Bundle
from clip_callbacks.bundles.terminal import escaped
from clip_callbacks.replay.bisection import bisect
from clip_callbacks.replay.errors import UnusableReplayError
from clip_callbacks.replay.rebuilt_module import named_class, rebuilt
from clip_callbacks.replay.recorded_step import Recorded
from clip_callbacks.replay.report import Investigation, signature
from clip_callbacks.replay.result import MicroBatch, Outcome
from clip_callbacks.replay.runner import Laboratory
from clip_callbacks.replay.samples import batch_size, chosen
from clip_callbacks.replay.starting_weights import StartingWeights
from clip_callbacks.replay.tree import make_tree, show
from clip_callbacks.replay.verdict import Verdict

NOT_REPRODUCED = 1
"""Exit code if the step is not bad again."""


def replay(options: argparse.Namespace) -> int:
    """Replay a bundle, and print what was found.

    Args:
        options: Those of the command.

    Returns:
        The exit code: 0 if the step is bad again, 1 if it is not.

    Raises:
        ValueError: If anything that is needed cannot be used.
    """
    _check_picture(options.output)
    if options.output:
        from clip_callbacks.replay.depth_plot import write_picture
    bundle = Bundle.read(options.bundle)
    recorded = Recorded.of(bundle)
    device, notes = _device(options.device, recorded)
    with rebuilt(options.config, options.script, recorded.script) as made:
        rows = bundle.micro_batches([named_class(name) for name in options.trust])
        if not rows:
            raise UnusableReplayError(f"{bundle.path} must hold a batch, got none.")
        weights = StartingWeights.of(bundle, recorded, options.ckpt)
        laboratory = Laboratory(made, recorded, weights, device, options.precision or recorded.precision)
        found = investigate(laboratory, rows, options, [*notes, *_notes(bundle)])
    if options.output:
        write_picture(found, options.output)
    if options.json:
        print(json.dumps(found.facts(), indent=2))
    else:
        _print(found)
        if options.output:
            print(f"Picture: {options.output}")
    return 0 if found.verdict.is_reproduced else NOT_REPRODUCED


def investigate(
    laboratory: Laboratory, rows: Sequence[dict[str, Any]], options: argparse.Namespace, notes: Sequence[str] = ()
) -> Investigation:
    """Run the window, and what was asked for beyond that.

    Args:
        laboratory: What runs it.
        rows: Its micro-batches.
        options: Those of the command.
        notes: To be told with what is found.
    """
    outcome = laboratory.run(rows)
    recorded, weights = laboratory.recorded, laboratory.weights
    verdict = Verdict.of(outcome, recorded, weights, laboratory.device, laboratory.precision)
    found = Investigation(
        options.bundle.name,
        recorded,
        weights,
        laboratory.device,
        laboratory.precision,
        outcome,
        verdict,
        options.explodes,
        outcome.micro_batches[outcome.guilty],
        notes=tuple(notes),
    )
    if options.detect_anomaly:
        found = replace(found, anomaly=laboratory.anomaly(rows), was_asked=True)
    if options.bisect and verdict.is_reproduced:
        found = _bisected(found, laboratory, rows[outcome.guilty])
    return found


def _bisected(found: Investigation, laboratory: Laboratory, row: dict[str, Any]) -> Investigation:
    size = batch_size(row["batch"])
    if size is None:
        return replace(found, notes=(*found.notes, "the batch holds no tensors that could be divided into samples"))
    whole = laboratory.run([row])
    failing = signature(whole.micro_batches[0], found.factor)
    limit = found.recorded.limit
    last: dict[tuple[int, ...], MicroBatch] = {}

    def fails(samples: Sequence[int]) -> bool:
        try:
            outcome = laboratory.run([{**row, "batch": chosen(row["batch"], samples, size)}])
        except UnusableReplayError:  # as batch normalization of one sample
            return False
        last[tuple(samples)] = micro = outcome.micro_batches[0]
        if found.outcome.is_nonfinite:
            return micro.is_bad and signature(micro, found.factor) == failing
        return _share(outcome, len(samples), size) > (limit or 0.0)

    if not whole.is_nonfinite and not (limit is not None and whole.total_norm > limit):
        return replace(
            found, notes=(*found.notes, "the micro-batch alone does not fail: it takes the whole window, and was not bisected")
        )
    bisection = bisect(size, fails)
    return replace(found, bisection=bisection, shown=last.get(bisection.samples, found.shown))


def _share(outcome: Outcome, count: int, size: int) -> float:
    """The norm that some samples add to that of a mean over all of them."""
    return outcome.total_norm * count / size


def _device(asked: str | None, recorded: Recorded) -> tuple[str, list[str]]:
    """The kind to run on, and what there is to say of it."""
    kind = (asked or recorded.device).partition(":")[0]
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if available.get(kind):
        return kind, []
    if asked:
        there = ", ".join(name for name, is_there in available.items() if is_there)
        raise UnusableReplayError(f"`--device` must be one that this machine has ({there}), got {asked}.")
    return "cpu", [f"there is no {kind} device here: replayed on the CPU, whose arithmetic and random numbers are others"]


def _notes(bundle: Bundle) -> list[str]:
    notes = [f"the bundle has no {name}: {why}" for name, why in bundle.facts["missing"].items()]
    if bundle.facts["batches"].get("changed_in_place"):
        notes.append("the stored batch was changed in place by the step: it is not what training_step got")
    theirs, ours = str(bundle.facts["versions"].get("torch")), str(torch.__version__)
    if theirs != ours:
        notes.append(f"the bundle was made with torch {theirs}, this is {ours}")
    return notes


def _check_picture(path: Path | None) -> None:
    """Before anything long is begun."""
    if path is None:
        return
    if path.suffix not in {".png", ".svg"}:
        raise UnusableReplayError(f"`--output` must be a file.png or file.svg, got {path}.")
    if path.is_dir() or not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise UnusableReplayError(f"`--output` must be a file in a folder that can be written to, got {path}.")


def _print(found: Investigation) -> None:
    print("\n".join(map(escaped, [*found.heading, "", *found.findings, ""])))
    title = f"{found.recorded.module.rpartition('.')[2]}.training_step"
    if found.bisection:
        title += f" of sample{'s' * (len(found.bisection.samples) > 1)} {', '.join(map(str, found.bisection.samples))}"
    loss = "" if found.shown.loss is None else f": loss {float(found.shown.loss):.6g}"
    show(make_tree(f"{title}{loss}", found.shown.calls, found.culprits))
    print(f"\n{found.verdict.text}")


def say_frames(error: UnusableReplayError) -> None:
    """Print where in the user's code it was.

    Args:
        error: Raised by code of the user's.
    """
    with redirect_stdout(sys.stderr):
        for line in error.frames.splitlines():
            print(escaped(line))
