"""The folder of bundles: limits of number and size, and unfinished bundles of killed runs."""

from __future__ import annotations

import math
import os
import resource
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from clip_callbacks import Bundles, NonFiniteGuard
from clip_callbacks.bundles.folder import BundleFolder
from tests.helpers import forked
from tests.helpers.bundles import NAN, bundles_in, guard_to
from tests.helpers.training import Poisoned, Regression, data, make_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Spike at:RuntimeWarning"),
]


def test_the_number_of_bundles_is_capped_over_runs(trainer, tmp_path):
    with pytest.warns(UserWarning, match=r"holds 2 bundles \(max_count=2\).*training continues") as caught:
        trainer(guard_to(tmp_path, max_count=2)).fit(Poisoned(dict.fromkeys((1, 3, 5, 7), NAN)), data())
    assert sum("max_count" in str(warning.message) for warning in caught) == 1
    assert [bundle.place["step"] for bundle in bundles_in(tmp_path / "bad")] == [1, 3], (
        "the first ones: later ones follow from them"
    )
    with pytest.warns(UserWarning, match="holds 2 bundles .*no more will be written"):
        trainer(guard_to(tmp_path, max_count=2)).fit(Poisoned({0: NAN}), data(2))
    assert len(bundles_in(tmp_path / "bad")) == 2


def test_their_size_is_capped_before_anything_is_written(trainer, tmp_path):
    guard = guard_to(tmp_path, max_bytes=60_000, weights="full")
    with pytest.warns(UserWarning, match=r"holds 0.0 MB, a further bundle takes 0.1 MB \(max_bytes=60000\)"):
        trainer(guard).fit(Poisoned({1: NAN}, net=nn.Sequential(nn.Linear(4, 5000), nn.Linear(5000, 1))), data(3))
    assert list((tmp_path / "bad").iterdir()) == []
    assert guard.skipped_steps == 1


def test_two_bundles_of_one_place_stand_side_by_side(trainer, tmp_path):
    for _ in range(2):
        trainer(guard_to(tmp_path)).fit(Poisoned({1: NAN}), data(3))
    assert [bundle.path.name.partition("rank-")[2] for bundle in bundles_in(tmp_path / "bad")] == ["0", "0_2"]


def test_a_folder_that_cannot_be_written_to_is_refused_before_training(trainer, tmp_path):
    (tmp_path / "bad").write_text("a file")
    module = Regression()
    with pytest.raises(ValueError, match="`bundles` must be a folder that can be written to, got .*bad"):
        trainer(guard_to(tmp_path)).fit(module, data())
    with pytest.raises(ValueError, match="`bundles` must be a folder that can be written to"):
        trainer(NonFiniteGuard(bundles="/proc/no/such")).fit(module, data())
    assert module.trainer.global_step == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weights": "all"}, "`weights` must be one of none, reference, full, got 'all'"),
        ({"max_count": 0}, "`max_count` must be a whole number of at least 1, got 0"),
        ({"max_bytes": -1.0}, "`max_bytes` must be a number above 0, got -1.0"),
        ({"max_bytes": "much"}, "`max_bytes` must be a number above 0, got 'much'"),
    ],
)
def test_bad_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        Bundles("bad", **options)


def test_only_a_folder_or_bundles_are_taken():
    with pytest.raises(TypeError, match=r"`bundles` must be a folder, Bundles\(...\) or None, got True"):
        NonFiniteGuard(bundles=True)
    with pytest.raises(TypeError, match="`folder` must be a path, got 3"):
        Bundles(3)
    assert NonFiniteGuard(bundles="bad").bundles == Bundles("bad")


def test_what_killed_runs_left_is_cleared_away_in_time(tmp_path):
    fresh, stale = tmp_path / ".unfinished-a", tmp_path / ".unfinished-b"
    for half in (fresh, stale):
        half.mkdir()
        (half / "batches.pt").write_text("half")
    os.utime(stale, (0, 0))
    BundleFolder(tmp_path, 1, 1.0).prepare()
    assert [path.name for path in tmp_path.iterdir()] == [".unfinished-a"], "another run may be writing that one"


def fill_the_disk(folder):
    """Train with bundles while the kernel refuses files above 200 kB, an error in the middle of ``torch.save``."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    module = Poisoned({1: math.nan, 3: math.nan}, net=nn.Sequential(nn.Linear(4, 20_000), nn.Linear(20_000, 1)))
    guard = NonFiniteGuard(bundles=Bundles(folder / "bad", weights="full"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(folder, guard).fit(module, data(6))
    told = [str(warning.message) for warning in caught if "cannot be written" in str(warning.message)]
    assert len(told) == 1, told
    assert "training continues" in told[0]
    assert "File too large" in told[0]
    assert module.trainer.global_step == 6
    assert guard.skipped_steps == 2
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_a_full_disk_costs_one_warning_and_leaves_no_half_bundle(tmp_path):
    process = forked.start(fill_the_disk, tmp_path)
    process.join()
    assert process.exitcode == 0
    assert list((tmp_path / "bad").iterdir()) == []


def test_jobs_that_share_a_folder_do_not_disturb_one_another(tmp_path):
    folders = [BundleFolder(tmp_path, 1000, 1e9) for _ in range(3)]
    facts = {"kind": "nonfinite", **{key: {} for key in ("report", "versions", "module", "trainer", "weights", "batches")}}

    def work(folder):
        for _ in range(40):
            assert folder.fullness() is None
            folder.write("one_place", facts, {"batches.pt": [torch.ones(3)]}, {})

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(work, folder) for folder in folders]:
            done.result()
    assert len(bundles_in(tmp_path)) == 120


def test_what_killed_runs_left_does_not_count(tmp_path):
    half = tmp_path / ".unfinished-x"
    half.mkdir()
    (half / "bundle.json").write_text("{}")
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "bundle.json").symlink_to(tmp_path / "nowhere")
    assert BundleFolder(tmp_path, 2, 1e6).fullness() is None


def test_the_folder_stays_where_it_was_when_the_process_goes_elsewhere(trainer, tmp_path, monkeypatch):
    class Wanders(Poisoned):
        def on_train_start(self):
            monkeypatch.chdir("/")

    monkeypatch.chdir(tmp_path)
    trainer(NonFiniteGuard(bundles="bad")).fit(Wanders({1: NAN}), data(3))
    assert len(bundles_in(tmp_path / "bad")) == 1
