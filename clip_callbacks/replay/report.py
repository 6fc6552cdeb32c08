"""The report of a replay: what was run, whether the step failed again, and where the failure began; as text and as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from clip_callbacks.core.wording import listed, plural
from clip_callbacks.replay.anomaly import Anomaly
from clip_callbacks.replay.bisection import Bisection
from clip_callbacks.replay.recorded_step import RecordedStep
from clip_callbacks.replay.result import MicroBatchResult, WindowResult
from clip_callbacks.replay.starting_weights import StartingWeights, distance_in_words
from clip_callbacks.replay.suspects import SuspectModule, find_suspects

MAX_PARAMETERS = 4
"""Number of parameters that a line names."""


@dataclass(frozen=True)
class ReplayReport:
    """The report of a replay.

    Args:
        bundle: Name of the bundle's folder.
        recorded: The bad step as its bundle describes it.
        weights: The weights with which the replay began.
        device: Type of the device of the replay.
        precision: Precision of the replay.
        result: The result of the whole window.
        shown: The micro-batch to describe: the suspect one, or the part of it that bisection found.
        explosion_factor: Ratio of the values after a module to those before it, above which they explode.
        anomaly: The backward function that autograd's anomaly detection named.
        has_anomaly_run: If True, anomaly detection was asked for.
        bisection: The smallest failing part of the suspect micro-batch, if it was looked for.
        notes: Remarks on what differs from the training run.
    """

    bundle: str
    recorded: RecordedStep
    weights: StartingWeights
    device: str
    precision: str
    result: WindowResult
    shown: MicroBatchResult
    explosion_factor: float
    anomaly: Anomaly | None = None
    has_anomaly_run: bool = False
    bisection: Bisection | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_reproduced(self) -> bool:
        """Whether the step is bad again."""
        return self.result.fails(self.recorded.exceeded)

    @property
    def suspects(self) -> list[SuspectModule]:
        """The first suspect module of each fault."""
        return find_suspects(self.shown.calls, self.explosion_factor)

    @property
    def heading(self) -> list[str]:
        """Lines that say what was run."""
        recorded = self.recorded
        kind = "spike" if recorded.exceeded else "non-finite step"
        lines = [
            f"Bundle {self.bundle}: {kind} of {recorded.module} ({recorded.place})",
            f"Recorded on {recorded.device} with precision {recorded.precision}",
            f"Replayed on {self.device} with precision {self.precision}",
            f"Weights: {self.weights.source}",
        ]
        count = len(self.result.micro_batches)
        for number, micro in enumerate(self.result.micro_batches, 1):
            name = f"Batch {micro.batch_idx}"
            if count > 1:
                name = f"Micro-batch {number} of {count} (batch {micro.batch_idx})"
            lines.append(f"{name}: {_describe(micro)}")
        return lines

    @property
    def findings(self) -> list[str]:
        """Lines that say where the failure began."""
        return [
            *self._outside_modules(),
            *self._nonfinite_before(),
            *map(str, self.suspects),
            *self._nonfinite_gradients(),
            *self._large_gradients(),
            *self._anomaly(),
            *self._smallest_part(),
            *(f"Note: {note}" for note in self.all_notes),
        ]

    @property
    def all_notes(self) -> list[str]:
        """Remarks on what differs from the training run, or could not be recorded."""
        return list(dict.fromkeys([*self.notes, *self.result.notes, *self.shown.notes]))

    @property
    def conclusion(self) -> str:
        """The last line: whether the step was reproduced, and if it was not, possible reasons."""
        if self.is_reproduced and self.result.is_finite:
            quantities = [each.quantity for each in self.recorded.exceeded]
            are = plural(len(quantities), "is", "are")
            return f"Reproduced: the {' and the '.join(quantities)} {are} above the limit again."
        if self.is_reproduced:
            return "Reproduced: a loss or gradient is non-finite again."
        found = "every loss and gradient is finite"
        below = [each for each in self.recorded.exceeded if not self.result.exceeds([each])]
        if below:
            values = [
                f"the {each.quantity} is {self.result.value_of(each.quantity):.4g}, not above {each.limit:.4g}" for each in below
            ]
            found = " and ".join(values)
        reasons = self._cures() or self._possible_reasons()
        return f"Not reproduced: {found}. {' '.join(f'{reason}.' for reason in reasons)}"

    def _cures(self) -> list[str]:
        recorded, cures = self.recorded, []
        if self.precision != recorded.precision:
            name = {"32-true": "float32", "64-true": "float64"}.get(self.precision, self.precision)
            cures.append(f"With {name} the step does not fail (the run used {recorded.precision})")
        if self.device != recorded.device:
            cures.append(f"On {self.device} the step does not fail (the run was on {recorded.device})")
        return cures

    def _possible_reasons(self) -> list[str]:
        weights, reasons = self.weights, []
        if weights.module is None:
            reasons.append("The weights are as the configuration initializes them: name a checkpoint from before the step (--ckpt)")
        elif weights.distance:
            reasons.append(
                f"The weights are from a checkpoint {distance_in_words(weights.distance)} the bad step: name a nearer one "
                '(--ckpt), or store the weights in bundles (Bundles(..., weights="full"))'
            )
        elif weights.distance is None:
            reasons.append("The checkpoint does not say how many steps before the bad one it was saved")
        if any(micro.has_same_loss is False for micro in self.result.micro_batches):
            reasons.append("The losses differ from those of the run: compare the configuration and the code")
        if self.recorded.world_size > 1:
            reasons.append(
                f"The run had {self.recorded.world_size} ranks, and the failure may have begun on another one: replay the bundle "
                "that rank wrote"
            )
        default = "A replay leaves out changes that callbacks made to gradients, and other processes on the device"
        return reasons or [default]

    def _nonfinite_before(self) -> list[str]:
        calls = [call for call in self.shown.calls if call.number == 1 and call.nonfinite_tensors]
        if not calls:
            return []
        named = [f"{call.label}: {', '.join(call.nonfinite_tensors)}" for call in calls[:MAX_PARAMETERS]]
        return [f"Parameters and buffers that were non-finite before the step: {'; '.join(named)}"]

    def _nonfinite_gradients(self) -> list[str]:
        nonfinite = self.shown.nonfinite_gradients
        if not nonfinite:
            return []
        named = listed([f"{name} ({values.describe_nonfinite()})" for name, values in nonfinite.items()], MAX_PARAMETERS)
        return [f"Parameters with non-finite gradients: {len(nonfinite)} of {len(self.shown.gradients)}: {named}"]

    def _large_gradients(self) -> list[str]:
        recorded = self.recorded
        if not recorded.exceeded:
            return []
        sizes = {name: values.largest for name, values in self.shown.gradients.items()}
        largest = sorted(sizes, key=lambda name: 0.0 if math.isnan(sizes[name]) else -sizes[name])[:MAX_PARAMETERS]
        return [
            *(
                f"{each.quantity.capitalize()}: {self.result.value_of(each.quantity):.4g} (recorded {each.value:.4g}, limit "
                f"{each.limit:.4g})"
                for each in recorded.exceeded
            ),
            f"Parameters with the largest gradients: {', '.join(f'{name} (up to {sizes[name]:.3g})' for name in largest)}",
        ]

    def _anomaly(self) -> list[str]:
        if self.anomaly:
            text = f"Autograd's anomaly detection: {self.anomaly}"
            if not self.shown.has_finite_loss:
                text += " (the loss was already non-finite)"
            return [text]
        if self.has_anomaly_run:
            return ["Autograd's anomaly detection: no backward function returned NaN (it does not look for infinite values)"]
        return []

    def _smallest_part(self) -> list[str]:
        if self.bisection is None:
            return []
        return [str(self.bisection)]

    def _outside_modules(self) -> list[str]:
        """Say where a failure began for which no module is a suspect: before, between or after the modules."""
        shown, faults = self.shown, {suspect.fault for suspect in self.suspects}
        if shown.is_finite or any(call.nonfinite_tensors for call in shown.calls):
            return []
        if not shown.has_finite_loss and "output" not in faults:
            return [_outside_forward(shown)]
        if shown.has_finite_loss and "gradient" not in faults:
            return [_outside_backward(shown)]
        return []

    def facts(self) -> dict[str, Any]:
        """Return the report for JSON."""
        recorded = self.recorded
        return {
            "reproduced": self.is_reproduced,
            "conclusion": self.conclusion,
            "bundle": {"path": self.bundle, "kind": recorded.kind, "place": recorded.place, "module": recorded.module},
            "weights": self.weights.source,
            "device": self.device,
            "precision": self.precision,
            "total_norm": _finite_or_none(self.result.total_norm),
            "loss": _finite_or_none(self.result.loss),
            "exceeded": [each._asdict() for each in recorded.exceeded],
            "micro_batches": [_facts(micro) for micro in self.result.micro_batches],
            "suspects": [suspect.facts() for suspect in self.suspects],
            "findings": self.findings,
            "calls": [call.facts() for call in self.shown.calls],
            "gradients": {name: values.facts() for name, values in self.shown.gradients.items()},
            "anomaly": self.anomaly and asdict(self.anomaly),
            "bisection": self.bisection and self.bisection.facts(),
            "notes": self.all_notes,
        }


def _outside_forward(micro: MicroBatchResult) -> str:
    bad = next((call for call in micro.calls if call.inputs and not call.inputs.is_finite and not call.is_absorbed), None)
    if bad:
        return (
            f"No module made the first non-finite values: the inputs of {bad.label} are already non-finite. Look at the batch, and "
            "at the code before this module"
        )
    code = "the loss function, and at training_step after the last module"
    return f"No module made the loss non-finite: look at {code}{_operations(micro)}"


def _outside_backward(micro: MicroBatchResult) -> str:
    bad = [call for call in micro.calls if call.grad_output and not call.grad_output.is_finite and call.end_order is not None]
    if bad:
        last = max(bad, key=lambda call: call.end_order or 0)
        code = f"code that uses the output of {last.label}, between modules, in the loss function or in training_step"
    else:
        code = "code between modules, and at code that uses parameters directly, such as a penalty on weights"
    return f"No module made the gradients non-finite: look at {code}{_operations(micro)}"


def _operations(micro: MicroBatchResult) -> str:
    if not micro.operations:
        return ""
    return f". Autograd's operations there, from the loss backwards: {', '.join(micro.operations)}"


def _describe(micro: MicroBatchResult) -> str:
    if micro.loss is None:
        return "no backward pass"
    text = f"loss {float(micro.loss):.6g}"
    if micro.has_same_loss:
        text += " (bit for bit as in the run)"
    elif micro.recorded_loss is not None:
        text += f" (in the run {float(micro.recorded_loss):.6g})"
    if count := len(micro.nonfinite_gradients):
        return f"{text}, non-finite gradients of {count} parameter{'s' * (count > 1)}"
    return f"{text}, gradient norm {micro.norm:.4g}"


def _facts(micro: MicroBatchResult) -> dict[str, Any]:
    loss: float | str | None = None
    if micro.loss is not None:
        loss = float(micro.loss)
        if not math.isfinite(loss):
            loss = str(loss)
    return {
        "batch": micro.batch_idx,
        "loss": loss,
        "same_loss": micro.has_same_loss,
        "bad_gradients": list(micro.nonfinite_gradients),
        "norm": _finite_or_none(micro.norm),
    }


def _finite_or_none(number: float) -> float | None:
    return number if math.isfinite(number) else None
