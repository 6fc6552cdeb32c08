"""The smallest set of samples in a batch that makes the step bad."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clip_callbacks.replay.bisection import bisect
from clip_callbacks.replay.samples import batch_size, select_samples
from tests.helpers.replaying import WIDTH, Gan, Item, Net, config, fitted, replayed, samples

pytestmark = [
    pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Spike at:RuntimeWarning"),
]


def test_bisection_finds_the_one_bad_sample_among_64(trainer, tmp_path, capsys):
    inputs = samples(192)
    inputs[64 + 41, 5] = 0
    bundle = fitted(trainer, tmp_path, Net("log"), inputs, 64)
    code, found = replayed(capsys, bundle, *config(tmp_path, Net, kind="log"), "--bisect")
    assert code == 0
    assert found["bisection"]["samples"] == [41]
    assert found["bisection"]["size"] == 64
    assert found["bisection"]["stable"]
    assert found["bisection"]["alone"]
    assert found["bisection"]["runs"] <= 2 * 6 + 2
    assert found["calls"][0]["inputs"]["shape"] == [1, WIDTH], "the tree is that of the subset"


class Counting(Net):
    """Counts its runs in an attribute, and fails in the first run only."""

    def __init__(self) -> None:
        super().__init__("log")
        self.runs = []

    def training_step(self, batch, batch_idx):
        self.runs.append(batch_idx)
        return super().training_step([batch[0] + (len(self.runs) > 1)], batch_idx)


def test_each_run_begins_with_the_module_as_it_was_made(trainer, tmp_path, capsys):
    inputs = samples(16)
    inputs[3, 3] = 0
    bundle = fitted(trainer, tmp_path, Counting(), inputs)
    _, found = replayed(capsys, bundle, *config(tmp_path, Counting), "--bisect", "--detect-anomaly")
    assert found["bisection"]["samples"] == [3]


class Toggled(Gan):
    """A GAN whose discriminator loss is infinite while the generator is toggled off."""

    def training_step(self, batch, batch_idx):
        discriminator, generator = self.optimizers()
        made = self.generator(batch[0])
        self.toggle_optimizer(discriminator)
        self.one_step(discriminator, self.discriminator(made.detach() * batch[0].log()).mean())
        self.untoggle_optimizer(discriminator)
        self.toggle_optimizer(generator)
        self.one_step(generator, -self.discriminator(self.generator(batch[0])).mean())
        self.untoggle_optimizer(generator)


def test_a_run_that_ends_between_toggle_and_untoggle_leaves_nothing_to_the_next(trainer, tmp_path, capsys):
    inputs = samples()
    inputs[9, 3] = 0
    bundle = fitted(trainer, tmp_path, Toggled(), inputs)
    code, found = replayed(capsys, bundle, *config(tmp_path, Toggled), "--bisect", "--detect-anomaly")
    assert code == 0
    assert found["bisection"]["samples"] == [1]
    assert not found["notes"], "no optimizer has stepped before it in its window"


class Behind(Gan):
    """A GAN whose generator loss is infinite, after a step of the discriminator."""

    def training_step(self, batch, batch_idx):
        discriminator, generator = self.optimizers()
        self.one_step(discriminator, self.discriminator(self.generator(batch[0]).detach()).mean())
        self.one_step(generator, -self.discriminator(self.generator(batch[0]) * batch[0].log()).mean())


def test_optimizers_that_step_again_before_the_bad_step_are_told(trainer, tmp_path, capsys):
    inputs = samples()
    inputs[9, 3] = 0
    bundle = fitted(trainer, tmp_path, Behind(), inputs)
    code, found = replayed(capsys, bundle, *config(tmp_path, Behind))
    assert code == 0
    assert any(
        "optimizers that step earlier in the window of the bad step also step in the replay" in note for note in found["notes"]
    )


class Pairwise(Net):
    """Fails if two samples of a batch are equal."""

    def training_step(self, batch, batch_idx):
        distances = torch.cdist(batch[0], batch[0]) + torch.eye(len(batch[0]))
        return self.net(batch[0]).square().mean() / distances.amin().sign()


def test_bisection_finds_two_samples_that_only_fail_together(trainer, tmp_path, capsys):
    inputs = samples(64)
    inputs[57] = inputs[5]
    bundle = fitted(trainer, tmp_path, Pairwise("plain"), inputs, 64)
    _, found = replayed(capsys, bundle, *config(tmp_path, Pairwise, kind="plain"), "--bisect")
    assert found["bisection"]["samples"] == [5, 57]


def test_a_subset_at_which_the_module_raises_does_not_count_and_statistics_are_put_back(trainer, tmp_path, capsys):
    inputs = samples(8)
    inputs[3] = 1e9
    torch.manual_seed(1)
    bundle = fitted(trainer, tmp_path, Net("norm"), inputs, 8)
    _, found = replayed(capsys, bundle, *config(tmp_path, Net, kind="norm"), "--bisect")
    assert len(found["bisection"]["samples"]) == 6, "of n samples none is more than the root of n - 1 deviations away; one raises"
    assert 3 in found["bisection"]["samples"]


def test_bisection_of_a_spike_finds_the_sample_with_most_of_the_norm(trainer, tmp_path, capsys):
    inputs, module = samples(64), Scaled()
    (gradient, _) = torch.autograd.grad(module.net(inputs).square().mean(), module.parameters())
    inputs[50] *= 1e4
    limit = 0.8 * float(gradient.norm())  # each healthy sample alone is above it, its share in the mean is not
    bundle = fitted(trainer, tmp_path, module, inputs, 64, skip_above=limit)
    code, found = replayed(capsys, bundle, *config(tmp_path, Scaled), "--bisect")
    assert code == 0
    assert found["bisection"]["samples"] == [50]


class Scaled(Net):
    def __init__(self) -> None:
        super().__init__("plain")
        self.net = nn.Linear(WIDTH, 1)


def test_ddmin_says_if_a_subset_is_not_alone_or_not_stable():
    assert not bisect(8, lambda samples: bool({2, 6} & set(samples))).is_alone
    answers = iter([True, True, True, False, False])
    assert not bisect(8, lambda samples: next(answers)).is_stable
    assert bisect(1, lambda samples: True).samples == (0,)


def test_samples_are_cut_out_of_everything_that_has_as_many_rows():
    batch = {"item": Item(torch.arange(6).view(6, 1), list("abcdef"), torch.tensor(2.0)), "y": (torch.arange(6), torch.zeros(3))}
    size = batch_size(batch)
    assert size == 6
    part = select_samples(batch, [1, 4], size)
    assert part["item"].x.tolist() == [[1], [4]]
    assert part["item"].names == ["b", "e"]
    assert part["item"].temperature == 2
    assert part["y"][0].tolist() == [1, 4]
    assert part["y"][1].shape == (3,)
    assert batch["item"].names == list("abcdef")
    pair = [torch.arange(2), torch.arange(2)]
    assert [len(rows) for rows in select_samples(pair, [0], 2)] == [1, 1], "a list of tensors is no list of samples"
    assert batch_size({"text": "abc"}) is None
