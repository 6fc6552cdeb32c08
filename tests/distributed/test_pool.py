"""Ranks end with the process that made them, however it ends; a rank that no longer answers costs one test, not the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.ranks import Ranks, RanksFailedError

ROOT = Path(__file__).parents[2]
WAITS_FOR_EVER = """
import sys
from tests.helpers import forked, ranks
forked.SERVER.set_forkserver_preload(["torch.distributed"])
ranks.Ranks(2).run(ranks.sleep, sys.argv[1])
"""


def test_no_rank_outlives_the_process_that_made_it(tmp_path):
    parents = {}
    for how in (signal.SIGTERM, signal.SIGKILL):
        (folder := tmp_path / how.name).mkdir()
        parents[how] = subprocess.Popen([sys.executable, "-c", WAITS_FOR_EVER, str(folder)], cwd=ROOT), folder
    for how, (parent, folder) in parents.items():
        ranks = in_time(lambda folder=folder: [int(path.name) for path in folder.iterdir()], lambda found: len(found) == 2)
        assert all(map(is_alive, ranks))
        parent.send_signal(how)
        parent.wait()
        in_time(lambda ranks=ranks: [rank for rank in ranks if is_alive(rank)], lambda found: not found)


def in_time(ask, is_enough, seconds=60):
    deadline = time.monotonic() + seconds
    while not is_enough(found := ask()):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


def is_alive(pid):
    """A process that has ended, but that nobody has asked after yet, counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(rank):
    if int(os.environ["RANK"]) == rank:
        os._exit(3)
    return os.getpid()


def test_a_pool_whose_rank_has_died_is_made_anew(two_ranks):
    before = two_ranks.run(os.getpid)
    with pytest.raises(RanksFailedError, match="rank 1: has ended"):
        two_ranks.run(ends, 1)
    after = two_ranks.run(os.getpid)
    assert not set(before) & set(after)


def test_what_ranks_return_comes_in_their_order():
    pool = Ranks(2)
    try:
        assert pool.run(os.getenv, "RANK") == ["0", "1"]
    finally:
        pool.close()
