"""A bundle, replayed: what was run, what was found, told as text and as facts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from clip_callbacks.replay.anomaly import Anomaly
from clip_callbacks.replay.bisection import Bisection
from clip_callbacks.replay.recorded_step import Recorded
from clip_callbacks.replay.result import MicroBatch, Outcome
from clip_callbacks.replay.starting_weights import StartingWeights
from clip_callbacks.replay.suspects import Culprit, find_culprits
from clip_callbacks.replay.verdict import Verdict

LISTED = 4
"""How many gradients of parameters are named."""


@dataclass(frozen=True)
class Investigation:
    """What a replay has found.

    Args:
        bundle: Name of its folder.
        recorded: What it says.
        weights: The run began with.
        device: It ran on.
        precision: It ran with.
        outcome: Of the whole window.
        verdict: Whether the step was bad again.
        factor: From which growth on something explodes.
        shown: The micro-batch that is looked at: the guilty one, or what bisection left of it.
        anomaly: What autograd itself has found, if it was asked and has.
        was_asked: Whether it was.
        bisection: The smallest part that fails, if it was looked for.
        notes: What else there is to know.
    """

    bundle: str
    recorded: Recorded
    weights: StartingWeights
    device: str
    precision: str
    outcome: Outcome
    verdict: Verdict
    factor: float
    shown: MicroBatch
    anomaly: Anomaly | None = None
    was_asked: bool = False
    bisection: Bisection | None = None
    notes: tuple[str, ...] = ()

    @property
    def culprits(self) -> list[Culprit]:
        """The first of each kind."""
        return find_culprits(self.shown.calls, self.factor)

    @property
    def heading(self) -> list[str]:
        """What was run."""
        recorded = self.recorded
        lines = [
            f"Bundle {self.bundle}: {recorded.kind} step ({recorded.place}) of {recorded.module}",
            f"Recorded on {recorded.device} in {recorded.precision}",
            f"Weights: {self.weights.text}",
            f"Replayed on {self.device} in {self.precision}",
        ]
        count = len(self.outcome.micro_batches)
        for place, micro in enumerate(self.outcome.micro_batches):
            which = f"Micro-batch {place + 1} of {count}" if count > 1 else "Batch"
            lines.append(f"{which} (batch {micro.batch_idx}): {_told(micro)}")
        return lines

    @property
    def findings(self) -> list[str]:
        """What is said above the tree."""
        shown = self.shown
        lines = [str(culprit) for culprit in self.culprits]
        if parameters := [f"{call.label}: {', '.join(call.parameters)}" for call in _first_calls(shown) if call.parameters]:
            lines.insert(0, f"Not finite before the step already: {'; '.join(parameters[:LISTED])}")
        if between := self._between:
            lines.insert(0, between)
        if bad := shown.bad_gradients:
            named = [f"{name} ({span.faults()})" for name, span in list(bad.items())[:LISTED]]
            more = f" and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
            lines.append(
                f"Gradients that are not finite: {len(bad)} of {len(shown.gradients)} parameters: {', '.join(named)}{more}"
            )
        if self.recorded.limit is not None:
            lines.append(
                f"Norm of all gradients: {self.outcome.total_norm:.4g} "
                f"(recorded {self.recorded.total_norm:.4g}, limit {self.recorded.limit:.4g})"
            )
            largest = sorted(shown.gradients.items(), key=lambda pair: -_or_zero(pair[1].largest))[:LISTED]
            lines.append(f"Largest gradients: {', '.join(f'{name} |max| {span.largest:.3g}' for name, span in largest)}")
        if self.anomaly:
            already = "" if shown.has_finite_loss else " (the loss was not finite already)"
            lines.append(f"Autograd's anomaly detection: {self.anomaly}{already}")
        elif self.was_asked:
            lines.append("Autograd's anomaly detection: no backward function returned NaN (it does not look for inf)")
        if self.bisection:
            lines.append(str(self.bisection))
        return lines + [f"Note: {note}" for note in self.all_notes]

    @property
    def all_notes(self) -> list[str]:
        """What is not as it was, or not seen."""
        return list(dict.fromkeys([*self.notes, *self.outcome.notes, *self.shown.notes]))

    @property
    def _between(self) -> str | None:
        """What is said if no module is guilty: it is in what stands between them, or after the last."""
        shown, guilts = self.shown, {culprit.guilt for culprit in self.culprits}
        if not shown.is_bad or any(call.parameters for call in shown.calls):
            return None
        if not shown.has_finite_loss:
            return None if "output" in guilts else self._without_output(shown)
        return None if "gradient" in guilts else self._without_gradient(shown)

    def _without_output(self, shown: MicroBatch) -> str:
        bad = next((call for call in shown.calls if call.inputs and not call.inputs.is_finite and not call.absorbed), None)
        if bad:
            return f"No module has made it: what goes into {bad.label} is not finite already: the batch, or the code before it"
        return f"No module's output is at fault: it is the loss function or training_step, after the last module{_named(shown)}"

    def _without_gradient(self, shown: MicroBatch) -> str:
        bad = [call for call in shown.calls if call.gradient and not call.gradient.is_finite and call.done is not None]
        if not bad:
            where = "code between them, or that takes parameters itself, as a penalty on weights does"
            return f"No module's gradient is at fault: it is in {where}{_named(shown)}"
        last = max(bad, key=lambda call: call.done or 0)
        where = f"code that takes what comes out of {last.label}: between modules, the loss function or training_step"
        return f"No module's gradient is at fault: it is in {where}{_named(shown)}"

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        bundle = {"path": self.bundle, "kind": self.recorded.kind, "place": self.recorded.place, "module": self.recorded.module}
        return {
            "reproduced": self.verdict.is_reproduced,
            "verdict": self.verdict.text,
            "bundle": bundle,
            "weights": self.weights.text,
            "device": self.device,
            "precision": self.precision,
            "total_norm": _or_none(self.outcome.total_norm),
            "limit": self.recorded.limit,
            "micro_batches": [_facts(micro) for micro in self.outcome.micro_batches],
            "culprits": [culprit.facts() for culprit in self.culprits],
            "findings": self.findings,
            "calls": [call.facts() for call in self.shown.calls],
            "gradients": {name: span.facts() for name, span in self.shown.gradients.items()},
            "anomaly": self.anomaly and self.anomaly.facts(),
            "bisection": self.bisection and self.bisection.facts(),
            "notes": self.all_notes,
        }


def signature(micro: MicroBatch, factor: float) -> tuple[Any, ...]:
    """What makes two failures the same: whether the loss is bad, and which modules begin it."""
    culprits = find_culprits(micro.calls, factor)
    return micro.has_finite_loss, *((culprit.guilt, culprit.call.name) for culprit in culprits if " " not in culprit.guilt)


def _named(micro: MicroBatch) -> str:
    """The operations between the modules and the loss."""
    return f". Operations of autograd there, from the loss backwards: {', '.join(micro.operations)}" * bool(micro.operations)


def _first_calls(micro: MicroBatch) -> list[Any]:
    return [call for call in micro.calls if call.number == 1]


def _told(micro: MicroBatch) -> str:
    if micro.loss is None:
        return "no backward pass"
    same = {True: ", bit for bit the run's", None: "", False: f" (in the run {float(micro.recorded or 0):.6g})"}[
        micro.has_same_loss
    ]
    bad = f", {len(micro.bad_gradients)} gradients not finite" if micro.bad_gradients else ""
    return f"loss {float(micro.loss):.6g}{same}{bad or f', norm {micro.norm:.4g}'}"


def _facts(micro: MicroBatch) -> dict[str, Any]:
    return {
        "batch": micro.batch_idx,
        "loss": None if micro.loss is None else _or_text(float(micro.loss)),
        "same_loss": micro.has_same_loss,
        "bad_gradients": list(micro.bad_gradients),
        "norm": _or_none(micro.norm),
    }


def _or_none(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _or_text(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)


def _or_zero(number: float) -> float:
    return 0.0 if math.isnan(number) else number
