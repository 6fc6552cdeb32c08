"""The example under the launchers that users have: Lightning's own, torchrun, and torchrun on two hosts."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


EXAMPLE = ROOT / "examples" / "distributed.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"}


def start(command, **options):
    inherited = {key: value for key, value in os.environ.items() if key not in {"RANK", "LOCAL_RANK", "WORLD_SIZE"}}
    return subprocess.Popen(
        command, env=inherited | ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, **options
    )


def answer(*processes):
    """The line that rank 0 prints."""
    outputs = [process.communicate(timeout=120) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    lines = [line for output, _ in outputs for line in output.splitlines() if line.startswith("{")]
    assert len(lines) == 1, outputs
    return json.loads(lines[0])


def launched(*arguments, by=(sys.executable,)):
    return answer(start([*by, str(EXAMPLE), "--steps", "20", *arguments]))


@cache
def one_process():
    return launched()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "tp"])
def test_launched_by_lightning(strategy):
    assert launched("--strategy", strategy, "--devices", "2") == pytest.approx(one_process(), abs=2e-4)


@pytest.mark.timeout(180)
def test_launched_by_torchrun():
    ours = launched("--strategy", "fsdp2_tp", "--devices", "4", by=[*TORCHRUN, "--standalone", "--nproc-per-node", "4"])
    assert ours == pytest.approx(one_process(), abs=2e-4)
    assert 0 < ours["grad/clip_fraction_epoch"] < 1


@pytest.mark.timeout(180)
def test_a_bad_rank_under_torchrun():
    run = launched("--strategy", "fsdp2", "--devices", "2", "--poison", by=[*TORCHRUN, "--standalone", "--nproc-per-node", "2"])
    assert run["skipped"] == 1


def nodes(prefixes, address, port, **options):
    """A torchrun of one process on each of two hosts."""
    common = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", address, "--master-port", str(port)]
    script = [str(EXAMPLE), "--steps", "20", "--strategy", "fsdp2", "--devices", "1", "--nodes", "2", "--poison"]
    return answer(
        *(
            start([*prefix, *TORCHRUN, *common, "--node-rank", str(rank), *script], **options)
            for rank, prefix in enumerate(prefixes)
        )
    )


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


@pytest.mark.timeout(180)
def test_on_two_hosts():
    if not (shutil.which("ip") and namespaces_work()):
        pytest.skip("needs network namespaces: root and iproute2")
    ENVIRONMENT["GLOO_SOCKET_IFNAME"] = "eth0"
    try:
        with two_hosts() as prefixes:
            assert nodes(prefixes, "10.77.0.1", 29500)["skipped"] == 1
    finally:
        del ENVIRONMENT["GLOO_SOCKET_IFNAME"]


@pytest.mark.timeout(180)
def test_two_nodes_on_one_host():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert nodes([[], []], "127.0.0.1", port)["skipped"] == 1
