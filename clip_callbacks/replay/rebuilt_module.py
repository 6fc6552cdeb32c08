"""From the user's configuration, and script, to the module as LightningCLI makes it; the script's own run does not begin."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from clip_callbacks.replay.errors import UnusableReplayError
from clip_callbacks.replay.suppressed_output import silenced

_KEPT = ("deterministic", "benchmark")
_QUIET: dict[str, Any] = {
    "logger": False,
    "callbacks": None,
    "plugins": None,
    "profiler": None,
    "strategy": "auto",
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "precision": None,
    "fast_dev_run": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "barebones": False,
}
"""What a Trainer is made of whose only use is that scripts may look at it: nothing that writes, waits or starts."""


@dataclass(frozen=True)
class Rebuilt:
    """What came of the configuration.

    Args:
        module: With the weights that the configuration gives.
        trainer: Of the Trainer's options those that change numbers.
        seed: Which ``seed_everything`` was called with, if it was.
    """

    module: LightningModule
    trainer: dict[str, Any] = field(default_factory=dict)
    seed: int | bool | None = None


class _BuiltError(BaseException):
    """Ends a script as soon as its LightningCLI has made the module; no error, and not to be caught by scripts."""


@contextmanager
def rebuilt(configs: Sequence[Path], script: Path | None, recorded_script: str = "") -> Iterator[Rebuilt]:
    """Make the module; while this is entered, what a script defines is importable as from ``__main__``.

    Args:
        configs: The files for ``--config``, in order.
        script: Whose ``LightningCLI(...)`` takes them; None: LightningCLI's own, for configurations with a ``class_path``.
        recorded_script: What the bundle says was run, as a hint.

    Raises:
        UnusableReplayError: If no module comes of it.
    """
    sections = [_section(path) for path in configs]
    if script is None and not any(_names_class(section) for section in sections):
        hint = f" (the bundle was made by {recorded_script})" if recorded_script else ""
        raise UnusableReplayError(
            f"`--config` must name the module's class (model: {{class_path: ...}}), got {', '.join(map(str, configs))}; "
            f"or give the script whose LightningCLI knows it: --script main.py{hint}"
        )
    if script is not None and not script.is_file():
        raise UnusableReplayError(f"`--script` must be a file, got {script}.")
    whole = [part for path, section in zip(configs, sections, strict=True) if "fit" in section for part in ("--config", str(path))]
    parts = [
        part for path, section in zip(configs, sections, strict=True) if "fit" not in section for part in ("--config", str(path))
    ]
    with _as_main(script) as main:
        yield _build(main, script, whole, parts, recorded_script)


def _section(path: Path) -> Mapping[str, Any]:
    """What a file holds; if it cannot be read as YAML, LightningCLI will say so."""
    import yaml

    if not path.is_file():
        raise UnusableReplayError(f"`--config` must be a file, got {path}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UnusableReplayError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UnusableReplayError(f"{path} must hold a configuration of LightningCLI, got {type(content).__name__}.")
    return content


def _names_class(section: Mapping[str, Any]) -> bool:
    model = (section.get("fit") or section).get("model")
    return isinstance(model, str) or (isinstance(model, Mapping) and "class_path" in model)


@contextmanager
def _as_main(script: Path | None) -> Iterator[types.ModuleType]:
    """Stand in as the process's main module, with the path and the arguments that it would have."""
    main = types.ModuleType("__main__")
    kept = sys.modules["__main__"], sys.argv, list(sys.path)
    if script is None:
        sys.argv, folder = ["clip-callbacks"], Path.cwd()
    else:
        main.__file__ = str(script)
        sys.argv, folder = [str(script)], script.resolve().parent
        sys.modules["__main__"] = main
    sys.path.insert(0, str(folder))
    try:
        yield main
    finally:
        sys.modules["__main__"], sys.argv, sys.path[:] = kept


def _build(
    main: types.ModuleType, script: Path | None, whole: Sequence[str], parts: Sequence[str], recorded_script: str
) -> Rebuilt:
    from lightning.pytorch.cli import _JSONARGPARSE_SIGNATURES_AVAILABLE, LightningCLI

    if not _JSONARGPARSE_SIGNATURES_AVAILABLE:  # else it is missed only when the script makes its LightningCLI
        raise ModuleNotFoundError("LightningCLI needs jsonargparse[signatures], which is missing, or too old")
    made: list[Rebuilt] = []
    complaints = io.StringIO()
    with _intercepted(LightningCLI, whole, parts, made), silenced():
        try:
            with contextlib.redirect_stderr(complaints), contextlib.redirect_stdout(complaints):
                if script is None:
                    LightningCLI()
                else:
                    exec(compile(script.read_bytes(), str(script), "exec"), main.__dict__)
        except _BuiltError:
            pass
        except SystemExit:
            if not made:
                hint = f"; if {recorded_script} adds arguments or links, give it too: --script" if script is None else ""
                raise UnusableReplayError(f"LightningCLI refused the configuration: {_last(complaints.getvalue())}{hint}") from None
        except Exception as error:
            raise UnusableReplayError.of(str(script or "LightningCLI"), error) from error
    if not made:
        raise UnusableReplayError(f"`--script` must be one that makes a LightningCLI when it is run, got {script}.")
    return made[0]


@contextmanager
def _intercepted(cli_class: Any, whole: Sequence[str], parts: Sequence[str], made: list[Rebuilt]) -> Iterator[None]:
    """Have LightningCLI, whoever derives from it, take our arguments, and stop as soon as the module is there.

    Args:
        cli_class: LightningCLI.
        whole: Arguments that stand before the subcommand: configurations with a section for it.
        parts: Those behind it.
        made: Where the module goes.
    """
    begin, instantiate, run = cli_class.__init__, cli_class.instantiate_classes, cli_class._run_subcommand
    signature = inspect.signature(begin)

    def begin_ours(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        arguments = [*whole, "fit", *parts] if bound.arguments.get("run", True) else [*whole, *parts]
        bound.arguments |= {"args": arguments, "save_config_callback": None}
        begin(*bound.args, **bound.kwargs)
        stop(self)

    def instantiate_ours(self: Any) -> None:
        trainer = _config_of(self).get("trainer") or {}
        self.replay_kept = {key: trainer[key] for key in _KEPT if key in trainer}
        for key, value in _QUIET.items():
            if key in trainer:
                trainer[key] = value
        self.trainer_defaults = {key: value for key, value in self.trainer_defaults.items() if key not in _QUIET}
        instantiate(self)

    def stop(self: Any, *_: object) -> None:
        made.append(Rebuilt(self.model, self.replay_kept, _config_of(self).get("seed_everything")))
        raise _BuiltError

    cli_class.__init__, cli_class.instantiate_classes, cli_class._run_subcommand = begin_ours, instantiate_ours, stop
    try:
        yield
    finally:
        cli_class.__init__, cli_class.instantiate_classes, cli_class._run_subcommand = begin, instantiate, run


def _config_of(cli: Any) -> Any:
    return cli.config.get(str(cli.subcommand), cli.config)


def _last(text: str) -> str:
    """What jsonargparse says last, without the usage."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    start = next((place for place, line in enumerate(lines) if line.startswith("error:")), max(0, len(lines) - 2))
    said = " ".join(lines[start:]).removeprefix("error: ")
    return said if len(said) <= 600 else f"{said[:300]} … {said[-300:]}"  # noqa: PLR2004


def named_class(name: str) -> type:
    """A class by its dotted name, imported.

    Args:
        name: Such as "package.module.Class".

    Raises:
        UnusableReplayError: If there is none.
    """
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UnusableReplayError(f"`--trust` must be a class as package.module.Class, got {name}: {error}") from None
    except Exception as error:
        raise UnusableReplayError.of(f"`--trust`: importing {module}", error) from error
    if not isinstance(found, type):
        raise UnusableReplayError(f"`--trust` must be a class, got {name}, a {type(found).__name__}.")
    return found
