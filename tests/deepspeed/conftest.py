"""Pools of ranks that train under DeepSpeed; all is skipped where that is not installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from tests.helpers.ranks import Ranks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if find_spec("deepspeed") is None:
        for item in items:
            if item.path.parent.name == "deepspeed":
                item.add_marker(
                    pytest.mark.skip(reason="DeepSpeed is not installed: make deepspeed-tests has an environment with it")
                )


@pytest.fixture(scope="package")
def pools() -> Iterator[dict[int, Ranks]]:
    ranks = {1: Ranks(1), 2: Ranks(2)}
    yield ranks
    for pool in ranks.values():
        pool.close()


@pytest.fixture(scope="package")
def train(pools: dict[int, Ranks]) -> Callable[..., list[Any]]:
    """Train several times on one or two ranks; of each training the results of all ranks."""

    def train(world_size: int, *cells: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Any]:
        from tests.helpers import deepspeed

        return list(zip(*pools[world_size].run(deepspeed.each, cells), strict=True))

    return train


def cell(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of one training."""
    return args, kwargs


def alike(results: Any) -> dict[str, Any]:
    """The result of one training, which must be that of every rank."""
    for found in results:
        assert not isinstance(found, str), found
        assert found | {"largest": 0} == results[0] | {"largest": 0}, "ranks differ"
    return results[0]


def assert_close(found: list[float] | float, expected: list[float] | float, **tolerances: float) -> None:
    """Compare numbers that were float32 before they came from the ranks."""
    import torch

    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), **tolerances)
