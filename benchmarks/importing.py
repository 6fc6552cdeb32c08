"""What it costs to import the package, beside the Lightning that a program imports anyway: in fresh processes, interleaved.

python -m benchmarks.importing [--rounds 15] [--output importing_cpu.md]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from benchmarks.timing import Ratio, machine, publish, table

HOSTS = ("lightning.pytorch", "pytorch_lightning")
PACKAGE = "clip_callbacks"

PROGRAM = """
import sys, time
times = [time.perf_counter()]
for name in sys.argv[1:]:
    __import__(name)
    times.append(time.perf_counter())
print(*[after - before for before, after in zip(times, times[1:])])
"""


def seconds_of(*names: str) -> list[float]:
    """How long the import of each takes, one after the other in a new process."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM, *names], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


def row(host: str, pairs: list[list[float]]) -> list[str]:
    """A Lightning's time and ours, each in the same process, and their sum as a ratio to the first."""
    hosts, ours = zip(*pairs, strict=True)
    ratio = Ratio.of([a + b for a, b in pairs], hosts)
    spread = f"{ratio.median:.3f} ({ratio.lower:.3f}-{ratio.upper:.3f})"
    return [host, f"{statistics.median(hosts):.2f}", f"{statistics.median(ours):.3f}", spread]


def main() -> None:
    """Import in turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", nargs="+", default=HOSTS, choices=HOSTS, help="what is imported first")
    parser.add_argument("--rounds", type=int, default=15, help="processes for each of them, beside one that does not count")
    parser.add_argument("--output", help="a file under benchmarks/results to write the table to")
    arguments = parser.parse_args()
    pairs: dict[str, list[list[float]]] = {host: [] for host in arguments.hosts}
    for number in range(-1, arguments.rounds):
        for host in arguments.hosts:
            measured = seconds_of(host, PACKAGE)
            if number >= 0:  # the first writes bytecode, and brings files into the cache of the disk
                pairs[host].append(measured)
    headings = ["imported first", "seconds", f"then {PACKAGE}, seconds", "both against the first alone"]
    rows = [row(host, each) for host, each in pairs.items()]
    publish(f"# Importing the package\n\n{table(rows, headings)}\n\n{machine('cpu')}", arguments.output)


if __name__ == "__main__":
    main()
