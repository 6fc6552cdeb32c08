"""Bad steps of a run: counted, told of, and what comes of too many in a row."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from clip_callbacks.core.diagnosis import Findings, Spike
from clip_callbacks.core.nonfinite import NonFiniteGradientError, Policy
from clip_callbacks.core.step_report import StepReport
from clip_callbacks.guard.counters import Counters
from clip_callbacks.guard.journal import Evidence
from clip_callbacks.guard.step_context import Incident

if TYPE_CHECKING:
    from clip_callbacks.guard.restore import Rewind
    from clip_callbacks.guard.rollback import Rollback

_ADVICE = "Lower the learning rate, clip harder, or look at the stage named above."


@dataclass(frozen=True)
class _Account:
    """What is told of a bad step.

    Args:
        what: What it is, where and when.
        found: What a look at it has found.
        done: What is done about it, as long as such steps are few.
        advice: What to do when they do not end.
        bundle: Lines that tell of its bundle, each behind a line break.
    """

    what: str
    found: str = ""
    done: str = "the step is skipped"
    advice: str = ""
    bundle: str = ""

    def text(self, outcome: str, *more: str) -> str:
        """All of it in lines, what came of the step in the first."""
        return "\n".join(filter(None, [f"{self.what}{outcome}", self.found, *more])) + self.bundle


class BadSteps:
    """Decides on bad steps, counts them and tells of them; at the end of a streak goes back or raises.

    Args:
        policy: What a step with gradients that are not finite meets.
        evidence: Where they are written down.
        max_consecutive: How many in a row make a streak.
        max_rollbacks: How many streaks of a run may end in a rollback; 0 if none is wanted.

    Attributes:
        counters: What is counted, by number of the optimizer.
        rollbacks: How often the run went back.
        rewind: In a fit, what puts back single steps.
        rollback: In a fit, what goes back to earlier weights, if that is wanted.
    """

    def __init__(self, policy: Policy, evidence: Evidence, *, max_consecutive: int, max_rollbacks: int) -> None:
        self._policy: Policy = policy
        self._evidence = evidence
        self._max_consecutive = max_consecutive
        self._max_rollbacks = max_rollbacks
        self.rewind: Rewind | None = None
        self.rollback: Rollback | None = None
        self.forget()

    def forget(self) -> None:
        """Begin a new run."""
        self.counters: dict[int, Counters] = {}
        self.rollbacks = 0
        self._last_findings: Findings | None = None

    def release(self) -> None:
        """Let go of the fit; what is counted stays."""
        self.rewind = self.rollback = None

    def judge(self, incident: Incident) -> Policy:
        """Decide on a step whose gradients are not finite, before anything is touched.

        Args:
            incident: Where and when.

        Returns:
            The policy to follow.

        Raises:
            NonFiniteGradientError: If the policy is "raise", or this is one bad step too many in a row.
        """
        incident.happened = True
        counters = self.counters[incident.lane.index]
        if incident.is_overflow():
            counters.overflowed += incident.is_new
            incident.is_undone = True
            return "skip"
        if self._policy == "ignore":
            return "ignore"
        policy: Policy = "skip" if incident.leaves_to_scaler else self._policy
        number = incident.lane.history.steps - (not incident.is_new)
        after_good_step = 0 < number != counters.last_bad + 1
        if counters.add(number):
            policy = "skip" if self._can_go_back(counters.streak) else policy
            counters.skipped += policy == "skip"
            counters.zeroed += policy == "zero"
            self._report(incident, incident.findings(after_good_step=after_good_step), counters.streak)
        incident.is_undone = policy == "skip"
        # in the middle of LBFGS's search a step is undone in the end; until then torch's code gets the numbers it would get
        return "ignore" if incident.is_undone and not incident.is_new else policy

    def judge_spike(self, incident: Incident, report: StepReport) -> None:
        """Count a finite step that is skipped for its norm.

        Raises:
            NonFiniteGradientError: If this is one bad step too many in a row.
        """
        incident.is_undone = True
        assert report.skip_limit is not None
        counters = self.counters[incident.lane.index]
        counters.skipped += counters.add(incident.lane.history.steps)
        spike = Spike.of(incident.lane.table.names, report.parameter_norms, report.total_norm, report.skip_limit)
        facts = {**incident.place, "policy": self._policy, "streak": counters.streak, **spike.facts()}
        account = _Account(
            f"Spike at {incident}: {spike}",
            spike.describe(),
            advice="Lower the learning rate, or raise skip_above: a level that lasts is no spike.",
            bundle=self._evidence.record(incident, facts, self.rewind),
        )
        self._tell(incident, account, counters.streak)

    def judge_lost(self, incident: Incident, *, is_reported: bool) -> None:
        """Count a window of which nothing is left.

        Args:
            incident: Where and when.
            is_reported: Whether every micro-batch was dropped, and reported then; if not, all of them have weight 0.

        Raises:
            NonFiniteGradientError: If this is one bad step too many in a row.
        """
        incident.happened = incident.is_undone = True
        counters = self.counters[incident.lane.index]
        counters.skipped += counters.add(incident.lane.history.steps)
        streak = counters.streak
        if not is_reported:
            what = f"Every micro-batch of the window has weight 0 at {incident}"
            facts = {"policy": self._policy, "streak": streak, "stage": "weight", "message": what}
            self._evidence.note({**incident.place, **facts})
            self._tell(incident, _Account(what), streak)
        elif self._is_over(streak) and self._last_findings:
            what = f"Non-finite gradients in every micro-batch at {incident}"
            self._tell(incident, _Account(what, self._last_findings.describe(), advice=_ADVICE), streak)

    def skip_stale(self, incident: Incident) -> None:
        """Count a step that is skipped since the run has gone back in its batch: its gradients are of weights that are gone."""
        incident.is_undone = True
        self.counters[incident.lane.index].skipped += 1

    def report_micro_batch(self, incident: Incident) -> None:
        """Warn of a micro-batch about to be dropped, and write it down."""
        self._last_findings = findings = incident.findings(after_good_step=False)
        facts = {**incident.place, "policy": "microbatch", **findings.facts()}
        is_guilty = incident.is_guilty(findings)
        bundle = self._evidence.record(incident, facts, self.rewind, is_window=False, is_guilty=is_guilty)
        account = _Account(f"Non-finite gradients at {incident}", findings.describe(), bundle=bundle)
        _warn(account.text(": the micro-batch is dropped from its window."))

    def _report(self, incident: Incident, findings: Findings, streak: int) -> None:
        """Write down gradients that are not finite, and tell of them.

        Raises:
            NonFiniteGradientError: As :meth:`judge` says.
        """
        facts = {**incident.place, "policy": self._policy, "streak": streak, **findings.facts()}
        bundle = self._evidence.record(incident, facts, self.rewind, is_guilty=incident.is_guilty(findings))
        done = "non-finite entries become 0" if self._policy == "zero" else "the step is skipped"
        account = _Account(f"Non-finite gradients at {incident}", findings.describe(), done, _ADVICE, bundle)
        if self._policy == "raise":
            raise NonFiniteGradientError(account.text("."))
        self._tell(incident, account, streak)

    def _tell(self, incident: Incident, account: _Account, streak: int) -> None:
        """Warn of a bad step; at the end of a streak go back, or raise.

        Raises:
            NonFiniteGradientError: If the streak ends here, and the run cannot go back.
        """
        number = f"bad step {streak} in a row"
        if not self._is_over(streak):
            end = "" if self._policy == "ignore" else f", {self._max_consecutive} stop the run"
            _warn(account.text(f": {account.done} ({number}{end})."))
        elif self._can_go_back(streak):
            _warn(account.text(f": {number}. {self._go_back(incident)}"))
        else:
            raise NonFiniteGradientError(account.text(f": {number} ({self._cap}).", account.advice))

    def _is_over(self, streak: int) -> bool:
        """Whether a streak ends with this step: what is ignored has no end."""
        return streak >= self._max_consecutive and self._policy != "ignore"

    def _can_go_back(self, streak: int) -> bool:
        """Whether a streak ends in a rollback."""
        is_over = self._is_over(streak) and self.rollbacks < self._max_rollbacks
        return is_over and self.rollback is not None and self.rollback.step is not None

    def _go_back(self, incident: Incident) -> str:
        """Have the run go back to earlier weights at the end of this step; that in a sentence, and in a line of the journal."""
        rollback = self.rollback
        assert rollback is not None
        self.rollbacks += 1
        for counters in self.counters.values():
            counters.streak = 0
        facts = {"rollback": self.rollbacks, "back_to": rollback.step, "lr_factor": rollback.factor}
        self._evidence.note({**incident.place, "policy": "rollback", "stage": f"back to step {rollback.step}", **facts})
        rates = "" if rollback.factor == 1.0 else f", with {rollback.factor:.4g} times the learning rates of then"
        rollback.ask()
        return (
            f"The run goes back to where it was before step {rollback.step}{rates} "
            f"(rollback {self.rollbacks} of {self._max_rollbacks})."
        )

    @property
    def _cap(self) -> str:
        """For the error at the end of a streak: what allowed no more."""
        cap = f"max_consecutive={self._max_consecutive}"
        if not self._max_rollbacks:
            return cap
        if self.rollbacks >= self._max_rollbacks:
            return f"{cap}, after {self.rollbacks} rollbacks, max_rollbacks={self._max_rollbacks}"
        return f"{cap}, and no good step to go back to{self.rollback.since if self.rollback else ''}"

    def state_dict(self) -> dict[str, Any]:
        """What is counted."""
        return {
            "counters": {index: asdict(counters) for index, counters in self.counters.items()},
            "rollbacks": self.rollbacks,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self.counters = {int(index): Counters(**counters) for index, counters in state_dict["counters"].items()}
        self.rollbacks = state_dict["rollbacks"]

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without what belongs to one Trainer's fit."""
        return self.__dict__ | {"rewind": None, "rollback": None}


def _warn(text: str) -> None:
    rank_zero_warn(text, category=RuntimeWarning)
