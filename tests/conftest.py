from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from tests.helpers.ranks import Ranks
from tests.helpers.training import make_trainer

os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # of Lightning's own calls


collect_ignore = ["package/typed_script.py"]  # for mypy only: some of its lines are wrong


logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"one_rank", "two_ranks", "four_ranks"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("ranks")


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    seed_everything(7, verbose=False)


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, Any]) -> None:
    import clip_callbacks
    from clip_callbacks import rules

    doctest_namespace.update(vars(clip_callbacks) | {"torch": torch, "ClipRule": rules.ClipRule})


@pytest.fixture
def trainer(tmp_path: Any) -> Callable[..., Trainer]:
    return lambda *callbacks, **options: make_trainer(tmp_path, *callbacks, **options)


@pytest.fixture(scope="session")
def one_rank() -> Iterator[Ranks]:
    ranks = Ranks(1)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@pytest.fixture
def run(one_rank: Ranks, two_ranks: Ranks, four_ranks: Ranks) -> Callable[..., list[Any]]:
    """Run a function, by default a training, on as many ranks as a strategy of ``tests.helpers.parallel`` has."""
    from tests.helpers import parallel

    pools = {1: one_rank, 2: two_ranks, 4: four_ranks}

    def on_all(name: str, *args: Any, function: Callable[..., Any] = parallel.result, **kwargs: Any) -> list[Any]:
        return pools[parallel.STRATEGIES[name][0]].run(function, name, *args, **kwargs)

    return on_all
