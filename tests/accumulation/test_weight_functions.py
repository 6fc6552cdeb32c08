"""Functions that weigh a batch."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from clip_callbacks import AccumulationRescaling, BatchSize, LabelTokens
from clip_callbacks.accumulation.weights import checked
from tests.helpers.tagging import fit, sentences

# Weights themselves


class Pair(NamedTuple):
    inputs: torch.Tensor
    labels: torch.Tensor


LABELS = torch.tensor([[4, 2, -100], [1, -100, -100]])


@pytest.mark.parametrize(
    ("key", "batch"),
    [
        ("labels", {"labels": LABELS}),
        (1, (torch.zeros(2), LABELS)),
        (-1, [torch.zeros(2), LABELS]),
        ("1", (torch.zeros(2), LABELS)),
        ("labels", Pair(torch.zeros(2), LABELS)),
        ("labels", SimpleNamespace(labels=LABELS)),
        ("target.labels", {"target": {"labels": LABELS}}),
        ("1.labels", (torch.zeros(2), {"labels": LABELS})),
        ("0", {0: LABELS}),
    ],
)
def test_labels_are_found(key, batch):
    assert LabelTokens(key)(batch) == 3
    assert LabelTokens(key, ignore_index=4)(batch) == 5
    assert LabelTokens(key, shifted=True)(batch) == 1


@pytest.mark.parametrize(
    ("key", "batch", "message"),
    [
        (
            "label",
            {"labels": LABELS, "inputs": LABELS},
            r"got 'label': there is no 'label' in a dict with keys \['inputs', 'labels'\]",
        ),
        (2, (LABELS, LABELS), "got 2: there is no '2' in a tuple of 2"),
        ("labels", LABELS, "there is no 'labels' in a Tensor"),
        ("labels", {"labels": [1, 2]}, "must lead to a tensor of labels, got 'labels', where the batch has a list of 2"),
    ],
)
def test_labels_that_are_not_there(key, batch, message):
    with pytest.raises(ValueError, match=message):
        LabelTokens(key)(batch)


@pytest.mark.parametrize(
    ("batch", "size"),
    [(torch.zeros(3, 2), 3), ((torch.zeros(4), {"x": torch.zeros(4, 1), "name": "a"}), 4), ([torch.zeros(2), torch.zeros(())], 2)],
)
def test_batch_size(batch, size):
    assert BatchSize()(batch) == size


@pytest.mark.parametrize("batch", [(torch.zeros(2), torch.zeros(3)), {"x": "text"}, 3])
def test_no_batch_size(batch):
    with pytest.raises(ValueError, match="the batch must hold tensors of one length, got"):
        BatchSize()(batch)


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, None, "3", True, torch.zeros(2), torch.tensor(-1.0)])
def test_bad_weights_name_the_callable_and_the_batch(trainer, value):
    def tokens(batch):
        return value if batch["labels"].sum() else 1

    with pytest.raises(ValueError, match=r"`weight` must return a finite number of at least 0, got .* from .*tokens for batch 0"):
        fit(trainer, sentences([3]), 1, AccumulationRescaling(tokens))


def test_good_weights():
    assert [checked(value, len, 0) for value in (0, 2, 0.5, torch.tensor(3), torch.tensor([4.0]))] == [0.0, 2.0, 0.5, 3.0, 4.0]


def test_a_weight_that_cannot_be_called():
    with pytest.raises(TypeError, match="`weight` must be a function from a batch to a number, or None, got 3"):
        AccumulationRescaling(3)


@pytest.mark.parametrize("value", ["x", 1.5, None, True])
def test_an_ignored_label_that_is_no_label(value):
    with pytest.raises(ValueError, match="`ignore_index` must be a whole number, such as -100, got "):
        LabelTokens(ignore_index=value)
