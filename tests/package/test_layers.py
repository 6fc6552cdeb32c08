"""Which packages may know which; the contracts themselves stand in pyproject.toml."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import clip_callbacks

ROOT = Path(clip_callbacks.__file__).parents[1]
LINT = Path(sys.executable).with_name("lint-imports")

needs_linter = pytest.mark.skipif(not LINT.exists() or not (ROOT / "pyproject.toml").exists(), reason="needs import-linter")


def broken(tree):
    done = subprocess.run([LINT, "--no-cache"], cwd=tree, capture_output=True, text=True, check=False)
    return [line.removesuffix(" BROKEN") for line in done.stdout.splitlines() if line.endswith(" BROKEN")], done.returncode


@needs_linter
@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("core/apply.py", "from clip_callbacks.trainer import grad_scaler", "Arrows point down"),
        (
            "guard/journal.py",
            "import typing\nif typing.TYPE_CHECKING:\n    from clip_callbacks.engine import engine",
            "Arrows point down",
        ),
        ("accumulation/window.py", "from clip_callbacks.guard import options", "Arrows point down"),
        ("core/blocks.py", "def late():\n    from clip_callbacks.core import rules", "No circle"),
        ("stats/sketch.py", "import lightning", "Nothing below `trainer` knows Lightning"),
    ],
)
def test_a_wrong_arrow_is_found(tmp_path, file, line, contract):
    """However it is written: at the top, for type checkers only, between siblings, in a function."""
    shutil.copytree(ROOT / "clip_callbacks", tmp_path / "clip_callbacks", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "clip_callbacks" / file).open("a", encoding="utf-8") as source:
        source.write(f"\n{line}\n")
    found, status = broken(tmp_path)
    assert contract in found
    assert status == 1
