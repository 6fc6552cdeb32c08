"""Check the callbacks in other packages, each in an environment of its own: ``make clients``.

python -m tests.clients.run                    # all of them, one after the other
python -m tests.clients.run transformers darts # these

An environment holds what ``requirements/<package>.txt`` pins, and sees the rest (torch, Lightning, pytest) in the environment that
runs this; so it is small, and quickly made. Nothing but these packages is downloaded: models and data are made here.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import time
import venv
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

from tabulate import tabulate

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
ENVIRONMENTS = ROOT / ".venv-clients"
PACKAGES = sorted(path.stem for path in (HERE / "requirements").glob("*.txt"))
CHECKS = ("clips_to_the_same_bits", "all_callbacks_resume", "a_nan_batch_is_skipped", "copies", "saves_and_loads")
HEADERS = ("package", "version", "its own clip, same bits", "resume", "NaN batch", "pickle, deepcopy", "save, load", "seconds")
TIMEOUT_S = 900


@dataclass(frozen=True)
class Client:
    """A package of other people, and where it is installed."""

    name: str

    @property
    def folder(self) -> Path:
        return ENVIRONMENTS / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def requirements(self) -> Path:
        return HERE / "requirements" / f"{self.name}.txt"

    @property
    def checks(self) -> Path:
        own = HERE / f"{self.name}_checks.py"
        return own if own.exists() else HERE / "checks.py"

    @property
    def version(self) -> str:
        """Of the package itself, which its requirements begin with."""
        return self.requirements.read_text().partition("\n")[0]


def install(client: Client) -> None:
    """Make the environment, unless it is there and holds what is pinned."""
    wanted = f"{sys.prefix}\n{client.requirements.read_text()}"
    made = client.folder / "made"
    if made.exists() and made.read_text() == wanted:
        return
    venv.create(client.folder, clear=True, symlinks=True)
    site_packages = sysconfig.get_path("purelib", vars={"base": str(client.folder)})
    seen = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (Path(site_packages) / "seen.pth").write_text(seen)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(client.python)]
    # all that is needed is pinned, so nothing is resolved: asteroid asks for a torchmetrics older than what Lightning takes
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-compile", "--requirement", str(client.requirements)], check=True)
    made.write_text(wanted)


def outcomes(client: Client) -> dict[str, bool]:
    """Of each check, whether it has passed."""
    report = client.folder / "checks.xml"
    report.unlink(missing_ok=True)
    options = [
        "--override-ini=addopts=",
        "--override-ini=filterwarnings=",
        "-p",
        "no:cacheprovider",
        "--disable-warnings",
        "--quiet",
    ]
    command = [str(client.python), "-m", "pytest", *options, "--show-capture=no", "--client", client.name, f"--junitxml={report}"]
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # not in the checkout: some leave files where they run
    subprocess.run([*command, str(client.checks)], cwd=client.folder, env=os.environ | variables, timeout=TIMEOUT_S, check=False)
    if not report.exists():
        return {}
    cases = list(ET.parse(report).iter("testcase"))
    return {check: _have_passed([case for case in cases if case.get("name", "").startswith(f"test_{check}")]) for check in CHECKS}


def _have_passed(cases: list[ET.Element]) -> bool:
    return bool(cases) and not any(len(case) for case in cases)


def row(client: Client) -> list[str]:
    """A line of the table."""
    begin = time.monotonic()
    install(client)
    passed = outcomes(client)
    package, _, version = client.version.partition("==")
    answers = ["yes" if passed.get(check) else "NO" for check in CHECKS]
    return [package, version, *answers, f"{time.monotonic() - begin:.0f}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help=f"of {', '.join(PACKAGES)}; all if none is named")
    names = parser.parse_args().packages or PACKAGES
    if unknown := sorted(set(names) - set(PACKAGES)):
        parser.error(f"PACKAGE must be one of {', '.join(PACKAGES)}, got {', '.join(unknown)}.")
    rows = [row(Client(name)) for name in names]
    sys.stdout.write(f"\n{tabulate(rows, HEADERS, tablefmt='github')}\n")
    return int(any("NO" in line for line in rows))


if __name__ == "__main__":
    sys.exit(main())
