"""The demo with blank pieces in its text: a bad step is skipped, stored, replayed, and traced to its module and sample."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import yaml

from clip_callbacks.bundles.bundle import Bundle
from tests.helpers import forked

ROOT = Path(__file__).parents[2]


DEMO = ROOT / "examples" / "char_rnn.py"
CONFIG = ROOT / "configs" / "char_rnn.yaml"


def test_the_bundle_of_the_poisoned_demo_names_the_module_and_the_sample(tmp_path):
    config = yaml.safe_load(CONFIG.read_text())
    config["model"]["hidden"] = 32
    config["data"] |= {"megabytes": 0.2, "length": 32, "batch_size": 64}
    small_config = tmp_path / "small.yaml"
    small_config.write_text(yaml.safe_dump(config))
    options = [
        "--trainer.max_steps=12",
        "--trainer.logger=false",
        "--trainer.limit_val_batches=0",
        "--trainer.val_check_interval=12",
    ]
    small = ["--poison=0.2", "--trainer.enable_progress_bar=false"]
    guard = ["--trainer.callbacks+=NonFiniteGuard", *(f"--trainer.callbacks.bundles.{it}" for it in ("folder=bad", "weights=full"))]
    done = forked.run(DEMO, "fit", f"--config={small_config}", *options, *small, *guard, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    bundles = [Bundle.read(path) for path in sorted((tmp_path / "bad").iterdir())]
    assert bundles
    bundle = bundles[0]
    (row,) = bundle.micro_batches()
    inputs, _ = row["batch"]
    assert len(inputs) == 64
    blank = torch.nonzero((inputs == 0).all(dim=1)).flatten().tolist()
    replay = [
        "-m",
        "clip_callbacks.cli",
        "replay",
        bundle.path,
        "--config",
        small_config,
        "--script",
        DEMO,
        "--bisect",
        "-o",
        "depth.png",
    ]
    done = forked.run(*replay, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "First non-finite output: padding (PaddingScale)" in done.stdout
    assert "bit for bit as in the run" in done.stdout
    assert "Reproduced: a loss or gradient is non-finite again." in done.stdout
    found = next(line for line in done.stdout.splitlines() if "sample" in line.lower())
    assert int(next(word for word in re.findall(r"\d+", found))) in blank, done.stdout
    assert (tmp_path / "depth.png").stat().st_size > 10_000
