"""Real processes joined by torch.distributed over gloo and a file: made once, each test gives all of them one function to run."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
import warnings
from datetime import timedelta

PATIENCE = timedelta(seconds=60)
"""After which a rank that waits for another one gives up, and a test fails."""


class RanksFailedError(Exception):
    """What each rank raised; None for those that did not."""

    def __init__(self, errors):
        super().__init__("\n".join(f"rank {rank}: {error}" for rank, error in enumerate(errors) if error))
        self.errors = errors


class Ranks:
    """So many processes that call the same function; give it module-level functions and what can be pickled."""

    def __init__(self, world_size):
        self.world_size = world_size
        self._pipes = []
        self._processes = []

    def run(self, function, *args, **kwargs):
        """The results, in the order of ranks."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, args, kwargs)))
        answers = []
        for pipe in self._pipes:
            is_there = pipe.poll(3 * PATIENCE.total_seconds())
            answers.append(pickle.loads(pipe.recv_bytes()) if is_there else (None, "hangs"))
        errors = [error for _, error in answers]
        if any(errors):
            if not all(errors) or "hangs" in errors:
                self.close()  # one of them may be waiting for another
            raise RanksFailedError(errors)
        return [result for result, _ in answers]

    def _start(self):
        context = multiprocessing.get_context("spawn")
        meeting_point = tempfile.NamedTemporaryFile(delete=True).name  # noqa: SIM115
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.world_size, meeting_point), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def close(self):
        for process in self._processes:
            process.kill()
            process.join()
        self._pipes, self._processes = [], []


def _serve(pipe, rank, world_size, meeting_point):
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
