"""Pools of ranks. They end with the last test of this folder: the threads of their process groups wake all the time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.helpers.ranks import Ranks


@pytest.fixture(scope="package")
def one_rank() -> Iterator[Ranks]:
    ranks = Ranks(1)
    yield ranks
    ranks.close()


@pytest.fixture(scope="package")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="package")
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
