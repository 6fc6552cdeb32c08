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
        yield from imports_of(node)


def imports_of(node):
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        yield node.module


def imported_at_once(statements):
    """The modules that are imported as soon as a module is run: not in functions, and not for type checkers."""
    for each in statements:
        if isinstance(each, ast.If) and ast.unparse(each.test) == "TYPE_CHECKING":
            yield from imported_at_once(each.orelse)
        elif not isinstance(each, ast.FunctionDef):
            yield from imports_of(each)
            yield from imported_at_once(ast.iter_child_nodes(each))


LIGHTNING = {"lightning", "lightning_fabric", "pytorch_lightning"}
WITHOUT_LIGHTNING = ["core", "stats", "bundles", "html_report"]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_import_boundaries(path):
    names = set(imports(path))
    if path.parent == ROOT or path.relative_to(ROOT).parts[0] in WITHOUT_LIGHTNING:
        assert not {name for name in names if name.split(".")[0] in LIGHTNING}
    if path.relative_to(ROOT).parts[0] in {"core", "bundles"}:
        assert not {name for name in names if name.split(".")[0] == "torchmetrics"}
    assert path.name == "reduction.py" or not {name for name in names if name.startswith("torch.distributed")}


def test_no_lightning_is_imported_but_the_one_a_program_uses():
    """Of its classes is asked by ``clip_callbacks.trainer.compat``. A replay makes Trainers of its own."""
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).parts[0] != "replay":
            names = imported_at_once(ast.parse(path.read_text()).body)
            assert not {name for name in names if name.partition(".")[0] in LIGHTNING}, path


def test_an_import_at_once_is_told_from_later_ones():
    text = "if TYPE_CHECKING: import a\nelse: import b\nclass A:\n  import c\n  def f(): import d\nimport e.f\nfrom g import h"
    assert [*imported_at_once(ast.parse(text).body)] == ["b", "c", "e.f", "g"]


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


FACTORIES = {
    *("arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn"),
    *("randperm", "range", "scalar_tensor", "tensor", "zeros"),
}
"""Functions of torch that make a tensor of its default dtype or on its default device."""


def left_to_defaults(tree):
    """The calls that leave a dtype or a device to torch's defaults, which are those of the user's network."""
    for node in ast.walk(tree):
        is_factory = isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in FACTORIES}
        if is_factory and not {"dtype", "device"} <= {keyword.arg for keyword in node.keywords}:
            yield ast.unparse(node)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_tensor_is_made_by_the_defaults_of_torch(path):
    # torch itself returns this where there are no gradients
    allowed = ["torch.tensor(0.0)"] if path.name == "clip_grad.py" else []
    assert [*left_to_defaults(ast.parse(path.read_text()))] == allowed


def test_a_tensor_made_by_defaults_is_found():
    text = "torch.zeros(3)\ntorch.tensor(1, device='cpu')\ntorch.full((), 1.0, dtype=d, device=e)\nx.zeros(3)\ntorch.zeros_like(x)"
    assert [*left_to_defaults(ast.parse(text))] == ["torch.zeros(3)", "torch.tensor(1, device='cpu')"]
