"""The pages of the reference: every public name and every command, from where they are defined."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import clip_callbacks
from clip_callbacks import cli

MEMBERS = {
    "GradientNormMonitor": ("advice",),
    "Limit": ("uses_weights", "init", "step"),
    "NonFiniteGuard": (
        *("skipped_steps", "spikes", "zeroed_steps", "overflowed_steps", "reported_steps"),
        *("dropped_micro_batches", "rollbacks"),
    ),
    "ParameterTable": ("names", "groups"),
    "StepReport": (
        *("outcome", "skipped", "total_norm", "clipped_norm", "clip_coef", "max_norm"),
        *("names", "norms", "limits", "coefficients", "shadows", "metrics"),
    ),
}
"""Members of a class that users need beside its arguments; the other members are for the engine."""

MODULES = {"callbacks": ("callbacks", "guard.options"), "limits": ("core.limits",)}
"""Modules whose public names stand on a page of the reference; all other names are on the page of functions."""

INTRODUCTIONS = {
    "callbacks": "Every callback but FaultInjection has `last_report`, the `StepReport` of the last step or None, and a count "
    "`skipped_steps`.",
    "limits": "Limits stand wherever `max_norm`, `shadow` and `skip_above` take a number.",
    "functions": "Functions for plain loops and Fabric, and the values that functions and callbacks take and return.",
}


def group_of(name: str) -> str:
    """Return the page of the reference that a public name is on."""
    module = getattr(clip_callbacks, name).__module__.removeprefix("clip_callbacks.")
    return next((group for group, prefixes in MODULES.items() if module.startswith(prefixes)), "functions")


def reference_pages() -> Iterator[tuple[str, str]]:
    """Yield the path and text of each page."""
    titles = {"callbacks": "Callbacks", "limits": "Limits", "functions": "Functions and values"}
    for group, title in titles.items():
        names = [name for name in clip_callbacks.__all__ if group_of(name) == group]
        listed = ", ".join(f"[`{name}`][clip_callbacks.{name}]" for name in names)
        parts = "\n".join(_directive(name) for name in names)
        yield f"reference/{group}.md", f"# {title}\n\n{INTRODUCTIONS[group]}\n\n{listed}\n\n{parts}"
    yield "reference/command_line.md", _command_line()


def _directive(name: str) -> str:
    members = list(MEMBERS.get(name, ()))
    return f"::: clip_callbacks.{name}\n    options:\n      members: {members or 'false'}\n"


def _command_line() -> str:
    parser = cli._parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    parts = [f"## clip-callbacks {name}\n\n{_help(command)}" for name, command in commands.choices.items()]
    return "\n".join([f"# Command line\n\n{_help(parser)}", *parts])


def _help(parser: argparse.ArgumentParser) -> str:
    return f"````text\n{parser.format_help().rstrip()}\n````\n"
