"""What a bundle says of the bad step, checked: it may be a stranger's."""

from __future__ import annotations

from dataclasses import dataclass

from clip_callbacks.bundles.bundle import FACTS, Bundle, UnusableBundleError

MOST = 2**62
"""No count of steps is as large."""
LONGEST = 1000
"""No name is as long."""


@dataclass(frozen=True)
class Recorded:
    """How the bad step was made.

    Args:
        kind: "nonfinite" or "spike".
        step: Optimizer steps before it.
        epoch: Its epoch.
        optimizer: Which of the optimizers.
        precision: Of the Trainer.
        accumulate_grad_batches: Micro-batches in a window.
        world_size: Count of ranks.
        device: Kind of the device.
        max_steps: Of the Trainer.
        max_epochs: Of the Trainer.
        loss_scale: Of the GradScaler; None without one.
        total_norm: Of a spike.
        limit: Of a spike.
        script: What was run.
        module: Class of the module.
        state: Of the module's ``state_dict``: dtype and shape by name.
        place: In words.
    """

    kind: str
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
    total_norm: float | None
    limit: float | None
    script: str
    module: str
    state: dict[str, tuple[str, tuple[int, ...]]]
    place: str

    @classmethod
    def of(cls, bundle: Bundle) -> Recorded:
        """From ``bundle.json``.

        Raises:
            UnusableBundleError: If anything that is needed is missing, or of another kind.
        """
        facts, report = bundle.facts, bundle.facts["report"]
        try:
            trainer, module = facts["trainer"], facts["module"]
            if facts["kind"] not in {"nonfinite", "spike"}:
                raise ValueError(f"of the kind {facts['kind']!r}")
            is_spike = facts["kind"] == "spike"
            return cls(
                kind=facts["kind"],
                step=_count(trainer["global_step"]),
                epoch=_count(report["epoch"]),
                optimizer=_count(facts["optimizer"]),
                precision=_word(trainer["precision"]),
                accumulate_grad_batches=max(1, _count(trainer["accumulate_grad_batches"])),
                world_size=_count(trainer["world_size"]),
                device=_word(trainer["device"]).partition(":")[0],
                max_steps=_count(trainer["max_steps"], -1),
                max_epochs=None if trainer["max_epochs"] is None else _count(trainer["max_epochs"], -1),
                loss_scale=None if trainer["loss_scale"] is None else float(trainer["loss_scale"]),
                total_norm=float(report["total_norm"]) if is_spike else None,
                limit=float(report["limit"]) if is_spike else None,
                script=_word(module["script"]),
                module=_word(module["class"]),
                state={name: (str(dtype), tuple(shape)) for name, (dtype, shape) in module["state"].items()},
                place=", ".join(f"{what} {_word(str(where))}" for what, where in bundle.place.items()),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UnusableBundleError(
                f"{bundle.path / FACTS} must tell of the step, the Trainer and the module, got {type(error).__name__}: {error}."
            ) from None


def _count(value: object, least: int = 0) -> int:
    if type(value) is not int or not least <= value < MOST:
        raise ValueError(f"{value!r:.60} as a count")
    return value


def _word(value: object) -> str:
    if not isinstance(value, str) or len(value) > LONGEST:
        raise ValueError(f"{value!r:.60} as a name")
    return value
