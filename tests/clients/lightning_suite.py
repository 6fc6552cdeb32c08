"""Lightning's own tests, with all callbacks in every Trainer: ``make lightning-tests LIGHTNING_TESTS=…/tests``.

What fails is run once more without the callbacks: it counts only if it passes then, and is not among what has to differ.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

ROOT = Path(__file__).parents[2]
HAVE_TO_DIFFER = {
    "test_legacy_checkpoints": "needs checkpoints that are downloaded",
    "test_trainer_reset_correctly": "compares the list of callbacks before a fit with the one after it: they join in between",
    "test_configure_callbacks_hook_multiple_calls": "compares the same lists",
    "test_device_stats_cpu": "wants each call of a logger to be one of DeviceStatsMonitor",
    "test_throughput_monitor_fit": "compares all that a logger was given",
    "test_throughput_monitor_variable_batch_size": "counts all that a logger was given",
    "test__training_step__epoch_end__flow_scalar": "wants no metrics at all: those of the callbacks are there",
}
"""Parts of names of tests, and why."""
TIMEOUT_S = 300


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", type=Path, help="the folder tests of a checkout of Lightning")
    parser.add_argument(
        "parts", nargs="+", metavar="PART", help="folders or files of tests/tests_pytorch: callbacks, checkpointing, ..."
    )
    arguments = parser.parse_args()
    if not (arguments.tests / "tests_pytorch").is_dir():
        parser.error(f"tests must be a folder that holds tests_pytorch, got {str(arguments.tests)!r}.")
    parts = [f"tests_pytorch/{part}" for part in arguments.parts]
    passed, failed = run(arguments.tests, ["-p", "tests.clients.lightning_plugin", "-k", _not_named(HAVE_TO_DIFFER), *parts])
    ours = failed - run(arguments.tests, sorted(failed))[1] if failed else set()
    for name in sorted(ours):
        sys.stdout.write(f"passes without the callbacks only: {name}\n")
    sys.stdout.write(f"{len(passed)} passed, {len(ours)} failed\n")
    sys.stdout.write(f"(and {len(failed - ours)} fail with the callbacks and without)\n")
    return int(bool(ours) or not passed)


def run(folder: Path, arguments: Sequence[str]) -> tuple[set[str], set[str]]:
    """Names of the tests that have passed, and of those that have failed."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.xml")
        options = [
            "--override-ini=addopts=",
            "-p",
            "no:cacheprovider",
            "--quiet",
            "--disable-warnings",
            "--tb=short",
            "--show-capture=no",
        ]
        own = [
            "--override-ini=junit_family=xunit1",
            f"--junitxml={report}",
            f"--basetemp={scratch}/tests",
            f"--timeout={TIMEOUT_S}",
            f"--rootdir={folder.resolve()}",
        ]
        paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder.resolve())]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", *options, *own, *arguments]
        subprocess.run(command, cwd=folder, env=os.environ | paths, check=False)
        cases = list(ET.parse(report).iter("testcase"))
    failed = {_node(case) for case in cases if case.find("failure") is not None or case.find("error") is not None}
    return {_node(case) for case in cases if len(case) == 0 or case.find("properties") is not None} - failed, failed


def _node(case: ET.Element) -> str:
    """A test as pytest takes it on its command line."""
    file, classes = case.get("file", ""), case.get("classname", "")
    inner = classes.removeprefix(file.removesuffix(".py").replace("/", ".")).strip(".")
    return "::".join(part for part in (file, inner.replace(".", "::"), case.get("name", "")) if part)


def _not_named(names: dict[str, str]) -> str:
    return " and ".join(f"not {name}" for name in names)


if __name__ == "__main__":
    sys.exit(main())
