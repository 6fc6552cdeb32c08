"""Real processes joined by torch.distributed over gloo and a file: made once, each test gives all of them one function to run."""

from __future__ import annotations

import os
import pickle
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

from tests.helpers.forked import SERVER, Lifeline, seldom_collect

PATIENCE = timedelta(seconds=60)
"""After which a rank that waits for another one gives up, and a test fails."""

LIFETIME = 32
"""How many functions, after which a pool is made anew: trainings leave process groups behind, whose threads wake all the time.

Those of 32 trainings take 2 % of a core. The first training of each kind takes a pool twice as long as later ones.
"""

HANGS, ENDED = "hangs", "has ended"


class RanksFailedError(Exception):
    """What each rank raised; None for those that did not."""

    def __init__(self, errors):
        super().__init__("\n".join(f"rank {rank}: {error}" for rank, error in enumerate(errors) if error))
        self.errors = errors


class Ranks:
    """So many processes that call the same function; give it module-level functions and what can be pickled."""

    def __init__(self, world_size):
        self.world_size = world_size
        self._processes, self._pipes, self._runs = [], [], 0

    def run(self, function, *args, **kwargs):
        """The results, in the order of ranks."""
        if self._runs == LIFETIME:
            self.close()
        if not self._processes:
            self._start()
        self._runs += 1
        message = pickle.dumps((function, args, kwargs))
        for pipe in self._pipes:
            pipe.send_bytes(message)
        answers = [_answer(pipe) for pipe in self._pipes]
        errors = [error for _, error in answers]
        if any(errors):
            if not all(errors) or {HANGS, ENDED} & set(errors):
                self.close(patience=0)  # one of them may be waiting for another
            raise RanksFailedError(errors)
        return [result for result, _ in answers]

    def _start(self):
        meeting_point = tempfile.NamedTemporaryFile(delete=True).name  # noqa: SIM115
        self._lifeline = Lifeline()
        for rank in range(self.world_size):
            ours, theirs = SERVER.Pipe()
            arguments = theirs, self._lifeline.end, rank, self.world_size, meeting_point
            process = SERVER.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def close(self, patience=5):
        """End the processes, in some seconds by themselves or else at once; a later run starts others."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(patience)
            process.kill()
            process.join()
        self._processes, self._pipes, self._runs = [], [], 0


def _answer(pipe):
    """The result and the error of one rank."""
    try:
        return pickle.loads(pipe.recv_bytes()) if pipe.poll(3 * PATIENCE.total_seconds()) else (None, HANGS)
    except (EOFError, ConnectionResetError):
        return None, ENDED


def _serve(pipe, lifeline, rank, world_size, meeting_point):
    seldom_collect()
    Lifeline.hold(lifeline)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", f"file://{meeting_point}", rank=rank, world_size=world_size, timeout=PATIENCE)
    while True:
        try:
            function, args, kwargs = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = function(*args, **kwargs), None
        except BaseException as error:
            answer = None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        pipe.send_bytes(pickle.dumps(answer))


def sleep(folder):
    """For a test of what becomes of a rank whose main thread never returns: it leaves a file by its number, and waits."""
    Path(folder, str(os.getpid())).touch()
    time.sleep(3600)
