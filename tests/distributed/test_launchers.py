"""The example under the launchers that users have: Lightning's own, torchrun, and torchrun on two hosts.

A start costs ten seconds: torch and Lightning are imported by each process. In the fast suite Lightning starts one rank for real;
of torchrun, whose agents start two for each node, there is what it tells the ranks of two nodes.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.helpers import forked

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "distributed.py"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"}

pytestmark = pytest.mark.timeout(240)


def run(command, prefix=()):
    """As ``python *command``; behind a prefix that leads to another host in a process that is not forked."""
    if not prefix:
        return forked.run(*command, cwd=ROOT, env=ENVIRONMENT)
    command = [*prefix, sys.executable, *command]
    return subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)


def answer(*processes):
    """The line that rank 0 prints."""
    assert all(done.returncode == 0 for done in processes), processes
    lines = [line for done in processes for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1, processes
    return json.loads(lines[0])


def launched(*arguments, by=()):
    return answer(run([*by, str(EXAMPLE), "--steps", "20", *arguments]))


@pytest.fixture
def one_process(monkeypatch, capsys):
    """The line that a single process prints, which is this one."""
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--steps", "20"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(
    "strategy", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow), pytest.param("tp", marks=pytest.mark.slow)]
)
def test_launched_by_lightning(strategy, one_process):
    assert launched("--strategy", strategy, "--devices", "2") == pytest.approx(one_process, abs=2e-4)


@pytest.mark.slow
def test_launched_by_torchrun(one_process):
    ours = launched(
        "--strategy", "fsdp2_tp", "--devices", "4", by=["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    )
    assert ours == pytest.approx(one_process, abs=2e-4)
    assert 0 < ours["grad/clip_fraction_epoch"] < 1


@pytest.mark.slow
def test_a_bad_rank_under_torchrun():
    run = launched(
        "--strategy",
        "fsdp2",
        "--devices",
        "2",
        "--poison",
        by=["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    )
    assert run["skipped"] == 1


def nodes(prefixes, address, port):
    """A torchrun of one process on each of two hosts."""
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    script = [str(EXAMPLE), "--steps", "20", "--strategy", "fsdp2", "--devices", "1", "--nodes", "2", "--poison"]
    meeting = ["--master-addr", address, "--master-port", str(port)]
    commands = [[*torchrun, *meeting, "--node-rank", str(rank), *script] for rank in range(len(prefixes))]
    with ThreadPoolExecutor() as pool:
        return answer(*pool.map(run, commands, prefixes))


@contextmanager
def two_hosts():
    """Two network namespaces joined by a virtual cable."""
    names = [f"clip-{os.getpid()}-{i}" for i in range(2)]
    with ExitStack() as stack:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
            stack.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
        cable = ["ip", "link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1]]
        subprocess.run(cable, check=True, capture_output=True)
        for i, name in enumerate(names):
            for command in (f"addr add 10.77.0.{i + 1}/24 dev eth0", "link set eth0 up", "link set lo up"):
                subprocess.run(["ip", "-n", name, *command.split()], check=True, capture_output=True)
        yield [["ip", "netns", "exec", name] for name in names]


def namespaces_work():
    try:
        with two_hosts():
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@pytest.mark.slow
def test_on_two_hosts():
    if not (shutil.which("ip") and namespaces_work()):
        pytest.skip("needs network namespaces: root and iproute2")
    ENVIRONMENT["GLOO_SOCKET_IFNAME"] = "eth0"
    try:
        with two_hosts() as prefixes:
            assert nodes(prefixes, "10.77.0.1", 29500)["skipped"] == 1
    finally:
        del ENVIRONMENT["GLOO_SOCKET_IFNAME"]


@pytest.mark.slow
def test_two_nodes_on_one_host():
    assert nodes([(), ()], "127.0.0.1", free_port())["skipped"] == 1


def test_two_nodes_as_torchrun_tells_their_ranks():
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    script = [str(EXAMPLE), "--steps", "20", "--strategy", "fsdp2", "--devices", "1", "--nodes", "2", "--poison"]

    def node(rank):
        ours = {"RANK": str(rank), "GROUP_RANK": str(rank)}
        return forked.run(*script, cwd=ROOT, env=ENVIRONMENT | common | ours)

    with ThreadPoolExecutor() as pool:
        assert answer(*pool.map(node, range(2)))["skipped"] == 1


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
