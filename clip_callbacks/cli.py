"""The command ``clip-callbacks``: report on the logs of runs, suggest a max_norm, replay a bad step."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clip_callbacks.bundles.terminal import escaped
from clip_callbacks.core.metric_names import TOTAL_NORM

if TYPE_CHECKING:
    from clip_callbacks.html_report.page import Section
    from clip_callbacks.html_report.runs import Run

UNUSABLE = 2
"""Exit code if the input cannot be used, the same as that of argparse for wrong arguments."""

LOGS = (
    "a metrics.csv or another CSV file with a column for the step, an event file of TensorBoard, a database of MLflow "
    "(mlflow.db), the trainer_state.json of a Trainer of transformers, the nonfinite_steps.jsonl of a run that logged nothing "
    "else, a folder that holds such files at any depth, or the address of an MLflow store (sqlite:///mlflow.db, "
    "http://localhost:5000, optionally followed by # and the name of an experiment or the id of a run)"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Command line without the name of the command; None takes that of the process.

    Returns:
        The exit code: 0 for success; 2 if the input cannot be used, with one line on stderr that says why; 1 if a replayed step is
        not bad again.
    """
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except ImportError as error:
        print(f"clip-callbacks: {error}; pip install 'clip_callbacks[{options.extra}]'", file=sys.stderr)
    except BrokenPipeError:  # as by "| head"
        sys.stdout = None
        return 0
    except (ValueError, OSError) as error:
        print(f"clip-callbacks: {escaped(' '.join(str(error).split()))}", file=sys.stderr)
    return UNUSABLE


def _runs(options: argparse.Namespace) -> tuple[list[Run], list[str]]:
    """Read the runs that the user named; return them with notes on what was left out."""
    from clip_callbacks.html_report.runs import UnusableLogError
    from clip_callbacks.html_report.sources import read_runs

    runs, notes = read_runs(options.logs, options.norm)
    if options.steps:
        first, last = options.steps
        runs = [part for run in runs if (part := run.between(first, last)).optimizer_logs]
        if not runs:
            raise UnusableLogError(f"nothing was logged from step {first} to step {last}.")
    return runs, notes


def _print_notes(notes: Sequence[str], runs: Sequence[Run]) -> None:
    for note in [*notes, *(f"{run.name}: {note}" for run in runs for note in run.notes)]:
        print(f"clip-callbacks: {escaped(note)}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clip-callbacks", description="Report on gradient norms, clipping and bad steps of training runs."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    report = commands.add_parser(
        "report",
        help="write an HTML page that compares runs",
        description="Write an HTML page that compares the gradients of runs.",
    )
    suggest = commands.add_parser(
        "suggest",
        help="suggest a max_norm and a loss_above from the log of a run",
        description="Suggest a max_norm from the norms of each run, and a loss_above from its training loss.",
    )
    for command in (report, suggest):
        command.add_argument("logs", nargs="+", metavar="LOGS", help=LOGS)
        command.add_argument(
            "--loss",
            action="append",
            default=[],
            metavar="METRIC",
            help="metric that is a loss; may be repeated (default: metrics whose names hold words such as loss or nll)",
        )
        command.add_argument(
            "--norm",
            action="append",
            default=[],
            metavar="METRIC",
            help=f"metric that is the norm of all gradients; may be repeated (default: {TOTAL_NORM}, which clip_callbacks logs, or "
            "else a metric that is known by its name, such as grad_norm or grad_2.0_norm_total)",
        )
        command.add_argument(
            "--steps", type=_steps, metavar="A:B", help="use only steps from A to B, both included; either may be left out"
        )
    report.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="file of the page (default: %(default)s)")
    report.add_argument("--png", type=Path, metavar="DIR", help="also write the plots as PNG files into this folder")
    report.add_argument("--title", default="Gradient report", help="heading of the page (default: %(default)s)")
    suggest.add_argument("--json", action="store_true", help="print JSON instead of text")
    report.set_defaults(run=_report, extra="report")
    suggest.set_defaults(run=_suggest, extra="report")
    _add_replay(commands)
    return parser


def _add_replay(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    replay = commands.add_parser(
        "replay",
        help="run a bad step again, and name the module where the failure began",
        description="Run a bad step again from its bundle, and name the module where the failure began. Exit code 0: the step is "
        "bad again; 1: it is not; 2: the bundle or another input cannot be used.",
    )
    replay.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder that NonFiniteGuard(bundles=...) wrote of a bad step")
    replay.add_argument(
        "--config",
        type=Path,
        action="append",
        required=True,
        help="a configuration of the run, as LightningCLI takes it; may be repeated",
    )
    replay.add_argument(
        "--script", type=Path, help="the training script with its LightningCLI; needed if no --config names the class of the model"
    )
    replay.add_argument("--ckpt", type=Path, metavar="PATH", help="a checkpoint whose weights replace those of the bundle")
    replay.add_argument("--device", help="cpu, cuda or mps (default: the device of the run if this machine has it, otherwise cpu)")
    replay.add_argument("--precision", help="a precision of the Trainer, such as 32-true or bf16-mixed (default: that of the run)")
    replay.add_argument(
        "--detect-anomaly", action="store_true", help="find the line of code whose backward pass made NaN, by autograd's own search"
    )
    replay.add_argument("--bisect", action="store_true", help="find the smallest set of samples in the batch that still fails")
    replay.add_argument(
        "--explodes",
        type=_factor,
        default=1000.0,
        metavar="FACTOR",
        help="name modules whose output or gradient grows by more than this factor (default: 1000)",
    )
    replay.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="CLASS",
        help="a class, as package.module.Class, whose objects may be read from the bundle; may be repeated",
    )
    replay.add_argument(
        "-o", "--output", type=Path, metavar="PICTURE", help="a .png or .svg file for a plot of activations and gradients by depth"
    )
    replay.add_argument("--json", action="store_true", help="print the report as JSON")
    replay.set_defaults(run=_replay, extra="replay")


def _factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not factor > 1:
        raise argparse.ArgumentTypeError(f"must be a number above 1, got {text!r}")
    return factor


def _replay(options: argparse.Namespace) -> int:
    from clip_callbacks.replay.command import replay

    return replay(options)


def _steps(text: str) -> tuple[int | None, int | None]:
    first, colon, last = text.partition(":")
    try:
        if not colon:
            raise ValueError
        low = int(first) if first else None
        high = int(last) if last else None
        if low is not None and high is not None and low > high:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be A:B with whole numbers, A not above B, got {text!r}") from None
    return low, high


def _report(options: argparse.Namespace) -> int:
    from tabulate import tabulate

    from clip_callbacks.html_report.page import HEADINGS, make_sections, write_report

    if options.output.is_dir():
        raise ValueError(f"--output must be a file, got the folder {options.output}.")
    if options.png and options.png.exists() and not options.png.is_dir():
        raise ValueError(f"--png must be a folder, got the file {options.png}.")
    runs, notes = _runs(options)
    sections = make_sections(runs, options.loss)
    written = write_report(sections, options.output, notes=notes, png=options.png, title=options.title)
    _print_notes(notes, runs)
    rows = [[section.log.name, *section.row] for section in sections]
    print(tabulate(rows, ("run", *HEADINGS), disable_numparse=True, stralign="right"))
    print(f"Report: {written[0]}")
    if options.png:
        print(f"Plots: {', '.join(path.name for path in written[1:])} in {options.png}")
    return 0


def _suggest(options: argparse.Namespace) -> int:
    from clip_callbacks.html_report.page import make_sections

    runs, notes = _runs(options)
    sections = make_sections(runs, options.loss)
    _print_notes(notes, runs)
    if options.json:
        print(json.dumps({section.log.name: _facts(section) for section in sections}, indent=2))
    else:
        print("\n\n".join(_suggestion_text(section) for section in sections))
    return 0


def _facts(section: Section) -> dict[str, object]:
    facts: dict[str, object] = {"metric": section.log.norm.name, "max_norm": None}
    if section.advice:
        facts |= section.advice.facts()
    facts["loss_above"] = None
    if section.loss_advice:
        facts["loss_above"] = section.loss_advice.facts()
    return facts | {"caution": section.caution, "notes": list(section.log.run.notes)}


def _suggestion_text(section: Section) -> str:
    return "\n\n".join(filter(None, [_norm_suggestion_text(section), _loss_suggestion_text(section)]))


def _norm_suggestion_text(section: Section) -> str:
    if section.advice is None:
        return f"{section.log.name}: no suggestion: {section.caution or 'no finite norm above 0 was logged.'}"
    text = f"{section.log.name}: {section.advice.describe()}"
    if section.caution:
        text += f"\n  Caution: {section.caution}"
    return f"{text}\n\n{section.yaml()}\n# or the adaptive limit:\n{section.yaml(adaptive=True)}".rstrip()


def _loss_suggestion_text(section: Section) -> str:
    if section.loss_advice is None:
        return section.no_loss_advice and f"{section.log.name}: {section.no_loss_advice}"
    return f"{section.log.name}: {section.loss_advice.describe()}\n\n{section.loss_yaml()}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
