"""Bundles that were truncated, tampered with, or made to do harm."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from clip_callbacks.bundles.bundle import Bundle, UnusableBundleError
from clip_callbacks.bundles.folder import BundleFolder

pytestmark = [
    pytest.mark.filterwarnings("ignore:Non-finite gradients:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Spike at:RuntimeWarning"),
]


def test_a_truncated_bundle_is_refused(bundle):
    file = bundle.path / "batches.pt"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UnusableBundleError, match=r"batches.pt must have \d+ bytes, got \d+: it is truncated or changed"):
        Bundle.read(bundle.path)
    file.unlink()
    with pytest.raises(UnusableBundleError, match=r"batches.pt must be a regular file, got a link, a folder or nothing"):
        Bundle.read(bundle.path)


def test_a_tampered_bundle_is_refused(bundle):
    file = bundle.path / "weights.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UnusableBundleError, match=r"weights.pt must have the SHA-256 hash that bundle.json records"):
        Bundle.read(bundle.path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda text: text[:100], "bundle.json cannot be read"),
        (lambda text: text.replace('"format": 1', '"format": 7'), "must have the format 1, got 7"),
        (lambda text: "[]", "must have the format 1, got 'list'"),
        (lambda text: text.replace('"report"', '"other"'), "must hold an object `report`, got None"),
        (lambda text: text.replace('"nonfinite"', '"unheard"', 1), "must hold a `kind` among nonfinite, spike, got 'unheard'"),
        (lambda text: text.replace('"batches.pt"', '"../batches.pt"'), "must name files in its own folder only"),
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
    """Write a copy of a bundle with other files of tensors and matching hashes."""
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
    with pytest.raises(UnusableBundleError, match=r"weights.pt must be a regular file, got a link, a folder or nothing"):
        Bundle.read(bundle.path)
    facts = bundle.path / "bundle.json"
    facts.write_text(facts.read_text().replace('"weights.pt": {', f'"{"w" * 300}": {{'))
    with pytest.raises(UnusableBundleError, match="w must be a regular file, got a link, a folder or nothing"):
        Bundle.read(bundle.path)
    facts.unlink()
    os.mkfifo(facts)
    with pytest.raises(UnusableBundleError, match="bundle.json must be a regular file of at most 64 MB"):
        Bundle.read(bundle.path)
