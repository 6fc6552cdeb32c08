"""Bundles that were made to do harm: they are refused in one line or replayed, but run no code and crash nothing."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from clip_callbacks import Bundles, NonFiniteGuard
from clip_callbacks.bundles.bundle import BATCHES, FACTS, OPTIMIZERS, WEIGHTS
from clip_callbacks.bundles.terminal import escaped
from clip_callbacks.cli import main
from tests.helpers.matrix import EVERY_CELL
from tests.helpers.replaying import Net, config, refused, rewrite, samples

pytestmark = pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning")

REPRODUCED = "Reproduced: a loss or gradient is non-finite again."
EVIL = f"\x1b[2J\x07x\n{REPRODUCED}\ud800\u202e"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    from lightning.pytorch import Trainer

    folder, inputs = tmp_path_factory.mktemp("bundle"), samples(8)
    inputs[5, 3] = 0
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary"), False)
    fit = Trainer(callbacks=[NonFiniteGuard(bundles=Bundles(folder, weights="full"))], max_epochs=1, accelerator="cpu", **quiet)
    fit.fit(Net("log"), DataLoader(TensorDataset(inputs), batch_size=4))
    (bundle,) = folder.iterdir()
    return bundle


@pytest.fixture
def bundle(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def patch(bundle, key, value):
    facts = json.loads((bundle / FACTS).read_text())
    *way, last = key.split(".")
    table = facts
    for part in way:
        table = table[part]
    table[last] = value
    (bundle / FACTS).write_text(json.dumps(facts))


PLACES = ["report.step", "report.batch", "report.rank", "versions.torch", "module.class", "module.script", "trainer.device"]


@pytest.mark.parametrize("key", [*PLACES, "missing"])
def test_escape_sequences_of_a_bundle_are_shown_not_obeyed(bundle, tmp_path, capsys, key):
    patch(bundle, key, {EVIL: EVIL} if key == "missing" else EVIL)
    capsys.readouterr()
    assert main(["replay", str(bundle), *config(tmp_path, Net, kind="log")]) == 0
    said = capsys.readouterr()
    text = said.out + said.err
    assert not set(text) & set("\x1b\x07\u202e\ud800")
    assert text.splitlines().count(REPRODUCED) == 1, "no line of the bundle's own"


def test_escape_sequences_in_errors_are_shown_not_obeyed(bundle, tmp_path, capsys):
    patch(bundle, "module.state", {EVIL: ["float32", [1]]})
    assert f"(\\x1b[2J\\x07x {REPRODUCED}\\ud800\\u202e)" in refused(capsys, bundle, *config(tmp_path, Net, kind="log"))
    assert escaped("größer → 3") == "größer → 3"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in ("trainer.global_step", "report.epoch", "optimizer") for value in ("3", -1, 1e30, None, 2**80)),
        ("trainer.precision", ["x"] * 1000),
        ("module.class", "x" * 10_000),
        ("report.step", list(range(10_000))),
        ("trainer.loss_scale", "x"),
        ("trainer.max_steps", math.inf),
        ("trainer.accumulate_grad_batches", {}),
        ("module.state", []),
        ("report", {}),
    ],
)
def test_facts_of_another_kind_are_refused_in_one_short_line(bundle, tmp_path, capsys, key, value):
    patch(bundle, key, value)
    line = refused(capsys, bundle, *config(tmp_path, Net, kind="log"))
    assert f"{FACTS} must describe the step, the Trainer and the module" in line
    assert len(line) < 600


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": 1, "report": 1e999}', "\x00"])
def test_json_that_is_none_or_too_deep_is_refused(bundle, tmp_path, capsys, text):
    (bundle / FACTS).write_text(text)
    assert FACTS in refused(capsys, bundle, *config(tmp_path, Net, kind="log"))


def test_batches_of_another_structure_are_refused(bundle, tmp_path, capsys):
    (row,), good = torch.load(bundle / BATCHES, weights_only=True), config(tmp_path, Net, kind="log")
    rng = row["rng"]
    structures = [
        *(None, {"a": 1}, [1], [row, [row]], torch.zeros(3)),
        *([{key: value for key, value in row.items() if key != missing}] for missing in ("batch", "batch_idx", "rng")),
        *([row | {"loss": loss}] for loss in ("x", 1.0, torch.zeros(3))),
        *([row | {"batch_idx": number}] for number in ("2", -1, torch.zeros(1), None)),
        [row | {"rng": None}],
    ]
    for content in structures[:: 1 if EVERY_CELL else 8]:
        rewrite(bundle, BATCHES, content)
        assert "must hold a list of micro-batches with batch, batch_idx, loss and rng, got a" in refused(capsys, bundle, *good)
    for array in ({"clip_callbacks.ndarray": 3, "scalar": False}, {"clip_callbacks.ndarray": torch.zeros(2)}):
        rewrite(bundle, BATCHES, [row | {"batch": array}])
        assert "batches.pt cannot be read: " in refused(capsys, bundle, *good)
    huge = (3, (2**70,) * 625, None)
    wrong = [{}, rng | {"torch": rng["torch"][:9]}, rng | {"python": huge}, rng | {"numpy": 3}, rng | {"generators": 3}]
    for states in wrong[:: 1 if EVERY_CELL else 4]:
        rewrite(bundle, BATCHES, [row | {"rng": states}])
        assert "`rng` in the bundle must hold the states of random number generators, got " in refused(capsys, bundle, *good)


def test_weights_and_optimizers_of_another_structure_are_refused(bundle, tmp_path, capsys):
    good = config(tmp_path, Net, kind="log")
    state = torch.load(bundle / WEIGHTS, weights_only=True)["module"]
    for content in (None, [], {}, {"module": None}, {"module": [1]})[:: 1 if EVERY_CELL else 4]:
        rewrite(bundle, WEIGHTS, content)
        assert "must hold the module's state_dict under `module`, got a" in refused(capsys, bundle, *good)
    for dtype in (torch.int64, torch.complex64):
        rewrite(bundle, WEIGHTS, {"module": {name: value.to(dtype) for name, value in state.items()}})
        assert f"got net.1.weight {dtype} instead of torch.float32" in refused(capsys, bundle, *good)
    rewrite(bundle, WEIGHTS, {"module": {3: torch.zeros(1)}})
    assert "must be a state_dict with names as keys, got [3]" in refused(capsys, bundle, *good)
    rewrite(bundle, WEIGHTS, {"module": state})
    for content in (None, 3, {"a": 1}, [3])[:: 1 if EVERY_CELL else 3]:
        rewrite(bundle, OPTIMIZERS, content)
        assert "must hold a list of state_dicts, got a" in refused(capsys, bundle, *good)
    rewrite(bundle, OPTIMIZERS, "hello")
    assert "optimizers.pt cannot be read as torch.save writes it: " in refused(capsys, bundle, *good)


def test_a_reference_that_is_no_path_is_refused(bundle, tmp_path, capsys):
    facts = json.loads((bundle / FACTS).read_text())
    del facts["files"][WEIGHTS]
    for path in (3, ["x"]):
        (bundle / FACTS).write_text(json.dumps(facts | {"weights": {"checkpoint": path}}))
        assert "must be a path, got " in refused(capsys, bundle, *config(tmp_path, Net, kind="log"))


def test_the_folder_of_bundles_or_a_file_of_one_is_refused_with_a_hint(written, tmp_path, capsys):
    good = config(tmp_path, Net, kind="log")
    assert f"which holds 1 bundle: name one, such as {written}" in refused(capsys, written.parent, *good)
    assert "`bundle` must be a folder with a bundle.json, got " in refused(capsys, written / FACTS, *good)


@pytest.mark.parametrize("name", ["", ".", "..x", "zz", "nowhere.Class", "os.path"])
def test_trust_in_what_cannot_be_imported_is_refused(written, tmp_path, capsys, name):
    assert "`--trust` must be a class" in refused(capsys, written, *config(tmp_path, Net, kind="log"), "--trust", name)


def test_trust_in_a_module_that_raises_is_refused_with_the_place(written, tmp_path, capsys, monkeypatch):
    (tmp_path / "raising_at_import.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    line = refused(capsys, written, *config(tmp_path, Net, kind="log"), "--trust", "raising_at_import.Class")
    assert "importing raising_at_import raised ZeroDivisionError" in line
    assert "raising_at_import.py, line 1)" in line


def test_a_replay_writes_nothing_into_the_bundle(bundle, tmp_path, capsys):
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in bundle.iterdir()}
    assert main(["replay", str(bundle), *config(tmp_path, Net, kind="log"), "--bisect", "--detect-anomaly"]) == 0
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in bundle.iterdir()} == before
