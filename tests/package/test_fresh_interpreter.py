"""What only an interpreter that has imported nothing can tell; one for all of it, since Lightning takes ten seconds to import."""

from __future__ import annotations

import subprocess
import sys

from tests.helpers.logs import table, write

SCRIPT = """
import logging, runpy, sys
import lightning.pytorch as pl

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
import clip_callbacks

pl.Trainer(accelerator="cpu", logger=False)
sys.argv = ["clip-callbacks", "suggest", sys.argv[1]]
runpy.run_module("clip_callbacks.cli", run_name="__main__")
"""


def test_who_silenced_lightning_hears_nothing_from_it_and_output_may_be_cut_off(tmp_path):
    """The Trainer says nothing; the first line is the command's, and nobody complains that the others are not read."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = f"{sys.executable} -W ignore {tmp_path / 'script.py'} {write(tmp_path, table())} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "would have clipped" in done.stdout
    assert len(done.stdout.splitlines()) == 1
