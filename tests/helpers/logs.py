"""Logs of runs, and functions that read them."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd

from clip_callbacks.cli import main
from clip_callbacks.html_report.page import make_sections
from clip_callbacks.html_report.sources import read_runs


def table(steps=100, seed=0, **columns):
    """The log of a run with max_norm 1, as CSVLogger writes it, one step per row."""
    dice = np.random.default_rng(seed)
    norms = dice.lognormal(0.0, 0.7, steps)
    own = {
        "step": np.arange(steps),
        "train_loss": 1 / np.sqrt(1 + np.arange(steps)),
        "grad/total_norm": norms,
        "grad/clipped_norm": np.minimum(norms, 1),
        "grad/clip_coef": np.minimum(1 / norms, 1),
        "grad/max_norm": np.ones(steps),
        "grad/clip_fraction": (norms > 1).astype(float),
        "grad/skipped_steps": np.zeros(steps),
    }
    return pd.DataFrame(own | columns)


def write(folder, frame=None, text=None):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.csv"
    path.write_text(text if frame is None else frame.to_csv(index=False))
    return path


def write_guarded(folder, steps=80):
    """Write the log of a run with loss spikes, with statistics of three blocks, one of which learns nothing, and its journal.

    Spikes of the loss at steps 40 and 41 are in the journal, the second only reported; one at step 60 is found in hindsight.
    """
    dice, step = np.random.default_rng(5), np.arange(steps)
    loss = 2 + 2 * np.exp(-step / 20) + 0.02 * dice.normal(size=steps)
    frame = table(steps, train_loss=loss, **{"grad/loss": loss, "grad/loss_limit": np.where(step < 25, math.inf, 1.5 * loss)})
    frame.loc[60, ["train_loss", "grad/loss"]] = 4.0
    frame["grad/skipped_steps"] = (step >= 40).astype(float)
    for place, block in enumerate(("encoder", "middle", "head")):
        share = 0.0 if block == "middle" else 0.5
        frame[f"grad_norm/{block}"] = share * frame["grad/total_norm"]
        frame[f"grad_mean/{block}"] = 1e-3 * share * dice.normal(size=steps)
        frame[f"grad_std/{block}"] = 0.01 * share * frame["grad/total_norm"]
        frame[f"grad_zeros/{block}"] = 1.0 if block == "middle" else 0.1
        frame[f"weight_norm/{block}"] = place + 1.0
        frame[f"update_ratio/{block}"] = 1e-3 * 2 * share
    frame["grad_vanished/middle"] = np.where(step % 20 == 19, 1.0, math.nan)
    frame.loc[40, ["grad/total_norm", "grad/loss"]] = math.nan  # as a step that was not logged
    write(folder, frame)
    spike = {"epoch": 2, "rank": 0, "streak": 1, "stage": "spike", "message": "Spike", "largest": [{"name": "head.weight"}]}
    journal = [
        spike | {"step": 40, "batch": 0, "policy": "skip", "total_norm": 90.0, "loss": 9.5, "loss_limit": 3.25},
        spike | {"step": 41, "batch": 1, "policy": "warn", "total_norm": 1.0, "limit": 5.0, "loss": 6.5, "loss_limit": 3.25},
    ]
    (folder / "nonfinite_steps.jsonl").write_text("\n".join(map(json.dumps, journal)))
    return folder / "metrics.csv"


def journalled(folder, *steps, **facts):
    """Write the guard's journal of steps that were skipped."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = [{"step": step, "policy": "skip", "stage": "loss", "streak": 1} | facts for step in steps]
    path = folder / "nonfinite_steps.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)))
    return path


def texts(findings):
    return " ".join(finding.text for finding in findings)


def said(run):
    (section,) = make_sections([run], ())
    return texts(section.findings)


def read(path):
    (run,), notes = read_runs([str(path)])
    return replace(run, notes=(*run.notes, *notes))


# ---- the command ---------------------------------------------------------------------------------------------------------------


def run_main(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()
