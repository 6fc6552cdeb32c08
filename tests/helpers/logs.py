"""Logs of runs, and functions that read them."""

from __future__ import annotations

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
