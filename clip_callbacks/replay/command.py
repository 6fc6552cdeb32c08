"""The command ``clip-callbacks replay``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clip_callbacks.bundles.bundle import Bundle
from clip_callbacks.bundles.terminal import escaped
from clip_callbacks.replay.bisection import bisect
from clip_callbacks.replay.errors import UnusableReplayError
from clip_callbacks.replay.rebuilt_module import import_class, rebuild_module
from clip_callbacks.replay.recorded_step import RecordedStep
from clip_callbacks.replay.report import ReplayReport
from clip_callbacks.replay.result import MicroBatchResult
from clip_callbacks.replay.runner import ReplayRunner
from clip_callbacks.replay.samples import batch_size, select_samples
from clip_callbacks.replay.starting_weights import StartingWeights
from clip_callbacks.replay.suspects import find_suspects
from clip_callbacks.replay.tree import draw_tree

NOT_REPRODUCED = 1
"""Exit code if the step is not bad again."""


def replay(options: argparse.Namespace) -> int:
    """Replay a bundle, and print the report; of an error of the user's code, print the lines that raised it to stderr.

    Args:
        options: Arguments of the command.

    Returns:
        The exit code: 0 if the step is bad again, 1 if it is not.

    Raises:
        ValueError: If the bundle, the configuration, the script or the checkpoint cannot be used.
    """
    try:
        return _replay(options)
    except UnusableReplayError as error:
        for line in error.frames.splitlines():
            print(escaped(line), file=sys.stderr)
        raise


def _replay(options: argparse.Namespace) -> int:
    if options.output:
        from clip_callbacks.replay.depth_plot import write_depth_plot

        _check_output(options.output)
    bundle = Bundle.read(options.bundle)
    recorded = RecordedStep.of(bundle)
    device, notes = _choose_device(options.device, recorded)
    with rebuild_module(options.config, options.script, recorded.script) as rebuilt:
        rows = bundle.micro_batches([import_class(name) for name in options.trust])
        if not rows:
            raise UnusableReplayError(f"{bundle.path} must hold at least one batch, got none.")
        weights = StartingWeights.of(bundle, recorded, options.ckpt)
        runner = ReplayRunner(rebuilt, recorded, weights, device, options.precision or recorded.precision)
        report = _investigate(runner, rows, options, [*notes, *_notes_on(bundle)])
    if options.output:
        write_depth_plot(report, options.output)
    if options.json:
        print(json.dumps(report.facts(), indent=2))
    else:
        _print(report)
        if options.output:
            print(f"Picture: {options.output}")
    return 0 if report.is_reproduced else NOT_REPRODUCED


def _investigate(
    runner: ReplayRunner, rows: Sequence[dict[str, Any]], options: argparse.Namespace, notes: Sequence[str]
) -> ReplayReport:
    """Run the window, then anomaly detection and bisection if they are asked for."""
    result = runner.run(rows)
    report = ReplayReport(
        bundle=options.bundle.name,
        recorded=runner.recorded,
        weights=runner.weights,
        device=runner.device,
        precision=runner.precision,
        result=result,
        shown=result.micro_batches[result.suspect_index],
        explosion_factor=options.explodes,
        notes=tuple(notes),
    )
    if options.detect_anomaly:
        report = replace(report, anomaly=runner.detect_anomaly(rows), has_anomaly_run=True)
    if options.bisect and report.is_reproduced:
        report = _bisect(report, runner, rows[result.suspect_index])
    return report


def _bisect(report: ReplayReport, runner: ReplayRunner, row: dict[str, Any]) -> ReplayReport:
    """Add the smallest failing part of a micro-batch to the report."""
    size, exceeded = batch_size(row["batch"]), runner.recorded.exceeded
    if size is None:
        return replace(report, notes=(*report.notes, "the batch holds no tensors that could be divided into samples"))
    whole = runner.run([row])
    if not whole.fails(exceeded):
        note = "the micro-batch alone does not fail, only together with the rest of its window: it was not bisected"
        return replace(report, notes=(*report.notes, note))
    failure = _signature(whole.micro_batches[0], report.explosion_factor)
    results: dict[tuple[int, ...], MicroBatchResult] = {}

    def fails(samples: Sequence[int]) -> bool:
        try:
            part = runner.run([{**row, "batch": select_samples(row["batch"], samples, size)}])
        except UnusableReplayError:  # the module raises, as batch normalization does on one sample
            return False
        results[tuple(samples)] = micro = part.micro_batches[0]
        if not report.result.is_finite:
            return not micro.is_finite and _signature(micro, report.explosion_factor) == failure
        # the loss is taken as a mean: in the whole batch the samples have this share of it, and of the norm
        return part.exceeds(exceeded, len(samples) / size)

    bisection = bisect(size, fails)
    return replace(report, bisection=bisection, shown=results.get(bisection.samples, report.shown))


def _signature(micro: MicroBatchResult, factor: float) -> tuple[Any, ...]:
    """Return what two runs must share to count as the same failure: whether the loss is finite, and where the failure began."""
    suspects = find_suspects(micro.calls, factor)
    return (
        micro.has_finite_loss,
        *((suspect.fault, suspect.call.name) for suspect in suspects if suspect.fault in {"output", "gradient"}),
    )


def _choose_device(option: str | None, recorded: RecordedStep) -> tuple[str, list[str]]:
    """Return the type of the device to run on, and remarks for the report."""
    device = (option or recorded.device).partition(":")[0]
    availability = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if availability.get(device):
        return device, []
    if option:
        available = ", ".join(name for name, is_available in availability.items() if is_available)
        raise UnusableReplayError(f"`--device` must be one that this machine has ({available}), got {option}.")
    return "cpu", [f"there is no {device} device here: replayed on the CPU, whose arithmetic and random numbers differ"]


def _notes_on(bundle: Bundle) -> list[str]:
    recorded, installed = str(bundle.facts["versions"].get("torch")), str(torch.__version__)
    if recorded == installed:
        return bundle.deviations
    return [*bundle.deviations, f"the run used torch {recorded}, the replay torch {installed}"]


def _check_output(path: Path) -> None:
    """Refuse a picture that cannot be written before anything long begins."""
    folder = path.absolute().parent
    if path.suffix not in {".png", ".svg"}:
        raise UnusableReplayError(f"`--output` must be a file.png or file.svg, got {path}.")
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UnusableReplayError(f"`--output` must be a file in a folder that can be written to, got {path}.")


def _print(report: ReplayReport) -> None:
    print("\n".join(map(escaped, [*report.heading, "", *report.findings, ""])))
    root = f"{report.recorded.module.rpartition('.')[2]}.training_step"
    if report.bisection:
        root += f" with {report.bisection.names} only"
    if report.shown.loss is not None:
        root += f": loss {float(report.shown.loss):.6g}"
    tree = draw_tree(root, report.shown.calls, report.suspects, sys.stdout.encoding or "utf-8")
    print(f"{tree}\n\n{report.conclusion}")
