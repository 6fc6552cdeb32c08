"""Every block of code in README.md and docs/ does what it says, and every link leads somewhere."""

from __future__ import annotations

import argparse
import ast
import builtins
import inspect
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import MixedPrecision
from markdown_it import MarkdownIt
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import clip_callbacks
from clip_callbacks import cli
from clip_callbacks.core import metric_names
from clip_callbacks.guard.restore import RESOURCES
from docs.hooks.reference import MEMBERS, reference_pages

ROOT = Path(__file__).parents[2]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

ONLY_COMPILED = {
    "docs/distributed.md": ("DeepSpeedStrategy",),  # in an environment of its own
    "docs/llm.md": ("ModelParallelStrategy",),  # eight GPUs
    "docs/resume.md": ("ddp_fork",),  # would fork the tests; Lightning does not bring global_step back
}
"""Blocks that are not run, by a name in them: they are compiled, their imports resolved, their callbacks made."""

IN_OTHER_PACKAGES = ROOT / "docs/in_other_packages.md"
"""Its blocks use packages that are not installed here: they are compiled, their callbacks made."""

PLACEHOLDERS = {
    "a": 1.0,
    "b": 2.0,
    "c": 1.0,
    "max_norm": 1.0,
    "limit": clip_callbacks.FixedLimit(1.0),
    "start": 2.0,
    "end": 1.0,
    "steps": 10,
}
"""What code within lines leaves to the reader."""


@dataclass(frozen=True)
class Block:
    """A fenced block: where, in which language, and what."""

    page: str
    line: int
    language: str
    source: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(path: Path) -> Iterator[Block]:
    for token in MarkdownIt("commonmark").parse(path.read_text(encoding="utf-8")):
        if token.type == "fence":
            yield Block(path.relative_to(ROOT).as_posix(), token.map[0] + 1, token.info.strip(), token.content)


BLOCKS = [block for path in PAGES for block in blocks(path)]


def of(language: str) -> Any:
    return pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == language], ids=str)


def test_there_is_no_block_in_a_language_that_nothing_checks():
    assert {block.language for block in BLOCKS} <= {"python", "yaml", "console", "math"}
    assert sum(block.language == "python" for block in BLOCKS) > 40


# Python


class Tokens(LightningModule):
    """What a reader has: a model with an encoder and a decoder, batches with labels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.head = nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 8)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        logits = self.head(torch.tanh(self.decoder(self.encoder(batch["inputs"]))))
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def token_batches() -> DataLoader[Any]:
    inputs, labels = torch.randint(8, (40, 6)), torch.randint(8, (40, 6))
    labels[::3, 4:] = -100
    return DataLoader([{"inputs": i, "labels": j} for i, j in zip(inputs, labels, strict=True)], batch_size=4)


@pytest.fixture
def scope(tmp_path, monkeypatch):
    """What is in scope of every block: the package, the usual imports, a small model with data; and a Trainer on a CPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIP_CALLBACKS_INJECT", "1")
    mixed = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))

    class SmallTrainer(Trainer):
        def __init__(self, *, precision: Any = "32-true", **options: Any) -> None:
            quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
            precise = {"plugins": [mixed]} if precision == "16-mixed" else {"precision": precision}
            super().__init__(**(quiet | options | precise | {"accelerator": "cpu", "max_epochs": 1}))

    monkeypatch.setattr(lightning.pytorch, "Trainer", SmallTrainer)
    public = {name: getattr(clip_callbacks, name) for name in clip_callbacks.__all__}
    usual = {"torch": torch, "nn": nn, "DataLoader": DataLoader, "TensorDataset": TensorDataset, "LightningModule": LightningModule}
    net, pairs = nn.Linear(4, 1), [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(8)]
    ours = {"Trainer": SmallTrainer, "model": Tokens(), "loader": token_batches(), "net": net, "pairs": pairs}
    ours |= dict(zip(("inputs", "targets"), pairs[0], strict=True))
    return public | usual | ours | {"clip_callbacks": clip_callbacks}


def test_fits_of_a_class_on_a_page_end():
    """The Trainer of these tests ends after one epoch, that of a reader after a thousand."""
    fits = [block for block in BLOCKS if block.language == "python" and "class " in block.source and ".fit(" in block.source]
    assert len(fits) > 6
    assert [str(block) for block in fits if "max_epochs=1" not in block.source] == []


@pytest.mark.parametrize(("windows", "good_steps"), [(1, [1, 2, 3, 4, 5, 7, 8, 9, 10]), (4, [1, 3])])
@pytest.mark.filterwarnings("ignore:Non-finite gradients at step")
def test_an_average_takes_each_good_step_once(windows, good_steps, scope):
    class Poisoned(Tokens):
        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) * (torch.nan if batch_idx == 5 else 1.0)

    (block,) = [block for block in BLOCKS if "class Average" in block.source]
    names = scope | {"averaged": []}
    exec(block.source.replace("...", "averaged.append(trainer.global_step)"), names)
    guard = clip_callbacks.NonFiniteGuard()
    callbacks = [guard, names["Average"](guard)]
    trainer = scope["Trainer"](accumulate_grad_batches=windows, callbacks=callbacks)
    trainer.fit(Poisoned(), scope["loader"])
    assert names["averaged"] == good_steps


def is_only_compiled(block: Block) -> bool:
    return any(word in block.source for word in ONLY_COMPILED.get(block.page, ()))


@of("python")
@pytest.mark.filterwarnings("ignore:Non-finite gradients at step")  # of the rehearsal
def test_python_runs(block, scope):
    code = compile(block.source, str(block), "exec")
    if ROOT / block.page == IN_OTHER_PACKAGES:
        assert make_callbacks(block.source, scope) or "Distribution" in block.source or "clip_" in block.source
        return
    if is_only_compiled(block):
        check_names(block.source, scope)
        return
    exec(code, scope)
    trainer = scope.get("trainer")
    if trainer is not None and trainer.state.fn is None:
        trainer.fit(scope["model"], scope["loader"])
    if trainer is not None:
        assert trainer.global_step > 0


def check_names(source: str, scope: dict[str, Any]) -> None:
    """Imports are done, every other name is known, and callbacks in the source can be made."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            exec(compile(ast.Module([node], []), "imports", "exec"), scope)
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            assert node.id in scope or node.id in stored or hasattr(builtins, node.id), node.id
    make_callbacks(source, scope)


def make_callbacks(source: str, scope: dict[str, Any]) -> list[Any]:
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    callbacks = [call for call in calls if isinstance(getattr(clip_callbacks, call.func.id, None), type)]
    return [eval(compile(ast.Expression(call), "callback", "eval"), scope) for call in callbacks]


def test_every_package_is_told_of_with_the_version_that_is_tested():
    told = IN_OTHER_PACKAGES.read_text()
    pinned = [path.read_text().partition("\n")[0].split("==") for path in (ROOT / "tests/clients/requirements").glob("*.txt")]
    assert len(pinned) >= 8
    for package, version in pinned:
        name = package.replace("_", "-")
        assert f"| [{name}](#{name}) | {version} |" in told
        assert f"\n## {name}\n" in told


def test_what_is_only_compiled_is_there():
    found = {(block.page, word) for block in BLOCKS for word in ONLY_COMPILED.get(block.page, ()) if word in block.source}
    assert found == {(page, word) for page, words in ONLY_COMPILED.items() for word in words}


def expressions(path: Path) -> Iterator[str]:
    """Code within lines and tables that can be pasted: calls of public names, with nothing left out."""
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8")):
        for child in token.children or ():
            if child.type == "code_inline" and "…" not in child.content:
                code = f"GradientClipping({child.content})" if child.content.startswith("rules=") else child.content
                with suppress(SyntaxError):
                    if set(called(ast.parse(code, mode="eval"))) & set(clip_callbacks.__all__):
                        yield code


def called(tree: ast.AST) -> list[str]:
    return [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_code_within_lines_can_be_evaluated(path, scope):
    scope |= PLACEHOLDERS | {"optimizer": torch.optim.SGD(scope["net"].parameters()), "state": None}
    scope["table"] = clip_callbacks.ParameterTable(scope["optimizer"])
    for code in expressions(path):
        assert eval(code, scope) is not None, code


# YAML


@of("yaml")
def test_yaml_is_parsed_by_the_cli(block, tmp_path, monkeypatch):
    import hydra
    from omegaconf import OmegaConf

    monkeypatch.chdir(tmp_path)
    written = yaml.safe_load(block.source)
    if "_target_" in block.source:
        callbacks = hydra.utils.instantiate(OmegaConf.create(written)["trainer"]).callbacks
    else:
        Path("config.yaml").write_text(block.source)
        callbacks = parsed("--config=config.yaml").trainer.callbacks
    named = [entry["class_path"].rpartition(".")[2] for entry in written["trainer"]["callbacks"]]
    assert [type(callback).__name__ for callback in callbacks if type(callback).__module__.startswith("clip_callbacks")] == named


def parsed(*arguments: str, model: type[LightningModule] = BoringModel, datamodule: Any = None) -> LightningCLI:
    quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    return LightningCLI(model, datamodule, run=False, save_config_callback=None, args=[*quiet, *arguments])


# Consoles


def command_lines(source: str) -> list[list[str]]:
    """Commands as words: comments and what they print dropped, continued lines joined."""
    lines = source.replace("\\\n", " ").replace("\n    ", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def commands() -> dict[str, argparse.ArgumentParser]:
    parser = cli._parser()
    return next(action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))


@of("console")
def test_commands_and_their_options_exist(block, monkeypatch, capsys):
    for words in command_lines(block.source):
        check_command(words, monkeypatch, capsys)


def check_command(words: list[str], monkeypatch: Any, capsys: Any) -> None:
    program, *arguments = words
    if program == "make":
        rules = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(rules)
    elif program == "pip":
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        for wanted in re.findall(r"\[(.*)\]", " ".join(arguments)):
            assert set(wanted.split(",")) <= set(extras)
    elif program == "clip-callbacks":
        known = commands()[arguments[0]]
        if any(word.startswith("[") for word in arguments):  # a synopsis
            assert {word.strip("[]") for word in arguments if word.lstrip("[").startswith("-")} <= set(known._option_string_actions)
        else:
            known.parse_args(arguments[1:])
    elif program in {"python", "torchrun"}:
        check_script(arguments, monkeypatch, capsys)
    else:
        raise AssertionError(f"nothing knows how to check {program!r}")


def check_script(arguments: list[str], monkeypatch: Any, capsys: Any) -> None:
    """A script that is there takes these options: by LightningCLI, or by name in its source."""
    script = next(word for word in arguments if word.endswith(".py"))
    options = arguments[arguments.index(script) + 1 :]
    if options[:1] == ["fit"]:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [script])
        monkeypatch.syspath_prepend(str(ROOT / "examples"))
        from char_rnn import CharRNN, StdlibText

        known = {"model": CharRNN, "datamodule": StdlibText} if script == "examples/char_rnn.py" else {}
        options = [word.replace("--poison", "--data.poison") for word in options[1:]]  # what examples/char_rnn.py links
        if any(word.startswith("--print_config") for word in options):
            with pytest.raises(SystemExit) as caught:
                parsed(*options, **known)
            assert caught.value.code in {0, None}
            assert "GradientClipping" in capsys.readouterr().out
        else:
            assert any(isinstance(callback, Callback) for callback in parsed(*options, **known).trainer.callbacks)
    else:
        source = (ROOT / script).read_text()
        for option in [word for word in options if word.startswith("--")]:
            assert f'"{option}"' in source, option


# Links, and what the reference has


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8")):
        for child in token.children or ():
            link = str(child.attrs.get("href") or child.attrs.get("src") or "").partition("#")[0]
            if link and ":" not in link:
                assert (path.parent / link).exists(), link


def test_every_metric_is_explained():
    told = (ROOT / "docs/metrics.md").read_text()
    names = [value for name, value in vars(metric_names).items() if name.isupper() and isinstance(value, str) and "/" in value]
    assert len(names) > 15
    for name in names:
        last = name.rpartition("/")[2] or name
        assert (last if "{}" not in last else name.format("<limit>")) in told, name


def test_the_readme_is_read_in_five_minutes():
    """At most a hundred lines and 900 words: what needs more room has a page of its own."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 100
    assert len(text.split()) <= 900
    assert [line for line in text.splitlines() if len(line) > 100 and not line.startswith("!")] == []


def test_examples_are_all_told_of():
    told = (ROOT / "docs/examples.md").read_text()
    scripts = [path for path in sorted((ROOT / "examples").glob("*.py")) if 'if __name__ == "__main__"' in path.read_text()]
    assert len(scripts) >= 3
    for path in scripts:
        assert f"../examples/{path.name}" in told


def test_the_navigation_has_every_page():
    class Loader(yaml.SafeLoader):
        """Takes what mkdocs' own loader takes."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda loader, suffix, node: suffix)
    navigation = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]
    told = str(navigation)
    for path in PAGES[1:]:
        assert f"'{path.name}'" in told


def test_the_reference_has_every_public_name():
    pages = dict(reference_pages())
    for name in clip_callbacks.__all__:
        assert sum(f"::: clip_callbacks.{name}\n" in page for page in pages.values()) == 1
    assert all("::: clip_callbacks." in page for path, page in pages.items() if path != "reference/command_line.md")
    for name, members in MEMBERS.items():
        assert all(inspect.getdoc(getattr(getattr(clip_callbacks, name), member)) for member in members)


def test_each_line_about_skipped_steps_is_held_by_a_test():
    rows = [line.strip("|").split("|") for line in (ROOT / "docs/skipped_steps.md").read_text("utf-8").splitlines() if "|" in line]
    named = [row[-1].strip().strip("`") for row in rows[2:]]
    assert named.count("") == 1, "what goes on needs no test"
    for place in filter(None, named):
        path, _, test = place.partition("::")
        assert f"\ndef {test}(" in (ROOT / "tests" / path).read_text("utf-8"), place


def test_each_kind_of_state_that_is_put_back_has_a_line_about_it():
    text = (ROOT / "docs/skipped_steps.md").read_text("utf-8")
    words = {
        "written_buffers": "buffers that a forward pass writes to",
        "rewritten_parameters": "parameters that a forward pass rewrites",
        "line_searches": "LBFGS's line search",
        "optimizer_bookkeeping": "counts in `param_groups`",
        "held_schedules": "step-interval schedules",
        "averages": "WeightAveraging",
    }
    assert {make.__name__ for make in RESOURCES} == words.keys()
    assert all(word in text for word in words.values())
