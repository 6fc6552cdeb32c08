"""Processes forked from a server that has imported torch and Lightning: they start in a fraction of a second.

Python's own fork server, one for each worker of pytest. What is forked ends with the process of pytest, however that ends: it
watches a pipe that only that process holds.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "tests.conftest",
        "lightning.pytorch",
        "torch.distributed.tensor",
        "torch.distributed.fsdp",
        "clip_callbacks",
        "tests.helpers.parallel",
    ]
)


class Lifeline:
    """A pipe that nobody writes to: at its other end it is found out that this process is no more.

    Attributes:
        end: To be given to a process.
    """

    def __init__(self) -> None:
        self.end, self._ours = SERVER.Pipe(duplex=False)

    @staticmethod
    def hold(end: Connection) -> None:
        """Have this process end with the one that made the lifeline, whatever its main thread is waiting for."""
        threading.Thread(target=_end_with, args=(end,), daemon=True).start()


def _end_with(end: Connection) -> None:
    try:
        end.recv_bytes()
    except EOFError:
        os._exit(1)


@dataclass(frozen=True)
class Done:
    """What is left of a process: its exit code, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def start(function: Callable[..., None], *args: Any) -> Any:
    """Call a module-level function in a process of its own, which may be killed.

    Returns:
        The ``multiprocessing.Process``.
    """
    lifeline = Lifeline()
    process = SERVER.Process(target=_held, args=(lifeline.end, function, args))
    process.lifeline = lifeline
    process.start()
    return process


def seldom_collect() -> None:
    """Have garbage looked for among new objects only, and less often: to look through all that is imported takes 0.15 s."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


def _held(end: Connection, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    seldom_collect()
    Lifeline.hold(end)
    function(*args)


def run(*command: Any, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 200, warnings_shown: bool = False) -> Done:
    """As ``python *command`` in a process of its own: a script or ``-m`` and a module, then arguments.

    Args:
        command: What would follow ``python`` on a command line.
        cwd: The working directory.
        env: Further environment variables.
        timeout: In seconds; a process that takes longer is killed.
        warnings_shown: Whether they are.
    """
    with TemporaryDirectory() as scratch:
        process = start(_run, list(map(str, command)), str(cwd), dict(env or {}), scratch, warnings_shown)
        process.join(timeout)
        process.kill()
        process.join()
        out, err = (Path(scratch, name).read_text() for name in ("out", "err"))
    return Done(process.exitcode, out, err)


def _run(command: list[str], cwd: str, env: dict[str, str], scratch: str, warnings_shown: bool) -> None:
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{scratch}/{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(cwd)
    os.environ |= env
    warnings.simplefilter("default" if warnings_shown else "ignore")
    if command[0] == "-m":
        sys.argv, sys.path[0] = command[1:], cwd
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path[0] = str(Path(command[0]).parent)
        runpy.run_path(command[0], run_name="__main__")
