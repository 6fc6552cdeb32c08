"""What imports in some order leave behind, found out in forks of an interpreter that has imported neither Lightning.

``python -m tests.helpers.importing FILE LOG`` writes what it has found as JSON; then it runs ``clip-callbacks suggest LOG``.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from types import FunctionType
from typing import Any

from tests.helpers import installed

OURS = "clip_callbacks"
HOSTS = ("lightning.pytorch", "pytorch_lightning")
HEAVY = ("torch", "torch._dynamo", "torchmetrics", "lightning_utilities")
"""What a Lightning spends most of its time with when it is imported: done once, before the forks."""
WATCHED = ("lightning", "lightning_fabric", "pytorch_lightning", "lightning_utilities", "torch", "torchmetrics")
ORDERS = [order for a, b in (HOSTS, HOSTS[::-1]) for order in ((OURS, a, b), (a, OURS, b), (a, b, OURS))]


def without_ours(order: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in order if name != OURS)


def watched_modules() -> dict[str, Any]:
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in WATCHED and module is not None}


def things() -> dict[str, object]:
    """All globals of the watched modules, the attributes of their classes and functions, loggers, and what warnings look at."""
    found = dict(_globals())
    for name, logger in loggers().items():
        found[f"logger {name}"] = logger
        for attribute, value in vars(logger).items():
            if attribute not in {"manager", "_cache"}:
                found[f"logger {name}.{attribute}"] = tuple(value) if isinstance(value, list) else value
    found |= {f"warnings.{name}": value for name, value in vars(warnings).items() if name not in {"filters", "_filters_version"}}
    found["filters"] = tuple(warnings.filters)
    found["environment"] = tuple(sorted(os.environ.items()))
    return found


def _globals() -> Iterator[tuple[str, object]]:
    for module, value in watched_modules().items():
        for name, thing in list(vars(value).items()):
            yield f"{module}.{name}", thing
            # by type(): some of torch's globals warn of themselves when they are asked what they are
            if not module.startswith("torch") and issubclass(type(thing), (type, FunctionType)) and thing.__module__ == module:
                yield from ((f"{module}.{name}.{key}", it) for key, it in list(vars(thing).items()))


def loggers() -> dict[str, logging.Logger]:
    made = logging.root.manager.loggerDict.items()
    return {"root": logging.root, **{name: it for name, it in made if isinstance(it, logging.Logger) and not name.startswith(OURS)}}


def differences(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """What is another object than before, gone, or new; a module that torch has imported is nothing to worry about."""
    changed = [name for name, thing in before.items() if name not in after or not _is_same(thing, after[name])]
    new = [name for name in after.keys() - before.keys() if not _is_of_new_module(name, before)]
    return sorted([*changed, *new])


def _is_same(one: object, other: object) -> bool:
    if type(one) is tuple:
        return type(other) is tuple and len(one) == len(other) and all(map(_is_same, one, other))
    return one is other or (type(one) is type(other) and type(one) in {str, int} and one == other)


def _is_of_new_module(name: str, before: dict[str, object]) -> bool:
    is_of_torch = name.startswith(("torch.", "torchmetrics."))
    return is_of_torch and (name in sys.modules or f"{name.rpartition('.')[0]}.__name__" not in before)


def picture() -> dict[str, Any]:
    """What a process says of Lightning, in words that can be compared with those of another process."""
    rank_zero = sys.modules["lightning_utilities.core.rank_zero"]
    return {
        "log": rank_zero.log.name,
        "deprecation": str(rank_zero.rank_zero_deprecation_category),
        "loggers": {
            name: [it.level, it.propagate, it.disabled, len(it.filters), [(type(h).__name__, h.level) for h in it.handlers]]
            for name, it in sorted(loggers().items())
            if name.partition(".")[0] in WATCHED
        },
        "filters": [str(each) for each in warnings.filters],
        "modules": sorted({name.partition(".")[0] for name in sys.modules} & set(WATCHED)),
    }


def _packages_of(modules: set[str]) -> list[str]:
    """The packages of others that modules are of."""
    return sorted({name.partition(".")[0] for name in modules} - {OURS} - sys.stdlib_module_names)


def made() -> list[Any]:
    """A callback of each base class and of each way to make a key."""
    ours = sys.modules[OURS]
    return [ours.GradientClipping(1.0), ours.GradientNormMonitor(), ours.FaultInjection("nan", step=1)]


def subclasses(kind: type) -> set[type]:
    """All that command lines find when they look for a short name."""
    return {kind}.union(*map(subclasses, kind.__subclasses__()))


@dataclass(frozen=True)
class Imported:
    """What a process has imported so far.

    Attributes:
        order: The packages, in order.
        changed: What the import of this package has changed.
        packages: Packages of others that it has brought.
        callbacks: Made as soon as it was there, which may be before there is any Lightning.
    """

    order: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    callbacks: tuple[Any, ...] = ()

    def after(self, name: str) -> Imported:
        """Import one more."""
        order = (*self.order, name)
        if name != OURS:
            importlib.import_module(name)
            return replace(self, order=order)
        before, modules = things(), set(sys.modules)
        importlib.import_module(OURS)
        changed, packages = differences(before, things()), _packages_of(set(sys.modules) - modules)
        return Imported(order, tuple(changed), tuple(packages), tuple(made()))

    def told(self) -> dict[str, Any]:
        """What has changed, and whose callbacks the callbacks are in the end."""
        hosts = [sys.modules[name].Callback for name in HOSTS if name in sys.modules]
        is_guest = all(isinstance(it, host) and type(it) in subclasses(host) for it in self.callbacks for host in hosts)
        return {"changed": self.changed, "packages": self.packages, "is_guest": is_guest, "picture": picture()}

    def heard(self, silenced: Sequence[str]) -> str:
        """Silence loggers, train with the first Lightning: what is written to stderr."""
        for each in silenced:
            logging.getLogger(each).setLevel(logging.ERROR)
        imported = self if OURS in self.order else self.after(OURS)
        warnings.simplefilter("ignore")
        with TemporaryFile("w+") as file:
            os.dup2(file.fileno(), 2)
            _train(sys.modules[without_ours(self.order)[0]], list(imported.callbacks[:2]))
            sys.stderr.flush()
            file.seek(0)
            return file.read()


def explore(imported: Imported) -> dict[str, Any]:
    """All that is wanted of the orders that begin in this way, each fork with one import more than the process it is of."""
    orders = {*ORDERS, *map(without_ours, ORDERS)}
    found: dict[str, Any] = {}
    if imported.order in orders:
        found["told " + " ".join(imported.order)] = imported.told()
    for who, (order, silenced) in SILENCED.items():
        if imported.order == order:
            found[f"heard {who}"] = in_fork(imported.heard, silenced)
    length = len(imported.order)
    for name in sorted({order[length] for order in orders if len(order) > length and order[:length] == imported.order}):
        found |= in_fork(lambda name=name: explore(imported.after(name)))
    return found


def _train(host: Any, callbacks: list[Any]) -> None:
    import torch

    class Module(host.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    torch.set_num_threads(1)
    quiet = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    logger = host.loggers.logger.DummyLogger()  # the Trainer is not told to be silent
    trainer = host.Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, logger=logger, **quiet)
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(100, 1)))


def in_fork(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns, or the error it raises, in a fork of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            result = function(*args)
        except BaseException as error:
            result = repr(error)
        with os.fdopen(writing, "w") as pipe:
            json.dump(result, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        result = json.load(pipe)
    os.waitpid(child, 0)
    return result


SILENCED = {
    "nobody": ((OURS, *HOSTS[::-1]), []),
    "pytorch_lightning": (HOSTS[1:], ["pytorch_lightning"]),
    "lightning.pytorch": (HOSTS[:1], ["lightning.pytorch"]),
}
"""What is imported, the first Lightning of which trains, and which loggers are silenced before this package is imported."""


def main(file: str, log: str) -> None:
    gc.disable()  # what is imported is kept
    installed.ask_quickly()
    for name in HEAVY:
        importlib.import_module(name)
    assert not watched_modules().keys() & set(HOSTS)
    Path(file).write_text(json.dumps(explore(Imported())))
    sys.argv = ["clip-callbacks", "suggest", log]
    runpy.run_module("clip_callbacks.cli", run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
