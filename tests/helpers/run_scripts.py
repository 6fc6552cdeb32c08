"""Run command lines of Python, two at a time, in processes forked from one that has imported Lightning.

python -m tests.helpers.run_scripts "-W ignore examples/char_rnn.py fit" "-m benchmarks.step --sets 50"

Lightning takes longer to import than most of the scripts take to run. What a script prints is shown when it ends.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.helpers import forked

ROOT = Path(__file__).parents[2]
AT_ONCE = 2
TIMEOUT_S = 900
IMPORTED = ["lightning.pytorch.cli", "torch.distributed.tensor", "torch.distributed.fsdp", "clip_callbacks"]


def main(lines: Sequence[str]) -> int:
    """Run all of them, also when one fails.

    Args:
        lines: Each what would follow ``python`` on a command line; of Python's own options only ``-W ignore``, at the beginning.

    Returns:
        An exit status: 1 if any of them has failed.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return int(not all([*pool.map(_succeeds, lines)]))


def _succeeds(line: str) -> bool:
    begin, words = time.monotonic(), shlex.split(line)
    ignore = words[:2] == ["-W", "ignore"]
    done = forked.run(*words[2 * ignore :], cwd=ROOT, timeout=TIMEOUT_S, warnings_shown=not ignore)
    end = f"exit status {done.returncode}, {time.monotonic() - begin:.0f} s"
    sys.stdout.write(f"== python {shlex.join(words)}\n{done.stdout}{done.stderr}== {end}\n")
    sys.stdout.flush()
    return done.returncode == 0


if __name__ == "__main__":
    forked.SERVER.set_forkserver_preload(IMPORTED)
    sys.exit(main(sys.argv[1:]))
