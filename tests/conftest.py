"""Fixtures of all tests. Lightning is imported where a fixture needs it: the process that hands tests to workers does not."""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers import browser, installed
from tests.helpers.browser import Opened
from tests.helpers.forked import seldom_collect

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

gc.disable()  # until all tests are collected: imports and tests are kept anyway
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # of Lightning's own calls
installed.ask_quickly()  # before Lightning is imported
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
collect_ignore = [
    "package/typed_script.py",  # for mypy only: some of its lines are wrong
    "clients",  # what each of its packages needs is in an environment of its own
]

if find_spec("deepspeed") is None:
    collect_ignore.append("helpers/deepspeed.py")

TOGETHER = {
    "forked": (
        "tests/distributed/",
        "tests/bundles/test_folder.py",
        "tests/integration/test_kill.py",
        "tests/integration/test_places.py",
        "tests/package/test_run_scripts.py",
        "tests/replay/test_poisoned_demo.py",
        "tests/replay/test_scripts.py",
        "tests/report/test_missing_packages.py",
    ),
    "fresh": ("tests/package/test_fresh_interpreter.py",),
    "services": (
        "tests/publishing/test_loggers.py",
        "tests/publishing/test_histograms.py",
        "tests/report/test_command.py",
        "tests/report/test_reading.py",
        "tests/report/test_third_party_norms.py",
    ),
    "page": ("tests/report/test_report_page.py",),
}
"""Tests that share a worker: a fork server and its pools of ranks; a fresh interpreter; one fit's logs, MLflow and W&B; a page."""

POOLS = {"one_rank", "two_ranks", "four_ranks"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Not by ``--dist loadgroup``: with pytest 9.2 the groups of pytest-xdist 3.8 have no effect."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((name for name, places in TOGETHER.items() if nodeid.startswith(places)), nodeid)

        def mark_test_complete(self, node: Any, item_index: int, duration: float = 0) -> None:
            """Forget what is done: xdist would count all of it again after each test."""
            super().mark_test_complete(node, item_index, duration)
            work, scope = self.assigned_work[node], self._split_scope(self.registered_collections[node][item_index])
            if all(work[scope].values()):
                del work[scope]

    return Scheduling(config, log)


def pytest_configure() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        threading.Thread(target=_end_with_the_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_the_parent(parent: int) -> None:
    """A worker in the middle of a test would not notice that pytest was killed; its ranks end when it does."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def pytest_itemcollected(item: pytest.Item) -> None:
    if POOLS & set(getattr(item, "fixturenames", ())):
        item.add_marker("ranks")


def pytest_collection_finish() -> None:
    seldom_collect()
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def _torch_on_one_core() -> None:
    import torch

    from tests.helpers import seeds

    torch.set_num_threads(1)
    seeds.of_what_is_there()


@pytest.fixture(autouse=True)
def _seed() -> None:
    from lightning.pytorch import seed_everything

    seed_everything(7, verbose=False)


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, Any]) -> None:
    import torch

    import clip_callbacks
    from clip_callbacks.core import rules

    doctest_namespace.update(vars(clip_callbacks) | {"torch": torch, "ClipRule": rules.ClipRule})


@pytest.fixture
def trainer(tmp_path: Any) -> Callable[..., Trainer]:
    from tests.helpers.training import make_trainer

    return lambda *callbacks, **options: make_trainer(tmp_path, *callbacks, **options)


# what is inside the package, and has another name when the package has: patched here and nowhere else


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the package tells of a run at its end, however short and quiet the run is: the table first, then lines."""
    lines: list[str] = []
    for place in ("engine", "learning_rate_search"):
        monkeypatch.setattr(f"clip_callbacks.engine.{place}.is_silent", lambda _: False)
        monkeypatch.setattr(f"clip_callbacks.engine.{place}.log_message", lambda _, text: lines.append(text))
    monkeypatch.setattr("clip_callbacks.publishing.summary.MIN_STEPS_FOR_TABLE", 1)
    return lines


@pytest.fixture
def never_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the test fail where gradients are examined one by one."""
    monkeypatch.setattr("clip_callbacks.guard.examination.examine", lambda *_: pytest.fail("walked on a healthy step"))


@pytest.fixture
def any_override(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a module override Lightning's hook for clipping beside GradientClipping."""
    monkeypatch.setattr("clip_callbacks.trainer.checks.overrides", lambda *_: False)


@pytest.fixture(scope="module")
def opened() -> Iterator[Callable[..., AbstractContextManager[Opened]]]:
    """Open a page, by its address, in one Chromium for all tests of a module."""
    with browser.chromium() as running:
        yield partial(browser.opened, running)
