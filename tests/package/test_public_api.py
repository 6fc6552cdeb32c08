"""What users write against: names, arguments, defaults. A change is made on purpose.

``python -m tests.package.test_public_api`` writes the file anew.
"""

from __future__ import annotations

import inspect
from pathlib import Path

from lightning.pytorch import Callback

import clip_callbacks

FROZEN = Path(__file__).parent / "public_api.txt"
FOR_USERS = {"advice", "state_dict", "load_state_dict"}
"""Methods of callbacks that are not Lightning's to call, nor the pass's."""


def members(kind):
    """Attributes and methods that the package itself gives a class."""
    for name in sorted(set(dir(kind))):
        owner = next((base for base in kind.__mro__ if name in vars(base)), None)
        if name.startswith("_") or owner is None or not owner.__module__.startswith("clip_callbacks"):
            continue
        thing = inspect.getattr_static(kind, name)
        thing = thing.__func__ if isinstance(thing, (classmethod, staticmethod)) else thing
        if inspect.isfunction(thing) and issubclass(kind, Callback) and name not in FOR_USERS:
            continue
        yield f"  .{name}{inspect.signature(thing) if inspect.isfunction(thing) else ''}"


def told():
    """The public surface, a line for each name."""
    lines = []
    for name in clip_callbacks.__all__:
        thing = getattr(clip_callbacks, name)
        is_error = inspect.isclass(thing) and issubclass(thing, Exception)
        lines.append(f"{name}{'' if is_error else inspect.signature(thing)}")
        if inspect.isclass(thing) and not is_error:
            lines += members(thing)
    return "\n".join(lines) + "\n"


def test_the_public_surface_is_as_it_was():
    assert told() == FROZEN.read_text()


if __name__ == "__main__":
    FROZEN.write_text(told())
