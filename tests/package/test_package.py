"""What the package promises about itself."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import clip_callbacks

ROOT = Path(clip_callbacks.__file__).parent


def test_public_names_are_sorted_and_real():
    assert clip_callbacks.__all__ == sorted(clip_callbacks.__all__)
    for name in clip_callbacks.__all__:
        assert getattr(clip_callbacks, name).__module__.startswith("clip_callbacks")


@pytest.mark.parametrize("name", clip_callbacks.__all__)
def test_public_names_are_documented(name):
    thing = getattr(clip_callbacks, name)
    documentation = inspect.getdoc(thing)
    assert documentation
    if not (inspect.isclass(thing) and issubclass(thing, Exception)):
        for parameter in inspect.signature(thing).parameters:
            assert parameter.startswith("_") or f"{parameter}: " in documentation, parameter


def imports(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module


LIGHTNING = {"lightning", "pytorch_lightning"}
WITHOUT_LIGHTNING = ["core", "stats", "bundles", "html_report"]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_import_boundaries(path):
    names = set(imports(path))
    if path.parent == ROOT or path.relative_to(ROOT).parts[0] in WITHOUT_LIGHTNING:
        assert not {name for name in names if name.split(".")[0] in LIGHTNING}
    if path.relative_to(ROOT).parts[0] in {"core", "bundles"}:
        assert not {name for name in names if name.split(".")[0] == "torchmetrics"}
    assert path.name == "reduction.py" or not {name for name in names if name.startswith("torch.distributed")}


@pytest.mark.parametrize("path", [ROOT / "cli.py", *sorted((ROOT / "html_report").glob("*.py"))], ids=lambda path: path.name)
def test_the_report_reads_files_and_knows_no_trainer(path):
    assert not {name for name in imports(path) if name.split(".")[0] in LIGHTNING or ".callbacks" in name}


def test_the_core_stands_alone():
    for path in (ROOT / "core").rglob("*.py"):
        assert all(name.startswith("clip_callbacks.core") for name in imports(path) if name.startswith("clip_callbacks")), path


def test_the_version_is_told_alike():
    top = ROOT.parent
    versions = re.findall(r"^## \[(\d[^\]]*)\]", (top / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == clip_callbacks.__version__
    assert f"\nversion: {clip_callbacks.__version__}\n" in (top / "CITATION.cff").read_text()


@pytest.mark.parametrize("path", sorted((ROOT.parent / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.name)
def test_workflows_run_what_there_is(path):
    yaml = pytest.importorskip("yaml")
    targets = set(re.findall(r"^([\w-]+):", (ROOT.parent / "Makefile").read_text(), re.MULTILINE))
    jobs = yaml.safe_load(path.read_text())["jobs"]
    commands = [step["run"].split() for job in jobs.values() for step in job["steps"] if "run" in step]
    for command in commands:
        if command[0] == "make":
            assert command[1] in targets
        else:
            assert command[0] in {"test", ".ci/run"}
            assert command[0] == "test" or (ROOT.parent / command[0]).stat().st_mode & 0o100
    assert commands
