"""Which packages may know which: ``make lint`` checks the contracts in pyproject.toml; here is proved that they can fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import clip_callbacks

ROOT = Path(clip_callbacks.__file__).parents[1]
LINT = Path(sys.executable).with_name("lint-imports")

WRONG = {
    ("core/apply.py", "clip_callbacks.core.apply -> clip_callbacks.trainer.grad_scaler"): (
        "from clip_callbacks.trainer import grad_scaler"
    ),
    ("guard/journal.py", "clip_callbacks.guard.journal -> clip_callbacks.engine.engine"): (
        "import typing\nif typing.TYPE_CHECKING:\n    from clip_callbacks.engine import engine"
    ),
    ("accumulation/window.py", "clip_callbacks.accumulation.window -> clip_callbacks.guard.options"): (
        "from clip_callbacks.guard import options"
    ),
    ("stats/sketch.py", "clip_callbacks.stats.sketch -> lightning"): "import lightning",
    ("core/blocks.py", "No circle BROKEN"): "def late():\n    from clip_callbacks.core import rules",
}
"""Where a wrong arrow is planted, what is said of it, and how it is written: at the top, for type checkers, in a function."""


@pytest.mark.skipif(not LINT.exists() or not (ROOT / "pyproject.toml").exists(), reason="needs import-linter and the checkout")
def test_wrong_arrows_are_found_however_they_are_written(tmp_path):
    shutil.copytree(ROOT / "clip_callbacks", tmp_path / "clip_callbacks", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for (file, _), line in WRONG.items():
        with (tmp_path / "clip_callbacks" / file).open("a", encoding="utf-8") as source:
            source.write(f"\n{line}\n")
    done = subprocess.run([LINT, "--no-cache"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    for _, said in WRONG:
        assert said in " ".join(done.stdout.split()), said
