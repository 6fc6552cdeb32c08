"""What only an interpreter that has imported nothing can tell; one for all of it, since Lightning takes ten seconds to import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import clip_callbacks
from tests.helpers import importing
from tests.helpers.logs import table, write

ROOT = Path(clip_callbacks.__file__).parent


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the interpreter has found out, and what it printed as far as somebody has read it."""
    folder = tmp_path_factory.mktemp("fresh")
    command = f"{sys.executable} -W ignore -m tests.helpers.importing {folder / 'found.json'} {write(folder, table())} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return json.loads((folder / "found.json").read_text()) | {"stdout": done.stdout, "stderr": done.stderr}


@pytest.mark.parametrize("order", importing.ORDERS, ids=" ".join)
def test_importing_the_package_changes_nothing_in_whatever_order(found, order):
    told = found["told " + " ".join(order)]
    assert told["changed"] == []
    assert told["picture"] == found["told " + " ".join(importing.without_ours(order))]["picture"]
    assert told["is_guest"]
    # after a Lightning it takes 4 % longer, of its own (python -m benchmarks.importing)
    assert order[0] == importing.OURS or told["packages"] == []


def test_changes_would_be_found():
    before = importing.things()
    rank_zero = sys.modules["lightning_utilities.core.rank_zero"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_zero, "log", object())
        patch.setattr(rank_zero, "new", object(), raising=False)
        patch.setattr(rank_zero.rank_zero_only, "rank", 7)
        patch.setattr(importing.loggers()["lightning.pytorch"], "level", 7)
        patch.setenv("NEW", "7")
        changed = importing.differences(before, importing.things())
    names = [f"lightning_utilities.core.rank_zero.{name}" for name in ("log", "new", "rank_zero_only.rank")]
    assert {*names, "logger lightning.pytorch.level", "environment"} <= {*changed}
    assert importing.differences(before, importing.things()) == []


def test_who_silenced_either_lightning_hears_nothing(found):
    assert "Gradients of the run:" in found["heard nobody"]
    assert found["heard pytorch_lightning"] == found["heard lightning.pytorch"] == ""


def test_output_may_be_cut_off(found):
    """The first line is the command's, and nobody complains that the others are not read."""
    assert found["stderr"] == ""
    assert "would have clipped" in found["stdout"]
    assert len(found["stdout"].splitlines()) == 1
