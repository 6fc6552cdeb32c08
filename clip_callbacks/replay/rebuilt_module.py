"""The module that LightningCLI builds from the user's configuration and script; the script's own training does not begin."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import io
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from clip_callbacks.replay.errors import UnusableReplayError
from clip_callbacks.replay.suppressed_output import suppress_output

MAX_COMPLAINT_LENGTH = 600
"""Number of characters above which the middle of a message of jsonargparse is left out."""
_KEPT_OPTIONS = ("deterministic", "benchmark")
"""Options of the run's Trainer that the replay takes over, because they change numbers."""
_INERT_OPTIONS: dict[str, Any] = {
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
"""Options of the Trainer that LightningCLI makes. Scripts may look at it, but it shall not write files or start processes."""


@dataclass(frozen=True)
class RebuiltModule:
    """The module that LightningCLI built.

    Args:
        module: The module, with the weights that the configuration gives it.
        trainer_options: Options of the Trainer that change numbers.
    """

    module: LightningModule
    trainer_options: dict[str, Any] = field(default_factory=dict)


class _TrainsByItselfError(BaseException):
    """Ends a script that trains with a Trainer of its own. A BaseException, so that no ``except Exception`` catches it."""


class _ModuleBuiltError(BaseException):
    """Ends a script when its LightningCLI has built the module. A BaseException, so that no ``except Exception`` catches it."""


@contextmanager
def rebuild_module(configs: Sequence[Path], script: Path | None, recorded_script: str = "") -> Iterator[RebuiltModule]:
    """Build the module; inside the context, the classes of the script can be imported from ``__main__``.

    Args:
        configs: Files for ``--config``, in order.
        script: Script that passes them to its ``LightningCLI(...)``; None: LightningCLI itself takes them, and they name the
            module's class by ``class_path``.
        recorded_script: Path of the script of the run, for hints in errors.

    Yields:
        The module.

    Raises:
        UnusableReplayError: If no module can be built.
    """
    sections = [_section(path) for path in configs]
    if script is None and not any(_names_class(section) for section in sections):
        hint = ""
        if recorded_script:
            hint = f" (the bundle was made by {recorded_script})"
        raise UnusableReplayError(
            f"`--config` must name the module's class (model: {{class_path: ...}}), got {', '.join(map(str, configs))}; "
            f"if the script passes the class to LightningCLI, give the script, too: --script main.py{hint}"
        )
    if script is not None and not script.is_file():
        raise UnusableReplayError(f"`--script` must be a file, got {script}.")
    # a file with a section `fit` stands before the subcommand, one with the contents of that section after it
    before = [part for path, section in zip(configs, sections, strict=True) if "fit" in section for part in _option(path)]
    after = [part for path, section in zip(configs, sections, strict=True) if "fit" not in section for part in _option(path)]
    with _as_main(script) as main:
        if script is None:
            _check_importable(configs, sections)
        yield _build(main, script, before, after, recorded_script)


def _check_importable(configs: Sequence[Path], sections: Sequence[Mapping[str, Any]]) -> None:
    """Refuse classes of packages that are not there, of which jsonargparse would say that they match none of many types."""
    for path, section in zip(configs, sections, strict=True):
        for name in _classes_in(section):
            package = name.partition(".")[0]
            if package != name and package not in sys.modules and importlib.util.find_spec(package) is None:
                raise UnusableReplayError(
                    f"`--config` must name classes that can be imported here, got {name} in {path}: there is no module {package}. "
                    "Run the command in the folder of that module, or put the folder on PYTHONPATH."
                )


def _classes_in(content: object) -> Iterator[str]:
    """Yield the class paths anywhere in a configuration."""
    parts: Iterable[object] = ()
    if isinstance(content, Mapping):
        parts = content.values()
        if isinstance(name := content.get("class_path"), str):
            yield name
    elif isinstance(content, list):
        parts = content
    for part in parts:
        yield from _classes_in(part)


def _option(path: Path) -> tuple[str, str]:
    return "--config", str(path)


def _section(path: Path) -> Mapping[str, Any]:
    """Return the contents of a configuration file."""
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
    """Make a script the main module of the process, with the module path and arguments that ``python script`` would give it."""
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
    main: types.ModuleType, script: Path | None, before: Sequence[str], after: Sequence[str], recorded_script: str
) -> RebuiltModule:
    from lightning.pytorch import Trainer
    from lightning.pytorch.cli import _JSONARGPARSE_SIGNATURES_AVAILABLE, LightningCLI

    if not _JSONARGPARSE_SIGNATURES_AVAILABLE:  # otherwise the script would run up to its LightningCLI
        raise ModuleNotFoundError("LightningCLI needs jsonargparse[signatures], which is missing or too old")
    made: list[RebuiltModule] = []
    complaints = io.StringIO()
    with _intercepted(LightningCLI, before, after, made), _without_training(Trainer), suppress_output():
        try:
            with contextlib.redirect_stderr(complaints), contextlib.redirect_stdout(complaints):
                if script is None:
                    LightningCLI()
                else:
                    exec(compile(script.read_bytes(), str(script), "exec"), main.__dict__)
        except (_ModuleBuiltError, _TrainsByItselfError):
            pass
        except SystemExit:
            if not made:
                message = f"LightningCLI refused the configuration: {_last_complaint(complaints.getvalue())}"
                if script is None:
                    message += f"; if {recorded_script} adds arguments or links, give it, too: --script"
                raise UnusableReplayError(message) from None
        except Exception as error:
            raise UnusableReplayError.from_user_code(str(script or "LightningCLI"), error) from error
    if not made:
        raise UnusableReplayError(
            f"`--script` must be a script that makes a LightningCLI when it is run, got {script}. Leave it out, and name the class "
            "of the model in a YAML file for --config (model: {class_path: package.Model})."
        )
    return made[0]


@contextmanager
def _intercepted(cli_class: Any, before: Sequence[str], after: Sequence[str], made: list[RebuiltModule]) -> Iterator[None]:
    """Make LightningCLI and its subclasses take our arguments, and stop when they have built the module.

    Args:
        cli_class: The class LightningCLI.
        before: Arguments before the subcommand.
        after: Arguments after the subcommand.
        made: List to which the module is added.
    """
    init, instantiate, run = cli_class.__init__, cli_class.instantiate_classes, cli_class._run_subcommand
    signature = inspect.signature(init)

    def init_with_our_arguments(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        arguments = [*before, *after]
        if bound.arguments.get("run", True):
            arguments.insert(len(before), "fit")
        bound.arguments |= {"args": arguments, "save_config_callback": None}
        init(*bound.args, **bound.kwargs)
        stop(self)

    def instantiate_inert_trainer(self: Any) -> None:
        trainer = _config_of(self).get("trainer") or {}
        self.replay_trainer_options = {key: trainer[key] for key in _KEPT_OPTIONS if key in trainer}
        for key, value in _INERT_OPTIONS.items():
            if key in trainer:
                trainer[key] = value
        self.trainer_defaults = {key: value for key, value in self.trainer_defaults.items() if key not in _INERT_OPTIONS}
        instantiate(self)

    def stop(self: Any, *_: object) -> None:
        made.append(RebuiltModule(self.model, self.replay_trainer_options))
        raise _ModuleBuiltError

    cli_class.__init__ = init_with_our_arguments
    cli_class.instantiate_classes = instantiate_inert_trainer
    cli_class._run_subcommand = stop
    try:
        yield
    finally:
        cli_class.__init__, cli_class.instantiate_classes, cli_class._run_subcommand = init, instantiate, run


@contextmanager
def _without_training(trainer_class: Any) -> Iterator[None]:
    """End a script at its first ``Trainer.fit``: the training of a script without LightningCLI must not begin again."""
    fit = trainer_class.fit

    @functools.wraps(fit)  # jsonargparse reads the options of the subcommand from its signature
    def refuse(*_: Any, **__: Any) -> None:
        raise _TrainsByItselfError

    trainer_class.fit = refuse
    try:
        yield
    finally:
        trainer_class.fit = fit


def _config_of(cli: Any) -> Any:
    return cli.config.get(str(cli.subcommand), cli.config)


def _last_complaint(text: str) -> str:
    """Return the last error that jsonargparse printed, without its description of the usage."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    start = next((number for number, line in enumerate(lines) if line.startswith("error:")), max(0, len(lines) - 2))
    complaint, half = " ".join(lines[start:]).removeprefix("error: "), MAX_COMPLAINT_LENGTH // 2
    if len(complaint) > MAX_COMPLAINT_LENGTH:
        complaint = f"{complaint[:half]} … {complaint[-half:]}"
    return complaint


def import_class(name: str) -> type:
    """Import a class.

    Args:
        name: Dotted name, such as "package.module.Class".

    Raises:
        UnusableReplayError: If it cannot be imported, or is not a class.
    """
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UnusableReplayError(f"`--trust` must be a class as package.module.Class, got {name}: {error}") from None
    except Exception as error:
        raise UnusableReplayError.from_user_code(f"`--trust`: importing {module}", error) from error
    if not isinstance(found, type):
        raise UnusableReplayError(f"`--trust` must be a class, got {name}, a {type(found).__name__}.")
    return found
