"""What holds in every package; run in the environment of one of them, by ``make clients``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from clip_callbacks import AccumulationRescaling, GradientClipping, GradientNormMonitor, NonFiniteGuard
from tests.clients.client import COPIES, Client, same, weights_of_copy
from tests.clients.probes import BatchCount, SaveAfterFirstEpoch, resumed_from
from tests.helpers.training import leaves


@dataclass(frozen=True)
class FamilyFit:
    """A fit with all callbacks, and its checkpoint after the first epoch."""

    model: Any
    callbacks: list[Any]
    checkpoint: Path


def family(client: Client) -> list[Any]:
    return [AccumulationRescaling(), NonFiniteGuard(), GradientClipping(client.clip), GradientNormMonitor()]


@pytest.fixture(scope="session")
def family_fit(client, tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    callbacks = family(client)
    model = client.fit(folder, [*callbacks, SaveAfterFirstEpoch(folder / "first_epoch.ckpt")])
    return FamilyFit(model, client.trained(model, callbacks), folder / "first_epoch.ckpt")


@pytest.fixture(scope="session")
def plain_fit(client, tmp_path_factory):
    """Without any callback, not clipped."""
    return client.fit(tmp_path_factory.mktemp("plain"), [])


def states(callbacks: list[Any]) -> list[Any]:
    return [callback.state_dict() for callback in callbacks]


def steps(callbacks: list[Any]) -> int:
    """Optimizer steps since the beginning of the run, as the history that the callbacks share has counted them."""
    counted: int = next(history[0]["steps"] for state in states(callbacks) if (history := state["history"]))
    return counted


def assert_same_states(left: list[Any], right: list[Any]) -> None:
    torch.testing.assert_close(leaves(states(left)), leaves(states(right)), rtol=0, atol=0, equal_nan=True)


def test_clips_to_the_same_bits(client, plain_fit, tmp_path):
    theirs = client.weights(client.fit(tmp_path, [], clip=client.clip))
    ours = client.weights(client.fit(tmp_path, [GradientClipping(client.clip)]))
    assert same(theirs, ours)
    assert not same(theirs, client.weights(plain_fit))


def test_all_callbacks_resume(client, family_fit, tmp_path):
    callbacks = [*family(client), BatchCount()]
    with resumed_from(family_fit.checkpoint):
        model = client.fit(tmp_path, callbacks)
    *resumed, counted = client.trained(model, callbacks)
    assert steps(resumed) == steps(family_fit.callbacks) > counted.batches > 0
    if client.resumes_exactly:
        assert same(client.weights(model), client.weights(family_fit.model))
        assert_same_states(resumed, family_fit.callbacks)


def test_a_nan_batch_is_skipped(client, tmp_path):
    assert is_ruined_by_nan(client, tmp_path)
    guard, clipping = NonFiniteGuard(), GradientClipping(client.clip)
    model = client.fit(tmp_path, [guard, clipping, client.nan_batch()])
    assert is_finite(client.weights(model))
    assert client.trained(model, [guard, clipping])[0].skipped_steps == 1


def is_ruined_by_nan(client: Client, folder: Path) -> bool:
    """Without a guard the weights are NaN, unless a package raises when it meets them in the next step."""
    try:
        return not is_finite(client.weights(client.fit(folder, [client.nan_batch()])))
    except Exception:  # any that another package may raise
        return True


def is_finite(weights: dict[str, torch.Tensor]) -> bool:
    return all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize("way", sorted(COPIES))
def test_copies(client, family_fit, plain_fit, way):
    assert_same_states(COPIES[way](family_fit.callbacks), family_fit.callbacks)
    if weights_of_copy(client, plain_fit, way) is not None:
        copied = weights_of_copy(client, family_fit.model, way)
        assert copied is not None
        assert same(copied, client.weights(family_fit.model))


def test_saves_and_loads(client, family_fit, tmp_path):
    loaded = client.save_and_load(family_fit.model, tmp_path)
    assert same(client.weights(loaded), client.weights(family_fit.model))
