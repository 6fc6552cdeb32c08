"""The bad step as its bundle describes it. A bundle may be untrusted, so every value is checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from clip_callbacks.bundles.bundle import FACTS, Bundle, UnusableBundleError

MAX_COUNT = 2**62
"""Upper bound of the steps, epochs and other counts in a bundle."""
MAX_TEXT_LENGTH = 1000
"""Number of characters that a name or path in a bundle may have."""


class ExceededLimit(NamedTuple):
    """A limit that a spike has exceeded.

    Args:
        quantity: "norm of all gradients", or "loss of the window".
        value: Its value in the training run.
        limit: Its limit at that step.
    """

    quantity: str
    value: float
    limit: float


NORM, LOSS = "norm of all gradients", "loss of the window"


@dataclass(frozen=True)
class RecordedStep:
    """The bad step as its bundle describes it.

    Args:
        step: Number of optimizer steps before the bad one.
        epoch: Number of the epoch.
        optimizer: Index of the optimizer.
        precision: Precision of the Trainer.
        accumulate_grad_batches: Number of micro-batches in a window.
        world_size: Number of ranks.
        device: Type of the device, such as "cuda".
        max_steps: ``max_steps`` of the Trainer.
        max_epochs: ``max_epochs`` of the Trainer.
        loss_scale: Scale of the GradScaler; None without a GradScaler.
        exceeded: Limits that a spike has exceeded; empty if the step was non-finite.
        script: Path of the script that was run.
        module: Name of the module's class.
        state: Dtype and shape of each tensor of the module's ``state_dict``, by name.
        place: Step, epoch, batch and rank, in words.
    """

    step: int
    epoch: int
    optimizer: int
    precision: str
    accumulate_grad_batches: int
    world_size: int
    device: str
    max_steps: int
    max_epochs: int | None
    loss_scale: float | None
    exceeded: tuple[ExceededLimit, ...]
    script: str
    module: str
    state: dict[str, tuple[str, tuple[int, ...]]]
    place: str

    @property
    def kind(self) -> str:
        """Kind of the bad step: "nonfinite" or "spike"."""
        return "spike" if self.exceeded else "nonfinite"

    @classmethod
    def of(cls, bundle: Bundle) -> RecordedStep:
        """Read the description from ``bundle.json``.

        Raises:
            UnusableBundleError: If a value is missing, or has the wrong type.
        """
        facts, report = bundle.facts, bundle.facts["report"]
        try:
            trainer, module = facts["trainer"], facts["module"]
            return cls(
                step=_count(trainer["global_step"]),
                epoch=_count(report["epoch"]),
                optimizer=_count(facts["optimizer"]),
                precision=_text(trainer["precision"]),
                accumulate_grad_batches=max(1, _count(trainer["accumulate_grad_batches"])),
                world_size=_count(trainer["world_size"]),
                device=_text(trainer["device"]).partition(":")[0],
                max_steps=_count(trainer["max_steps"], -1),
                max_epochs=None if trainer["max_epochs"] is None else _count(trainer["max_epochs"], -1),
                loss_scale=None if trainer["loss_scale"] is None else float(trainer["loss_scale"]),
                exceeded=_exceeded(report) if facts["kind"] == "spike" else (),
                script=_text(module["script"]),
                module=_text(module["class"]),
                state={name: (str(dtype), tuple(shape)) for name, (dtype, shape) in module["state"].items()},
                place=", ".join(f"{what} {_text(str(where))}" for what, where in bundle.place.items()),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UnusableBundleError(
                f"{bundle.path / FACTS} must describe the step, the Trainer and the module as NonFiniteGuard writes them, got "
                f"{type(error).__name__}: {error}."
            ) from None


def _exceeded(report: Mapping[str, Any]) -> tuple[ExceededLimit, ...]:
    numbers = [(NORM, "total_norm", "limit"), (LOSS, "loss", "loss_limit")]
    limits = [ExceededLimit(name, float(report[value]), float(report[limit])) for name, value, limit in numbers if limit in report]
    if not limits:
        raise KeyError("limit")
    # a spike may have exceeded one of two limits; whoever has changed the numbers of a bundle asks for all of them
    return tuple(each for each in limits if each.value > each.limit) or tuple(limits)


def _count(value: object, minimum: int = 0) -> int:
    if type(value) is not int or not minimum <= value < MAX_COUNT:
        raise ValueError(f"{value!r:.60} is not a whole number of at least {minimum}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT_LENGTH:
        raise ValueError(f"{value!r:.60} is not a text of at most {MAX_TEXT_LENGTH} characters")
    return value
