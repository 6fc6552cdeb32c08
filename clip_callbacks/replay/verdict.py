"""Whether the step was bad again, and, if it was not, what to try next."""

from __future__ import annotations

from dataclasses import dataclass

from clip_callbacks.replay.recorded_step import Recorded
from clip_callbacks.replay.result import Outcome
from clip_callbacks.replay.starting_weights import StartingWeights


@dataclass(frozen=True)
class Verdict:
    """Whether the step was bad again.

    Args:
        is_reproduced: Whether it was.
        text: That, in one line, with what to try next if it was not.
    """

    is_reproduced: bool
    text: str

    @classmethod
    def of(cls, outcome: Outcome, recorded: Recorded, weights: StartingWeights, device: str, precision: str) -> Verdict:
        """Compare what was found with what was recorded."""
        if recorded.limit is None:
            is_reproduced, found = outcome.is_nonfinite, "every loss and gradient is finite"
        else:
            is_reproduced = outcome.total_norm > recorded.limit or outcome.is_nonfinite
            found = f"the norm is {outcome.total_norm:.4g}, not above {recorded.limit:.4g}"
        if is_reproduced:
            return cls(True, "Reproduced.")
        cures = []
        if precision != recorded.precision:
            name = {"32-true": "float32", "64-true": "float64"}.get(precision, precision)
            cures.append(f"{name} cures it (it was {recorded.precision})")
        if device != recorded.device:
            cures.append(f"on {device} it does not happen (it was on {recorded.device})")
        causes = cures or _causes(outcome, recorded, weights)
        return cls(False, f"Not reproduced: {found}. {_sentence(causes)}")


def _causes(outcome: Outcome, recorded: Recorded, weights: StartingWeights) -> list[str]:
    causes = []
    if weights.module is None:
        causes.append("the weights are those of the configuration: give a checkpoint from before the step by --ckpt")
    elif weights.distance:
        steps = f"{abs(weights.distance)} step{'s' * (abs(weights.distance) > 1)} {'earlier' if weights.distance > 0 else 'later'}"
        causes.append(f"the weights are of a checkpoint {steps}: give a nearer one by --ckpt, or have bundles hold them")
    elif weights.distance is None:
        causes.append("it is not known how far the checkpoint's weights are from the step")
    if any(micro.has_same_loss is False for micro in outcome.micro_batches):
        causes.append("the losses are not those of the run: compare the configuration and the code")
    if recorded.world_size > 1:
        causes.append(
            f"the run had {recorded.world_size} ranks: it may have begun on another one, which has written its own bundle"
        )
    return causes or ["What a callback did to the gradients is not replayed, nor what other processes do on the device"]


def _sentence(parts: list[str]) -> str:
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."
