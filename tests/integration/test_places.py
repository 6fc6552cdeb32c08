"""Where people work: every example that shows one place, run for real, its figures read back from what it logs."""

from __future__ import annotations

import ast
import csv
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule

from clip_callbacks import AccumulationRescaling, ClipRule, LabelTokens, QuantileLimit
from clip_callbacks.cli import main as clip_callbacks_command
from tests.helpers import forked
from tests.helpers.training import make_trainer

ROOT = Path(__file__).parents[2]


EXAMPLES = ROOT / "examples"
PLACES = ["distributed.py", "fabric.py", "gan.py", "hydra_template/train.py", "lightning_cli.py", "plain_loop.py", "transformer.py"]
AT_MOST = 1 + 1e-6
"""A clipped norm over its limit: norms are float32."""


def run(script, *arguments, cwd):
    """In a process of its own."""
    done = forked.run(EXAMPLES / script, *arguments, cwd=cwd, env={"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def printed(monkeypatch, capsys, tmp_path):
    """Run a script here; what its last line says, and the rows that it logged."""

    def run_here(script, *arguments, folder="logs"):
        monkeypatch.setattr(sys, "argv", [script, *arguments, "--poison", "--folder", str(tmp_path / folder)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return json.loads(capsys.readouterr().out.splitlines()[-1]), logged(tmp_path / folder)

    return run_here


def test_lightning_cli_takes_everything_from_yaml(tmp_path):
    config = ROOT / "configs" / "lightning_cli.yaml"
    run(
        "lightning_cli.py",
        "fit",
        "--config",
        config,
        "--trainer.callbacks.max_norm=0.5",
        "--trainer.enable_progress_bar=false",
        cwd=tmp_path,
    )
    rows = logged(tmp_path / "logs" / "lightning_cli" / "run")
    norms = [row for row in rows if row.get("grad/total_norm")]
    assert {float(row["grad/max_norm"]) for row in norms} == {0.5}, "the command line changes the callback that the YAML has"
    assert all(float(row["grad/clipped_norm"]) <= 0.5 * AT_MOST for row in norms)
    assert max(float(row["grad/total_norm"]) for row in norms) > 0.5
    assert float([row["val_accuracy"] for row in rows if row.get("val_accuracy")][-1]) > 0.9
    assert (tmp_path / "logs" / "bad_steps").is_dir()


class Fitted(LightningModule):
    """Takes one large step on the loss that a model of Hugging Face reckons itself."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def logged(folder):
    """Rows of the CSV file, without what is blank in them."""
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def of_steps(rows, suffix=""):
    return [row for row in rows if f"grad/clipped_norm{suffix}" in row]


def assert_clipped(rows, highest, suffix="", name=""):
    """Never above the limit, which is never above the highest; some steps were clipped, some were not."""
    prefix = f"grad/{name}/" if name else "grad/"
    steps = [row for row in rows if f"{prefix}clip_coef{suffix}" in row]
    for row in steps:
        assert row[f"grad/clipped_norm{suffix}"] <= row[f"{prefix}max_norm{suffix}"] * AT_MOST
        assert row[f"{prefix}max_norm{suffix}"] <= highest
    coefficients = [row[f"{prefix}clip_coef{suffix}"] for row in steps]
    assert min(coefficients) < 1.0
    assert max(coefficients) == 1.0


@pytest.mark.parametrize("place", PLACES)
def test_a_place_is_short_and_says_how_to_run_it(place):
    source = (EXAMPLES / place).read_text()
    assert len(source.splitlines()) < 80
    assert f"python examples/{place}" in ast.get_docstring(ast.parse(source))


def test_a_plain_loop(printed, tmp_path, capsys):
    last, rows = printed("plain_loop.py", "--steps", "30")
    assert len(rows) == 30
    assert_clipped(rows, 1.0)
    assert "grad/total_norm" not in rows[5]
    assert [row["grad/skipped_steps"] for row in rows] == [0.0] * 5 + [1.0] * 25
    assert last["grad/skipped_steps"] == 1
    assert last["train_loss"] < rows[0]["train_loss"]
    clip_callbacks_command(["suggest", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out)


def test_fabric(printed):
    _, rows = printed("fabric.py", "--steps", "20")
    assert_clipped(rows, 1.0)
    assert [row["grad/skipped_steps"] for row in rows] == [0.0] * 5 + [1.0] * 15
    _, full = printed("fabric.py", "--steps", "20", "--precision", "32-true", folder="full")
    assert rows[0]["train_loss"] != full[0]["train_loss"]
    assert rows[0]["train_loss"] == pytest.approx(full[0]["train_loss"], rel=1e-2), "of bf16, with 8 bits"


@pytest.mark.slow
@pytest.mark.ranks
def test_fabric_on_two_devices(tmp_path):
    out = run("fabric.py", "--steps", "12", "--poison", "--devices", "2", "--folder", tmp_path, cwd=tmp_path)
    assert json.loads(out.splitlines()[-1])["grad/skipped_steps"] == 1
    rows = logged(tmp_path)
    assert len(rows) == 12
    assert "grad/total_norm" not in rows[5]


@pytest.mark.filterwarnings("ignore:Non-finite gradients")
def test_a_gan(printed):
    last, rows = printed("gan.py", "--batches", "60")
    assert last["grad/skipped_steps-Adam"] == 1
    assert last["grad/skipped_steps-Adam-1"] == 0
    assert_clipped(rows, 0.5, "-Adam-1", "generator")
    assert {row["grad/generator/max_norm-Adam-1"] for row in of_steps(rows, "-Adam-1")} == {0.5}
    assert {row["grad/discriminator/max_norm-Adam"] for row in of_steps(rows, "-Adam")} == {1.0}
    assert {row["grad/accumulation_scale-Adam"] for row in of_steps(rows, "-Adam")} == {0.5}
    assert len(of_steps(rows, "-Adam")) == 29
    assert len(of_steps(rows, "-Adam-1")) == 30


def test_hydra_sweeps_over_a_limit(tmp_path):
    quick = ["trainer.max_epochs=1", "trainer.log_every_n_steps=1", "data.train_batches=8", "hydra.sweep.subdir=${hydra.job.num}"]
    run("hydra_template/train.py", "-m", "callbacks.clip.max_norm=0.05,0.2", *quick, f"hydra.sweep.dir={tmp_path}", cwd=tmp_path)
    for number, max_norm in enumerate((0.05, 0.2)):
        rows = of_steps(logged(tmp_path / str(number)))
        assert [row["grad/max_norm"] for row in rows] == pytest.approx([max_norm] * 8)
        assert max(row["grad/clipped_norm"] for row in rows) == pytest.approx(max_norm, rel=1e-4)  # 1e-6 is added to the norm


def test_hydra_files_of_callbacks(monkeypatch):
    import hydra

    with hydra.initialize_config_dir(str(EXAMPLES / "hydra_template/configs"), version_base="1.3"):
        config = hydra.compose("train.yaml", ["callbacks=local_norms", "callbacks.clip.rules.0.max_norm=0.5"])
        assert not hydra.compose("train.yaml", ["callbacks=none", "model=gru", "logger=tensorboard"]).callbacks
    clipping = hydra.utils.instantiate(config.callbacks.clip)
    assert clipping.rules == [ClipRule(0.5), ClipRule(QuantileLimit(0.9), "parameter", include="^encoder", name="encoder")]


@pytest.mark.filterwarnings("ignore:Non-finite gradients")
def test_a_transformer_of_hugging_face(printed):
    pytest.importorskip("transformers")
    last, rows = printed("transformer.py", "--batches", "20")
    steps = of_steps(rows)
    assert len(steps) == 9
    assert last["grad/skipped_steps"] == 1
    assert all(row["grad/clipped_norm"] <= AT_MOST for row in steps)
    assert any(row["grad/accumulation_scale"] != 1.0 for row in steps), "micro-batches hold unequal numbers of tokens"
    embeddings = [row.get("grad_norm/model.transformer.wte", 0.0) for row in steps]
    assert embeddings[:4] == [0.0] * 4, "frozen in the first epoch"
    assert min(embeddings[4:]) > 0.0


@pytest.mark.parametrize("container", ["dict", "BatchEncoding"])
def test_batches_of_hugging_face_are_weighted_by_their_labels(tmp_path, container):
    """A step on two padded micro-batches is that on the one large batch."""
    transformers = pytest.importorskip("transformers")
    make = dict if container == "dict" else transformers.BatchEncoding
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=8, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    labels = torch.randint(64, (6, 8))
    labels[:3, 2:] = -100
    large = make({"input_ids": labels.clamp(min=0), "labels": labels})
    halves = [make({name: tensor[rows] for name, tensor in large.items()}) for rows in (slice(3), slice(3, 6))]
    assert LabelTokens("labels", shifted=True)(halves[0]) == 3

    ends = []
    for batches in ([large], halves):
        torch.manual_seed(0)
        module = Fitted(transformers.GPT2LMHeadModel(config))
        rescaling = AccumulationRescaling(LabelTokens("labels", shifted=True))
        trainer = make_trainer(tmp_path, rescaling, accumulate_grad_batches=len(batches))
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
        ends.append([parameter.detach() for parameter in module.parameters()])
    torch.testing.assert_close(*ends)
