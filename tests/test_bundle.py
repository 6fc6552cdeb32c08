from __future__ import annotations

import json
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
import warnings
import weakref
import zipfile
from collections import UserDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from clip_callbacks import NonFiniteGradientError, NonFiniteGuard
from clip_callbacks.bundle import Bundle, UnusableBundleError
from clip_callbacks.bundle_folder import BundleFolder
from clip_callbacks.random_states import RandomStates, restore
from tests import parallel
from tests.conftest import Poisoned, Regression, assert_same_bits, data
from tests.ranks import RanksFailedError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Spike at:RuntimeWarning"),
]

NAN = math.nan


class Pair(NamedTuple):
    inputs: torch.Tensor
    targets: torch.Tensor


def bundles_in(folder):
    return [Bundle.read(path) for path in sorted(folder.iterdir())]


def guard_to(folder, **options):
    return NonFiniteGuard(bundle_dir=folder / "bad", **options)


def test_a_skipped_step_leaves_one_folder_with_its_window_and_where_it_was(trainer, tmp_path):
    fit = trainer(guard_to(tmp_path), accumulate_grad_batches=3, max_epochs=2)
    fit.fit(Poisoned({16: NAN}), data(12))
    (bundle,) = bundles_in(tmp_path / "bad")
    assert bundle.place == {"step": 5, "epoch": 1, "batch": 5, "rank": 0}
    assert bundle.path.name == "step-0000005_batch-0000005_epoch-1_rank-0"
    assert bundle.facts["kind"] == "nonfinite"
    assert bundle.facts["report"]["stage"] == "loss"
    assert bundle.facts["trainer"]["accumulate_grad_batches"] == 3
    assert bundle.facts["module"]["class"] == "tests.conftest.Poisoned"
    assert bundle.facts["module"]["state"]["net.0.weight"] == ["float32", [8, 4]]
    assert bundle.facts["versions"]["torch"] == torch.__version__
    rows = bundle.micro_batches()
    assert [row["batch_idx"] for row in rows] == [3, 4, 5]
    for row, batch in zip(rows, list(data(12))[3:6], strict=True):
        assert_same_bits(row["batch"], batch)
    assert [bool(row["loss"].isfinite()) for row in rows] == [True, False, True]
    assert bundle.weights() is None


def test_a_raised_step_a_zeroed_one_and_a_spike_leave_theirs(trainer, tmp_path):
    with pytest.raises(NonFiniteGradientError, match="Bundle: .*step-0000004"):
        trainer(guard_to(tmp_path, policy="raise")).fit(Poisoned({4: NAN}), data())
    trainer(guard_to(tmp_path, policy="zero")).fit(Poisoned({5: NAN}), data())
    trainer(guard_to(tmp_path, skip_above=1e4)).fit(Poisoned({6: 1e6}), data())
    raised, zeroed, spike = bundles_in(tmp_path / "bad")
    assert [bundle.place["step"] for bundle in (raised, zeroed, spike)] == [4, 5, 6]
    assert [bundle.facts["report"]["policy"] for bundle in (raised, zeroed, spike)] == ["raise", "zero", "skip"]
    assert spike.facts["kind"] == "spike"
    assert spike.facts["report"]["total_norm"] > spike.facts["report"]["limit"] == 1e4


def test_good_steps_and_a_policy_that_ignores_leave_nothing(trainer, tmp_path):
    trainer(guard_to(tmp_path)).fit(Regression(), data())
    trainer(guard_to(tmp_path, policy="ignore")).fit(Poisoned({3: NAN}), data(5))
    assert list((tmp_path / "bad").iterdir()) == []


def test_a_dropped_micro_batch_is_alone_in_its_bundle(trainer, tmp_path):
    trainer(guard_to(tmp_path, level="microbatch"), accumulate_grad_batches=4).fit(Poisoned({5: NAN, 6: NAN}), data(12))
    first, second = bundles_in(tmp_path / "bad")
    for bundle, number in ((first, 5), (second, 6)):
        assert bundle.facts["level"] == "microbatch"
        (row,) = bundle.micro_batches()
        assert row["batch_idx"] == bundle.place["batch"] == number


def test_batches_are_kept_by_reference_until_their_step_and_no_longer(trainer, tmp_path):
    seen, kept = [], []

    class Look(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            seen.append(id(pl_module.batch))

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            (lane,) = guard._pass.lanes
            kept.append([id(it.kept.batch) for it in lane.window])

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if (batch_idx + 1) % 4 == 0:
                assert not guard._pass.lanes[0].window

    class Keeps(Regression):
        def loss(self, batch, batch_idx):
            self.batch = batch
            return super().loss(batch, batch_idx)

    guard = guard_to(tmp_path)
    trainer(Look(), guard, accumulate_grad_batches=4).fit(Keeps(), data(8))
    assert kept == [seen[:4], seen[4:]], "the same objects, no copies"


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(8), nn.Dropout(0.5)], ids=["batch_norm", "dropout"])
def test_full_weights_random_numbers_and_batch_give_the_same_gradients_again(trainer, tmp_path, layer):
    def net():
        return nn.Sequential(nn.Linear(4, 8), layer, nn.Tanh(), nn.Linear(8, 1))

    class Look(Callback):
        """What a replay must come to, and what the weights were."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 6:
                self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            self.gradients = [parameter.grad.clone() for parameter in pl_module.parameters() if parameter.grad is not None]

        def on_after_backward(self, trainer, pl_module):
            if trainer.fit_loop.batch_idx == 6:
                self.gradients = [parameter.grad.clone() for parameter in pl_module.parameters()]
                self.momentum = [dict(state) for state in trainer.optimizers[0].state.values()]

    look = Look()
    module = Poisoned({6: 1e9}, net=net(), momentum=0.9)
    guard = guard_to(tmp_path, weights="full", skip_above=1e6)
    trainer(look, guard, max_steps=7).fit(module, data())
    (bundle,) = bundles_in(tmp_path / "bad")
    (row,) = bundle.micro_batches()
    again = Regression(net=net())
    again.load_state_dict(bundle.weights()["module"])
    assert_same_bits(list(bundle.weights()["module"].values()), list(look.state.values()))
    restore(row["rng"], again)
    (again.loss(row["batch"], 6) * 1e9).backward()
    assert_same_bits([parameter.grad for parameter in again.parameters()], look.gradients)
    (state,) = torch.load(bundle.path / "optimizers.pt", weights_only=True)
    assert_same_bits(
        [entry["momentum_buffer"] for entry in state["state"].values()], [entry["momentum_buffer"] for entry in look.momentum]
    )


def test_generators_of_all_kinds_go_on_where_they_were():
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = nn.Identity()
            self.child.dice = torch.Generator().manual_seed(3)
            self.numpy = np.random.default_rng(4)
            self.python = random.Random(5)

        def draw(self):
            own = [torch.rand(3, generator=self.child.dice).tolist(), self.numpy.random(), self.python.random()]
            return own, torch.rand(2).tolist(), np.random.rand(), random.random()

    module = Module()
    module.draw()
    states = RandomStates(module).capture()
    drawn = module.draw()
    module.draw()
    assert restore(states, module) == []
    assert module.draw() == drawn
    assert restore(states, nn.Identity()) == [f"the module has no generator `{name}`" for name in ("numpy", "python", "child.dice")]


def test_a_reference_names_the_last_checkpoint_and_its_step(trainer, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=4, save_top_k=-1)
    options = {"enable_checkpointing": True}
    trainer(guard_to(tmp_path), checkpoint, **options).fit(Poisoned({9: NAN}), data())
    (bundle,) = bundles_in(tmp_path / "bad")
    weights = bundle.facts["weights"]
    assert weights == {"kind": "reference", "checkpoint": str(tmp_path / "checkpoints" / "epoch=0-step=8.ckpt"), "step": 8}
    shutil.rmtree(tmp_path / "bad")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`", UserWarning)
        trainer(guard_to(tmp_path), max_epochs=2).fit(Poisoned({12: NAN}), data(), ckpt_path=weights["checkpoint"])
    (bundle,) = bundles_in(tmp_path / "bad")
    assert bundle.facts["weights"] == {"kind": "reference", "checkpoint": weights["checkpoint"], "step": None}
    shutil.rmtree(tmp_path / "bad")
    trainer(guard_to(tmp_path, weights="none")).fit(Poisoned({2: NAN}), data())
    assert bundles_in(tmp_path / "bad")[0].facts["weights"] == {"kind": "none"}


def test_the_message_and_the_journal_tell_where_the_bundle_is(trainer, tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    with pytest.warns(RuntimeWarning, match=r"Bundle: .*step-0000003(.|\n)*Run it again: clip-callbacks replay .*step-0000003"):
        trainer(guard_to(tmp_path), logger=logger).fit(Poisoned({3: NAN}), data(5))
    (line,) = (tmp_path / "nonfinite_steps.jsonl").read_text().splitlines()
    assert json.loads(line)["bundle"] == str(bundles_in(tmp_path / "bad")[0].path)


def test_deferred_steps_leave_bundles_of_their_own_batch(trainer, tmp_path):
    options = {"optimizer": torch.optim.AdamW, "fused": True}
    guard = guard_to(tmp_path, deferred=True, weights="full", hold_schedulers=False)
    trainer(guard, log_every_n_steps=50).fit(Poisoned({4: NAN, 11: NAN}, **options), data())
    first, last = bundles_in(tmp_path / "bad")
    assert [first.place["step"], last.place["step"]] == [4, 11]
    for bundle, number in ((first, 4), (last, 11)):
        assert bundle.facts["trainer"]["global_step"] == number
        assert_same_bits(bundle.micro_batches()[0]["batch"], list(data())[number])


class Views(Regression):
    """Its batches are small pieces of a large tensor, arrays, and whatever else there is."""

    def loss(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch["x"]), torch.as_tensor(batch["y"]))
        return loss * NAN if batch_idx == 1 else loss


def loader_of(*batches):
    return DataLoader(list(batches), batch_size=None, collate_fn=lambda batch: batch)


def test_views_arrays_and_mappings_are_written_small_and_plain(trainer, tmp_path):
    large = torch.randn(100_000, 4)
    batches = [
        UserDict(x=large[i : i + 3], y=np.ones((3, 1), np.float32), n=np.float64(2.5), nested=[("a", {"b": large[5]})], none=None)
        for i in range(3)
    ]
    trainer(guard_to(tmp_path)).fit(Views(), loader_of(*batches))
    (bundle,) = bundles_in(tmp_path / "bad")
    assert (bundle.path / "batches.pt").stat().st_size < 40_000
    (row,) = bundle.micro_batches()
    batch = row["batch"]
    assert type(batch) is dict
    assert_same_bits([batch["x"], batch["nested"][0][1]["b"]], [large[1:4], large[5]])
    assert isinstance(batch["y"], np.ndarray)
    np.testing.assert_array_equal(batch["y"], np.ones((3, 1), np.float32))
    assert batch["n"] == 2.5
    assert isinstance(batch["n"], np.float64)
    assert batch["none"] is None


class Unsafe(Regression):
    def loss(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch.inputs), batch.targets) * NAN


def test_batches_of_unknown_classes_are_named_and_need_trust(trainer, tmp_path):
    batch = Pair(torch.ones(2, 4), torch.ones(2, 1))
    with pytest.warns(RuntimeWarning, match=r"objects of tests.test_bundle.Pair: a replay needs --trust"):
        trainer(guard_to(tmp_path)).fit(Unsafe(), loader_of(batch))
    (bundle,) = bundles_in(tmp_path / "bad")
    with pytest.raises(UnusableBundleError, match=r"could run code, of tests.test_bundle.Pair.*--trust tests.test_bundle.Pair"):
        bundle.micro_batches()
    (row,) = bundle.micro_batches(trust=[Pair])
    assert_same_bits(list(row["batch"]), list(batch))


def test_a_batch_that_cannot_be_pickled_is_left_out_and_the_reason_told(trainer, tmp_path):
    batch = {"x": torch.ones(2, 4), "y": torch.full((2, 1), NAN), "lock": (i for i in range(3))}
    with pytest.warns(RuntimeWarning, match="its batches.pt could not be written: cannot pickle 'generator'"):
        trainer(guard_to(tmp_path)).fit(Views(), loader_of(batch))
    (bundle,) = bundles_in(tmp_path / "bad")
    with pytest.raises(UnusableBundleError, match="holds no batches: cannot pickle 'generator' object"):
        bundle.micro_batches()


def test_a_batch_changed_in_place_is_told(trainer, tmp_path):
    class Changes(Poisoned):
        def loss(self, batch, batch_idx):
            batch[0].mul_(2)
            return super().loss(batch, batch_idx)

    with pytest.warns(RuntimeWarning, match="the batch was changed in place after it began"):
        trainer(guard_to(tmp_path)).fit(Changes({2: NAN}), data(4))
    trainer(guard_to(tmp_path)).fit(Poisoned({3: NAN}), data(4))
    changed, untouched = bundles_in(tmp_path / "bad")
    assert (changed.facts["batches"]["changed_in_place"], untouched.facts["batches"]["changed_in_place"]) == (True, False)


def test_the_number_of_bundles_is_capped_over_runs(trainer, tmp_path):
    with pytest.warns(UserWarning, match=r"holds 2 bundles \(max_bundles=2\).*training goes on") as caught:
        trainer(guard_to(tmp_path, max_bundles=2)).fit(Poisoned(dict.fromkeys((1, 3, 5, 7), NAN)), data())
    assert sum("max_bundles" in str(warning.message) for warning in caught) == 1
    assert [bundle.place["step"] for bundle in bundles_in(tmp_path / "bad")] == [1, 3], (
        "the first ones: later ones follow from them"
    )
    with pytest.warns(UserWarning, match="holds 2 bundles .*no more will be written"):
        trainer(guard_to(tmp_path, max_bundles=2)).fit(Poisoned({0: NAN}), data(2))
    assert len(bundles_in(tmp_path / "bad")) == 2


def test_their_size_is_capped_before_anything_is_written(trainer, tmp_path):
    guard = guard_to(tmp_path, max_bundle_bytes=60_000, weights="full")
    with pytest.warns(UserWarning, match=r"holds 0.0 MB, a further bundle takes 0.1 MB \(max_bundle_bytes=60000\)"):
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
    with pytest.raises(ValueError, match="`bundle_dir` must be a folder that can be written to, got .*bad"):
        trainer(guard_to(tmp_path)).fit(module, data())
    with pytest.raises(ValueError, match="`bundle_dir` must be a folder that can be written to"):
        trainer(NonFiniteGuard(bundle_dir="/proc/no/such")).fit(module, data())
    assert module.trainer.global_step == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weights": "all"}, "`weights` must be one of none, reference, full, got 'all'"),
        ({"max_bundles": 0}, "`max_bundles` must be a whole number of at least 1, got 0"),
        ({"max_bundle_bytes": -1.0}, "`max_bundle_bytes` must be above 0, got -1.0"),
    ],
)
def test_bad_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        NonFiniteGuard(bundle_dir="bad", **options)


def test_what_killed_runs_left_is_cleared_away_in_time(tmp_path):
    fresh, stale = tmp_path / ".unfinished-a", tmp_path / ".unfinished-b"
    for half in (fresh, stale):
        half.mkdir()
        (half / "batches.pt").write_text("half")
    os.utime(stale, (0, 0))
    BundleFolder(tmp_path, 1, 1.0).prepare()
    assert [path.name for path in tmp_path.iterdir()] == [".unfinished-a"], "another run may be writing that one"


FULL_DISK = """
import resource, signal, sys, warnings
import torch
from clip_callbacks import NonFiniteGuard
from tests.conftest import Poisoned, data, make_trainer
from torch import nn

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
module = Poisoned({1: float("nan"), 3: float("nan")}, net=nn.Sequential(nn.Linear(4, 20_000), nn.Linear(20_000, 1)))
guard = NonFiniteGuard(bundle_dir=sys.argv[1] + "/bad", weights="full")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    make_trainer(sys.argv[1], guard).fit(module, data(6))
told = [str(warning.message) for warning in caught if "cannot be written" in str(warning.message)]
assert len(told) == 1, told
assert "training goes on" in told[0]
print(told[0])
assert module.trainer.global_step == 6 and guard.skipped_steps == 2
assert all(parameter.isfinite().all() for parameter in module.parameters())
"""


def test_a_full_disk_costs_one_warning_and_leaves_no_half_bundle(tmp_path):
    """The kernel refuses to write more than 200 kB into a file: an error in the middle of ``torch.save``."""
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "File too large" in done.stdout
    assert list((tmp_path / "bad").iterdir()) == []


@pytest.fixture
def bundle(trainer, tmp_path):
    trainer(guard_to(tmp_path, weights="full")).fit(Poisoned({1: NAN}), data(3))
    (bundle,) = bundles_in(tmp_path / "bad")
    return bundle


def test_a_truncated_bundle_is_refused(bundle):
    file = bundle.path / "batches.pt"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UnusableBundleError, match=r"batches.pt must have \d+ bytes, got \d+: it is truncated or changed"):
        Bundle.read(bundle.path)
    file.unlink()
    with pytest.raises(UnusableBundleError, match=r"batches.pt is missing, or no file"):
        Bundle.read(bundle.path)


def test_a_tampered_bundle_is_refused(bundle):
    file = bundle.path / "weights.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UnusableBundleError, match=r"weights.pt is not as it was written"):
        Bundle.read(bundle.path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda text: text[:100], "bundle.json cannot be read"),
        (lambda text: text.replace('"format": 1', '"format": 7'), "must have the format 1, got 7"),
        (lambda text: "[]", "must have the format 1, got 'list'"),
        (lambda text: text.replace('"report"', '"other"'), "must tell of `report`, got None"),
        (lambda text: text.replace('"nonfinite"', '"unheard"', 1), "must tell of a `kind` among nonfinite, spike, got 'unheard'"),
        (lambda text: text.replace('"batches.pt"', '"../batches.pt"'), "must name files of its own folder"),
    ],
)
def test_a_broken_bundle_json_is_refused(bundle, change, match):
    file = bundle.path / "bundle.json"
    file.write_text(change(file.read_text()))
    with pytest.raises(UnusableBundleError, match=match):
        Bundle.read(bundle.path)


def test_what_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(UnusableBundleError, match="`bundle` must be a folder with a bundle.json"):
        Bundle.read(tmp_path)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/clip_callbacks_was_here",)


def test_a_strangers_bundle_cannot_run_code(bundle):
    trace = Path("/tmp/clip_callbacks_was_here")
    trace.unlink(missing_ok=True)
    for name, part in (("batches.pt", [{"batch": Evil(), "rng": {}}]), ("weights.pt", {"module": Evil()})):
        torch.save(part, bundle.path / name)
    (bundle.path / "optimizers.pt").write_bytes(pickle.dumps(Evil()))
    facts = json.loads((bundle.path / "bundle.json").read_text())
    written = BundleFolder(bundle.path.parent, 9, 1e9).write(
        "evil",
        {key: facts[key] for key in facts if key not in ("files", "missing")},
        {"batches.pt": [{"batch": Evil(), "rng": {}}], "weights.pt": {"module": Evil()}},
        {},
    )
    for load in (written.micro_batches, written.weights):
        with pytest.raises(UnusableBundleError, match="could run code, of posix.system"):
            load()
    assert Bundle.read(written.path).notes
    assert not trace.exists()


def rewritten(bundle, **parts):
    """The same bundle with other files of tensors, their hashes right."""
    facts = {key: value for key, value in bundle.facts.items() if key not in ("files", "missing")}
    return BundleFolder(bundle.path.parent, 99, 1e9).write("other", facts, {f"{name}.pt": part for name, part in parts.items()}, {})


def test_a_small_file_does_not_grow_in_memory(bundle):
    value = [torch.ones(1)]
    for _ in range(60):
        value = [value, value]
    row = {"batch": value, "batch_idx": 0, "loss": torch.ones(()), "rng": {}}
    (read,) = rewritten(bundle, batches=[row]).micro_batches()
    assert read["batch"][0] is read["batch"][1]
    other = rewritten(bundle, batches=[row])
    file = other.path / "batches.pt"
    with zipfile.ZipFile(file) as parts, zipfile.ZipFile(other.path / "packed", "w", zipfile.ZIP_DEFLATED) as packed:
        for part in parts.infolist():
            packed.writestr(part.filename, parts.read(part))
    (other.path / "packed").replace(file)
    with pytest.raises(UnusableBundleError, match=r"batches.pt must not be compressed"):
        other.micro_batches()


def test_links_pipes_and_long_names_are_refused(bundle):
    file = bundle.path / "weights.pt"
    file.rename(bundle.path.parent / "elsewhere")
    file.symlink_to(bundle.path.parent / "elsewhere")
    with pytest.raises(UnusableBundleError, match=r"weights.pt is missing, or no file"):
        Bundle.read(bundle.path)
    facts = bundle.path / "bundle.json"
    facts.write_text(facts.read_text().replace('"weights.pt": {', f'"{"w" * 300}": {{'))
    with pytest.raises(UnusableBundleError, match="w is missing, or no file"):
        Bundle.read(bundle.path)
    facts.unlink()
    os.mkfifo(facts)
    with pytest.raises(UnusableBundleError, match="bundle.json must be a file of up to 64 MB"):
        Bundle.read(bundle.path)


def test_arrays_in_named_tuples_come_back(trainer, tmp_path):
    batch = Pair(torch.ones(2, 4), np.ones((2, 1), np.float32))

    class Takes(Regression):
        def loss(self, batch, batch_idx):
            return nn.functional.mse_loss(self.net(batch.inputs), torch.as_tensor(batch.targets)) * NAN

    trainer(guard_to(tmp_path)).fit(Takes(), loader_of(batch))
    (row,) = bundles_in(tmp_path / "bad")[0].micro_batches(trust=[Pair])
    assert isinstance(row["batch"], Pair)
    np.testing.assert_array_equal(row["batch"].targets, batch.targets)


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


class SeldomSteps(LightningModule):
    """The second network does not step for long, and its gradients are cleared before each pass."""

    def __init__(self, *, clears):
        super().__init__()
        self.automatic_optimization, self.clears = False, clears
        self.first, self.second, self.batches, self.alive = nn.Linear(4, 1), nn.Linear(4, 1), [], []

    def training_step(self, batch, batch_idx):
        self.batches.append(weakref.ref(batch[0]))
        first, second = self.optimizers()
        first.zero_grad()
        if self.clears:
            second.zero_grad()
        loss = (self.first(batch[0]) + self.second(batch[0])).square().mean()
        self.manual_backward(loss * NAN if batch_idx == 39 else loss)
        first.step()
        if batch_idx == 39:
            second.step()
        self.alive.append(sum(batch() is not None for batch in self.batches))

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.01) for net in (self.first, self.second)]


@pytest.mark.parametrize(("clears", "most"), [(True, 3), (False, 18)])
def test_an_optimizer_that_seldom_steps_does_not_keep_every_batch(trainer, tmp_path, clears, most):
    module = SeldomSteps(clears=clears)
    trainer(guard_to(tmp_path)).fit(module, data(40))
    assert max(module.alive) <= most
    of_second = next(bundle for bundle in bundles_in(tmp_path / "bad") if bundle.place["optimizer"] == "SGD-1")
    assert [row["batch_idx"] for row in of_second.micro_batches()] == ([39] if clears else list(range(24, 40)))


def test_a_training_step_that_takes_the_iterator_leaves_no_wrong_batch(trainer, tmp_path):
    class Iterates(Regression):
        def training_step(self, dataloader_iter):
            batch, batch_idx, _ = next(dataloader_iter)
            loss = self.loss(batch, batch_idx)
            return loss * NAN if batch_idx == 3 else loss

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*dataloader_iter.*")
        trainer(guard_to(tmp_path)).fit(Iterates(), data(6))
    (bundle,) = bundles_in(tmp_path / "bad")
    with pytest.raises(UnusableBundleError, match="holds no batches: training_step takes the dataloader's iterator"):
        bundle.micro_batches()


def test_a_backward_pass_that_lightning_is_not_told_of_leaves_a_bundle_that_says_so(trainer, tmp_path):
    class ByItself(SeldomSteps):
        def manual_backward(self, loss):
            loss.backward()

    trainer(guard_to(tmp_path)).fit(ByItself(clears=True), data(40))
    bundles = bundles_in(tmp_path / "bad")
    assert bundles
    for bundle in bundles:
        with pytest.raises(UnusableBundleError, match=r"or calls loss.backward\(\) and not self.manual_backward"):
            bundle.micro_batches()


def test_random_numbers_are_those_of_the_closure_call_that_was_bad(trainer, tmp_path):
    class Noisy(Regression):
        calls = 0

        def loss(self, batch, batch_idx):
            self.calls += 1
            self.drawn = torch.rand(())
            loss = super().loss(batch, batch_idx)
            if self.calls == 3:
                self.bad = self.drawn
                return loss * NAN
            return loss

    module = Noisy(torch.optim.LBFGS, lr=0.1, max_iter=4)
    trainer(guard_to(tmp_path)).fit(module, data(1))
    (bundle,) = bundles_in(tmp_path / "bad")
    restore(bundle.micro_batches()[-1]["rng"], module)
    assert torch.equal(torch.rand(()), module.bad)


@dataclass
class Opaque:
    x: torch.Tensor


def test_views_in_named_tuples_are_written_small_and_those_in_other_objects_capped(trainer, tmp_path):
    large = torch.randn(1_000_000, 4)
    trainer(guard_to(tmp_path, max_bundle_bytes=1e5)).fit(Unsafe(), loader_of(Pair(large[:2], torch.ones(2, 1))))
    (bundle,) = bundles_in(tmp_path / "bad")
    assert (bundle.path / "batches.pt").stat().st_size < 20_000

    class Takes(Regression):
        def loss(self, batch, batch_idx):
            return self.net(batch.x).mean() * NAN

    with pytest.warns(UserWarning, match=r"a further bundle takes 16.0 MB \(max_bundle_bytes=100000\)"):
        trainer(guard_to(tmp_path, max_bundle_bytes=1e5)).fit(Takes(), loader_of(Opaque(large[:2])))
    assert len(bundles_in(tmp_path / "bad")) == 1


class Stubborn:
    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        raise self.error("not me")


@pytest.mark.parametrize("error", [RuntimeError, ValueError, NotImplementedError, KeyError])
def test_whatever_pickling_raises_costs_the_batch_alone(trainer, tmp_path, error):
    batch = {"x": torch.ones(2, 4), "y": torch.full((2, 1), NAN), "it": Stubborn(error)}
    trainer(guard_to(tmp_path)).fit(Views(), loader_of(batch))
    (bundle,) = bundles_in(tmp_path / "bad")
    assert "not me" in bundle.facts["missing"]["batches.pt"]


def test_odd_hyperparameters_sparse_and_lazy_tensors_are_no_obstacle(trainer, tmp_path):
    class Odd(Poisoned):
        def __init__(self):
            super().__init__({1: NAN})
            self.save_hyperparameters({"grid": {(1, 2): [torch.ones(1), {3}]}})
            self.register_buffer("sparse", torch.eye(3).to_sparse())
            self.unused = nn.LazyLinear(3)

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    trainer(guard_to(tmp_path)).fit(Odd(), data(3))
    (bundle,) = bundles_in(tmp_path / "bad")
    assert bundle.facts["module"]["hparams"] == {"grid": {"(1, 2)": ["tensor([1.])", "{3}"]}}
    assert "unused.weight" not in bundle.facts["module"]["state"]


def test_full_weights_are_written_before_other_optimizers_step(trainer, tmp_path):
    class Fused(SeldomSteps):
        def configure_optimizers(self):
            return [torch.optim.SGD(net.parameters(), lr=0.01, fused=True) for net in (self.first, self.second)]

    with pytest.raises(ValueError, match="`deferred` cannot be True here: bundles of the weights"):
        trainer(guard_to(tmp_path, deferred=True, weights="full")).fit(Fused(clears=True), data(2))


def test_the_folder_stays_where_it_was_when_the_process_goes_elsewhere(trainer, tmp_path, monkeypatch):
    class Wanders(Poisoned):
        def on_train_start(self):
            monkeypatch.chdir("/")

    monkeypatch.chdir(tmp_path)
    trainer(NonFiniteGuard(bundle_dir="bad")).fit(Wanders({1: NAN}), data(3))
    assert len(bundles_in(tmp_path / "bad")) == 1


class Configured(Poisoned):
    def __init__(self, size: float = 1.0):
        super().__init__({1: NAN})
        self.size = size

    def train_dataloader(self):
        return data(3, size=self.size)


def test_configuration_of_the_command_line_goes_along(tmp_path):
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    quiet = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
    guard = ["--trainer.callbacks+=clip_callbacks.NonFiniteGuard", f"--trainer.callbacks.bundle_dir={tmp_path / 'bad'}"]
    where = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}"]
    LightningCLI(Configured, args=["fit", "--model.size=2.5", *quiet, *where, *guard])
    (bundle,) = bundles_in(tmp_path / "bad")
    assert "size: 2.5" in (bundle.path / "config.yaml").read_text()


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "tp"])
def test_each_guilty_rank_writes_its_own_batch(run, tmp_path, name):
    run(name, guard_to(tmp_path), poison={(1, 3): NAN})
    (bundle,) = bundles_in(tmp_path / "bad")
    assert bundle.place == {"step": 3, "epoch": 0, "batch": 3, "rank": 1}
    assert bundle.facts["report"]["guilty_ranks"] == [1]
    (row,) = bundle.micro_batches()
    inputs, _ = row["batch"]
    share = parallel.BATCH // parallel.STRATEGIES[name][1]
    everything = parallel.rows(20).tensors[0][3 * parallel.BATCH : 4 * parallel.BATCH]
    assert len(inputs) == share
    theirs = everything if name == "tp" else everything[1::2]
    assert_same_bits([inputs], [theirs])
    assert bool(row["loss"].isnan())


def test_every_rank_writes_when_nobody_knows_whose_fault_a_spike_is(run, tmp_path):
    run("ddp", guard_to(tmp_path, skip_above=1e4), poison={(1, 5): 1e9})
    assert [bundle.place["rank"] for bundle in bundles_in(tmp_path / "bad")] == [0, 1]


def test_full_weights_of_shards_are_refused(run, tmp_path):
    with pytest.raises(RanksFailedError, match="`weights` must be .reference. or .none. with sharded parameters"):
        run("fsdp2", guard_to(tmp_path, weights="full"))
