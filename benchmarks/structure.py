"""How the package is built, in figures, for a tree before and after a redesign: ``python -m benchmarks.structure``.

``--package PATH`` measures another tree, ``--list`` names the places that were counted. All but the last measures are read from the
source. The last ones follow real steps of a small fit, in a process of its own that imports the package from the tree measured.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import statistics
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import StringIO
from pathlib import Path
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule

LAYERS: tuple[tuple[str, ...], ...] = (
    ("cli",),
    ("replay",),
    ("html_report",),
    ("callbacks",),
    ("engine",),
    ("clipping", "guard", "accumulation", "publishing"),
    ("trainer",),
    ("bundles", "stats"),
    ("core",),
    ("_version",),
)
"""Folders and single modules of the package from top to bottom; those in one line are siblings. The root is above all of them."""

GLUE = ("trainer", "accumulation", "clipping", "guard", "publishing", "engine", "callbacks")
"""Folders between Lightning and the arithmetic. In a tree without a ``core`` folder all of it is in ``callbacks``."""

OLD_ENGINE = ("callbacks/_pass.py", "callbacks/_deferral.py")
"""The engine of a tree without a ``core`` folder."""

COLLABORATORS = {
    *("guard", "clipping", "clipper", "rescaling", "rescaler", "micro_batches", "rewind", "restorer", "rollback", "deferral"),
    *("publisher", "monitor", "monitors", "journal", "evidence", "windows", "inspected", "deferred", "components", "own_engine"),
}
"""Attributes and local names, without leading underscores, that hold a part of the engine which may be missing; old names too."""

FOREIGN = {"grad", "requires_grad", "interval", "frequency", "log"}
"""Attributes that belong to tensors, schedulers and loggers of torch and Lightning: setting them is their interface."""

INLINED = {"<listcomp>", "<dictcomp>", "<setcomp>"}
"""Frames that newer versions of Python do not have."""

HEALTHY_STEP, BAD_STEP = 3, 4
"""Steps of the small fit that are followed, counted from 1; those before warm up."""

NOT_MEASURED = "n/a"

Row = tuple[str, str, Sequence[str]]
"""A measure, its value, and the places it was counted at."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """A source file.

    Args:
        name: The dotted name it is imported by.
        path: The path of the file, relative to the package's folder.
        text: The source.
    """

    name: str
    path: Path
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.text)

    @property
    def lines(self) -> int:
        """The number of lines."""
        return len(self.text.splitlines())

    @property
    def part(self) -> str:
        """The folder it is in, or its own name beside the folders; empty for the root ``__init__``."""
        return self.path.parts[0].removesuffix(".py").replace("__init__", "")

    def place(self, node: ast.expr | ast.stmt) -> str:
        """The position of a node, with its source."""
        return f"{self.path}:{node.lineno}: {ast.unparse(node)}"


Modules = dict[str, Module]


def read(package: Path) -> Modules:
    """Read all modules of a package, by dotted name."""
    modules = {}
    for file in sorted(package.rglob("*.py")):
        path = file.relative_to(package)
        parts = [package.name, *path.with_suffix("").parts]
        name = ".".join(parts[:-1] if path.name == "__init__.py" else parts)
        modules[name] = Module(name, path, file.read_text(encoding="utf-8"))
    return modules


def is_layered(modules: Modules) -> bool:
    """Whether this is a tree after the redesign."""
    return any(module.part == "core" for module in modules.values())


def glue(modules: Modules) -> list[Module]:
    """Select the modules between Lightning and the arithmetic."""
    parts = GLUE if is_layered(modules) else ("callbacks",)
    return [module for module in modules.values() if module.part in parts]


def engine(modules: Modules) -> list[Module]:
    """Select the modules that call the parts in order."""
    if is_layered(modules):
        return [module for module in modules.values() if module.part == "engine"]
    return [module for module in modules.values() if module.path.as_posix() in OLD_ENGINE]


def imported(module: Module, modules: Modules) -> set[str]:
    """Names of the package's modules that a module imports anywhere: inside functions and under TYPE_CHECKING too."""
    found: set[str] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {_resolved(_source(node, module), alias.name, modules) for alias in node.names}
    return (found & modules.keys()) - {module.name}


def _source(node: ast.ImportFrom, module: Module) -> str:
    """The absolute name of the module that names are imported from."""
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    if module.path.name == "__init__.py":
        parts.append("")
    return ".".join(filter(None, [*parts[: -node.level], node.module]))


def _resolved(source: str, name: str, modules: Modules) -> str:
    """The module that ``from source import name`` is about: a submodule, or the one that a package re-exports the name from.

    The root is not looked through: it imports everything, whatever is wanted of it.
    """
    if f"{source}.{name}" in modules:
        return f"{source}.{name}"
    package = modules.get(source)
    if package is None or package.path.name != "__init__.py" or not package.part:
        return source
    for node in package.tree.body:
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            if (alias.asname or alias.name) == name:
                return _resolved(_source(node, package), alias.name, modules)
    return source


def circles(edges: dict[str, set[str]]) -> list[set[str]]:
    """Groups of more than one module that all import each other in the end, the largest first."""
    reached = {name: _reached(name, edges) for name in edges}
    groups = {frozenset(other for other in reached[name] if name in reached[other]) for name in edges}
    return sorted((set(group) for group in groups if len(group) > 1), key=lambda group: (-len(group), sorted(group)))


def _reached(name: str, edges: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        following = edges.get(waiting.pop(), set()) - seen
        seen |= following
        waiting += following
    return seen


def circle_rows(edges: dict[str, set[str]], root: str) -> list[Row]:
    """Circles with the root and without it: everything that imports the root is in a circle with all that the root imports."""
    rows: list[Row] = []
    without = {name: targets - {root} for name, targets in edges.items() if name != root}
    for label, graph in (("import circles", edges), ("import circles, imports of the root aside", without)):
        found = circles(graph)
        rows.append((label, str(len(found)), [", ".join(sorted(group)) for group in found]))
        rows.append((f"{label}: modules in the largest", str(max(map(len, found), default=0)), ()))
    return rows


def arrow_rows(edges: dict[str, set[str]], modules: Modules) -> list[Row]:
    """Edges between different parts, and those of them that do not run down."""
    if not is_layered(modules):
        return [("arrows between layers", NOT_MEASURED, ()), ("arrows upward or between siblings", NOT_MEASURED, ())]
    rank = {"": -1} | {part: number for number, layer in enumerate(LAYERS) for part in layer}
    parts = {name: module.part for name, module in modules.items()}
    arrows = [(source, target) for source in sorted(edges) for target in sorted(edges[source]) if parts[source] != parts[target]]
    unknown = sorted(set(parts.values()) - rank.keys())
    known = [arrow for arrow in arrows if not {parts[arrow[0]], parts[arrow[1]]} & set(unknown)]
    upward = [f"{source} -> {target}" for source, target in known if rank[parts[target]] <= rank[parts[source]]]
    note = f" (in no layer: {', '.join(unknown)})" if unknown else ""
    return [("arrows between layers", str(len(arrows)), ()), ("arrows upward or between siblings", f"{len(upward)}{note}", upward)]


def collaborator_tests(module: Module) -> list[ast.expr]:
    """Tests on whether a collaborator is there, in order.

    Counted are its truth value where that decides (``if``, ``while``, ``assert``, conditional expressions, filters of
    comprehensions, behind ``not``, and before ``and`` and ``or``), and each comparison with None. What is asked of a collaborator
    (``guard.policy == "skip"``) is not counted.
    """
    found: dict[tuple[int, int], ast.expr] = {}
    for node in ast.walk(module.tree):
        for asked in _asked(node):
            if _is_collaborator(asked):
                found[asked.lineno, asked.col_offset] = asked
    return [found[position] for position in sorted(found)]


def _asked(node: ast.AST) -> Iterator[ast.expr]:
    """Expressions whose truth value, or identity with None, this node asks for."""
    match node:
        case ast.If() | ast.While() | ast.IfExp() | ast.Assert():
            yield from _decisive(node.test)
        case ast.comprehension():
            for test in node.ifs:
                yield from _decisive(test)
        case ast.BoolOp():
            for operand in node.values[:-1]:
                yield from _decisive(operand)
        case ast.UnaryOp(op=ast.Not()):
            yield from _decisive(node.operand)
        case ast.Compare(ops=[ast.Is() | ast.IsNot()], comparators=[ast.Constant(value=None)]):
            yield node.left


def _decisive(test: ast.expr) -> Iterator[ast.expr]:
    """A test, or what follows ``and`` and ``or`` in it, which is a test only if the whole is one; what stands before always is."""
    while isinstance(test, ast.BoolOp):
        test = test.values[-1]
    yield test


def _is_collaborator(node: ast.expr) -> bool:
    if isinstance(node, ast.NamedExpr):
        node = node.value
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return name.lstrip("_") in COLLABORATORS


def foreign_writes(module: Module) -> list[ast.Attribute]:
    """Attributes that code sets or deletes on objects other than its own, and other than those that it has just made."""
    return sorted(_foreign_writes(module.tree, frozenset({"self", "cls"})), key=lambda node: (node.lineno, node.col_offset))


def _foreign_writes(node: ast.AST, own: frozenset[str]) -> Iterator[ast.Attribute]:
    if isinstance(node, Function):
        own |= _made(node)
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)) and node.attr not in FOREIGN:
        is_own = isinstance(node.value, ast.Name) and node.value.id in own
        if not is_own:
            yield node
    for child in ast.iter_child_nodes(node):
        yield from _foreign_writes(child, own)


def _made(function: Function) -> set[str]:
    """Names that a function binds to new objects only."""
    made = {
        target.id
        for node in ast.walk(function)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None and _is_construction(node.value)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    bound = [node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    return {name for name in made if bound.count(name) == 1}


def _is_construction(value: ast.expr) -> bool:
    """Whether it is a call of a class, known by its capital letter, of ``cls``, or of ``__new__``."""
    if not isinstance(value, ast.Call):
        return False
    name = ast.unparse(value.func).rpartition(".")[2]
    return name in {"cls", "__new__"} or name.lstrip("_")[:1].isupper()


def per_hundred(count: int, modules: Iterable[Module]) -> str:
    """A count for each 100 lines."""
    return f"{100 * count / max(1, sum(module.lines for module in modules)):.2f}"


def conditional_expressions(module: Module) -> int:
    """The number of ``a if b else c``."""
    return sum(isinstance(node, ast.IfExp) for node in ast.walk(module.tree))


def comments(module: Module) -> int:
    """The number of comments, a line each; those that tell tools something are counted too."""
    return sum(token.type == tokenize.COMMENT for token in tokenize.generate_tokens(StringIO(module.text).readline))


def density_rows(modules: Modules) -> list[Row]:
    """Conditional expressions and comments of the glue and of the whole package."""
    rows: list[Row] = []
    for label, count in (("conditional expressions", conditional_expressions), ("comments", comments)):
        for where, chosen in (("glue", glue(modules)), ("package", list(modules.values()))):
            rows.append((f"{label} per 100 lines, {where}", per_hundred(sum(map(count, chosen)), chosen), ()))
    return rows


def body_lines(function: Function) -> int:
    """Lines of a function's body without the docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def function_rows(modules: Modules) -> list[Row]:
    """How long functions are; those that consist of a docstring have no length."""
    sized = [
        (lines, f"{module.path}:{node.lineno}: {node.name}, {lines} lines")
        for module in modules.values()
        for node in ast.walk(module.tree)
        if isinstance(node, Function) and (lines := body_lines(node))
    ]
    lengths = [lines for lines, _ in sized]
    longest = max(sized, default=(0, ""))
    tenth = statistics.quantiles(lengths, n=10, method="inclusive")[-1]
    value = f"{statistics.median(lengths):g} / {tenth:g} / {longest[0]}"
    return [("lines of a function's body: median / 90th percentile / longest", value, [longest[1]])]


def follow(package: Path) -> list[Row]:
    """Run the small fit in a process of its own, with the package of this tree."""
    environment = os.environ | {"PYTHONPATH": str(package.parent), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).resolve()), "--package", str(package), "--follow"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return [("a step followed", f"failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}", ())]
    healthy, passed, stack = json.loads(done.stdout.splitlines()[-1])
    return [
        ("files called by one healthy, clipped step", str(len(healthy)), healthy),
        ("files called by one NaN until its bundle is written", str(len(passed)), passed),
        ("files on the stack when the bundle is written", str(len({frame.partition(":")[0] for frame in stack})), ()),
        ("frames on the stack when the bundle is written", str(len(stack)), stack),
    ]


@dataclass
class Trail:
    """What of the package was called since it was cleared, and the deepest stack that has reached a file of a bundle.

    Args:
        package: The package's folder.
        bundles: The folder that bundles are written into.
        save: The code of what writes tensors.
    """

    package: Path
    bundles: Path
    save: CodeType
    files: set[str] = field(default_factory=set)
    passed: list[str] = field(default_factory=list)
    stack: list[str] = field(default_factory=list)

    def file_of(self, frame: FrameType) -> str | None:
        """The package's file that a frame belongs to, the methods that ``dataclass`` generates included."""
        file = Path(frame.f_globals.get("__file__") or "")
        return file.relative_to(self.package).as_posix() if self.package in file.parents else None

    def profile(self, frame: FrameType, event: str, argument: object) -> None:
        """Take note of a call."""
        if event != "call":
            return
        if file := self.file_of(frame):
            self.files.add(file)
        if frame.f_code is self.save:
            self.reach(frame)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Take note of a file of a bundle that is opened for writing, or renamed."""
        is_write = event == "os.rename" or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if is_write and str(arguments[0]).startswith(str(self.bundles)):
            self.reach(sys._getframe())

    def reach(self, frame: FrameType | None) -> None:
        """Keep the stack of a write to the disk if it is the deepest so far."""
        stack = []
        while frame:
            if (file := self.file_of(frame)) and frame.f_code.co_name not in INLINED:
                stack.append(f"{file}:{frame.f_code.co_name}")
            frame = frame.f_back
        if self.files and len(stack) > len(self.stack):
            self.passed, self.stack = sorted(self.files), stack[::-1]


def watched(bundles: Path) -> list[Callback]:
    """The callbacks of the small fit: what to change where the package's options change."""
    from clip_callbacks import GradientClipping, NonFiniteGuard

    return [GradientClipping(0.1), NonFiniteGuard(bundles=bundles)]


def poisoned() -> LightningModule:
    """A net of two layers with large gradients, one of which becomes NaN at the bad step, whatever the loss."""
    import torch
    from lightning.pytorch import LightningModule

    class Network(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            return 100 * (self.net(batch[0]) - 10).square().mean()

        def on_after_backward(self) -> None:
            if self.global_step == BAD_STEP - 1:
                self.net[0].weight.grad[0, 0] = torch.nan

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    return Network()


def surrounded(trail: Trail, inner: list[Callback]) -> tuple[list[Callback], list[str]]:
    """Follow the hook before the optimizer's step through callbacks, at the two steps; with the files of the healthy one."""
    from lightning.pytorch import Callback, Trainer

    healthy: list[str] = []

    class Start(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step + 1 in {HEALTHY_STEP, BAD_STEP}:
                trail.files.clear()
                sys.setprofile(trail.profile)

    class Stop(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
            sys.setprofile(None)
            if trainer.global_step + 1 == HEALTHY_STEP:
                healthy.extend(sorted(trail.files))

    return [Start(), *inner, Stop()], healthy


def trace(package: Path) -> None:
    """Fit, and print as JSON the files of the healthy step, those of the bad one until its bundle, and the stack there.

    Raises:
        ImportError: If the package is imported from another tree.
        RuntimeError: If nothing of the package was called, or no bundle was written.
    """
    sys.path.remove(str(Path(__file__).resolve().parent))  # its files have names that others may import
    import torch
    from lightning.pytorch import Trainer, seed_everything
    from lightning.pytorch.loggers import CSVLogger
    from torch.utils.data import DataLoader, TensorDataset

    import clip_callbacks

    if Path(clip_callbacks.__file__).parent != package:
        raise ImportError(f"the package must come from {package}, got {clip_callbacks.__file__}.")
    seed_everything(0)
    bundles = Path.cwd() / "bundles"
    trail = Trail(package, bundles, torch.save.__code__)
    callbacks, healthy = surrounded(trail, watched(bundles))
    sys.addaudithook(trail.audit)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=BAD_STEP,
        log_every_n_steps=1000,
        logger=CSVLogger(Path.cwd() / "logs"),
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(poisoned(), DataLoader(TensorDataset(torch.ones(BAD_STEP, 4))))
    if not healthy or not trail.stack:
        raise RuntimeError("the package's hook was not called, or no bundle was written.")
    sys.stdout.write("\n" + json.dumps([healthy, trail.passed, trail.stack]) + "\n")


def rows_of(package: Path) -> list[Row]:
    """All measures of a package."""
    modules = read(package)
    callbacks = [module for module in modules.values() if module.path.parent == Path("callbacks")]
    edges = {name: imported(module, modules) for name, module in modules.items()}
    tests = [module.place(node) for module in engine(modules) for node in collaborator_tests(module)]
    writes = [module.place(node) for module in glue(modules) for node in foreign_writes(module)]
    return [
        ("files in callbacks/", str(len(callbacks)), ()),
        ("lines in callbacks/", str(sum(module.lines for module in callbacks)), ()),
        ("files in the package", str(len(modules)), ()),
        ("lines in the package", str(sum(module.lines for module in modules.values())), ()),
        *circle_rows(edges, package.name),
        *arrow_rows(edges, modules),
        ("tests on whether a collaborator is there, engine", str(len(tests)), tests),
        ("attributes set on other objects, glue", str(len(writes)), writes),
        *density_rows(modules),
        *function_rows(modules),
        *follow(package),
    ]


def text_of(rows: Sequence[Row], *, lists: bool) -> str:
    """The table, with the places below it if they are wanted."""
    width = max(len(label) for label, _, _ in rows)
    lines = [
        f"{'measure'.ljust(width)} | value",
        f"{'-' * width}-|------",
        *(f"{label:{width}} | {value}" for label, value, _ in rows),
    ]
    for label, _, places in rows if lists else ():
        if places:
            lines += ["", f"{label}:", *(f"  {place}" for place in places)]
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--package", type=Path, default=Path(__file__).parents[1] / "clip_callbacks", help="the package's folder")
    parser.add_argument("--list", action="store_true", help="name the places that were counted, below the table")
    parser.add_argument("--follow", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    package = arguments.package.resolve()
    if arguments.follow:
        trace(package)
    else:
        sys.stdout.write(text_of(rows_of(package), lists=arguments.list) + "\n")


if __name__ == "__main__":
    main()
