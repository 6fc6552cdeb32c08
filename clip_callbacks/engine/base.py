"""What the four callbacks have in common: they join one pass, and the first of them in the Trainer's list drives it."""

# mypy: disable-error-code="override"
# hooks are given one Lightning's Trainer or the other's, which a type checker takes for strangers

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from clip_callbacks.core.step_report import StepReport
from clip_callbacks.engine.engine import Pass
from clip_callbacks.publishing.charts import lay_out_charts
from clip_callbacks.trainer.checks import check_trainer
from clip_callbacks.trainer.compat import TwinCallback
from clip_callbacks.trainer.optimizer_context import Lane

Kind = Literal["clipping", "guard", "rescaling", "monitor"]


class Member(Callback, TwinCallback):  # type: ignore[misc]
    """One callback of the family, for Trainers of ``lightning.pytorch`` and of ``pytorch_lightning``.

    Attributes:
        last_report: What the last optimizer step's pass found and did; None before the first.
    """

    kind: ClassVar[Kind]
    state_key: str = ""
    """An attribute and no property: Lightning asks for it in every hook of every callback."""
    norm_type: float | None = None
    """The order of norms that this member asks for; None takes any."""

    def __init__(self) -> None:
        super().__init__()
        self.last_report: StepReport | None = None
        self._pass: Pass | None = None
        self._history: dict[int, dict[str, Any]] = {}
        self._skipped_steps = 0
        self._is_loaded = False
        # until it is set up, the instance: a Trainer given two of a class then leaves it to us to say what is wrong
        self.state_key = f"{self._stable_key}@{id(self)}"

    @property
    def skipped_steps(self) -> int:
        """How many optimizer steps of this run were skipped for non-finite gradients so far, over all optimizers."""
        return self._pass.skipped_steps if self._pass else self._skipped_steps

    @property
    def _stable_key(self) -> str:
        return type(self).__qualname__

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be done right before anything is trained."""
        self.state_key = self._stable_key
        if stage == "fit":
            check_trainer(trainer, pl_module, family(trainer))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Assemble the members into one pass; the first one does it for all."""
        members = family(trainer)
        if members[0] is self:
            for member in members:
                if not member._is_loaded:
                    member.forget()
            the_pass = self._assemble(trainer, pl_module, members)
            lay_out_charts(trainer, the_pass.roles, the_pass.lanes)

    @staticmethod
    def _assemble(trainer: Trainer, module: LightningModule, members: Sequence[Member]) -> Pass:
        for member in members:
            member.begin()
        the_pass = Pass(trainer, module, members)
        for member in members:
            member._pass, member._is_loaded = the_pass, False
        return the_pass

    def forget(self) -> None:
        """Begin a new run: what an earlier fit left, and no checkpoint brought, does not count."""
        self._history = {}
        self._skipped_steps = 0

    def begin(self) -> None:
        """Begin a fit: what no checkpoint brings does not outlive the last one."""

    def take_history(self) -> dict[int, dict[str, Any]]:
        """Hand over the histories of optimizers that a checkpoint brought, by their numbers."""
        history, self._history = self._history, {}
        return history

    def bind(self, lanes: Sequence[Lane], names: Sequence[str], *, renew: bool = False) -> None:
        """Meet the optimizers, before the first step or after one of them took on other parameters.

        Args:
            lanes: The optimizers.
            names: Of all parameters of the module.
            renew: Whether an optimizer changed in mid-run.
        """

    def observe(self, lane: Lane, report: StepReport, *, healthy: bool) -> None:
        """See what a step reported.

        Args:
            lane: The optimizer.
            report: Of the step.
            healthy: Whether every gradient was finite.
        """
        self.last_report = report

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take hold of where metrics go; where the strategy loads checkpoints late, take up what they brought."""
        leading = self._leading()
        if leading and any(member._is_loaded for member in leading.members):
            leading.close()
            self._assemble(trainer, pl_module, leading.members)
            leading = self._leading()
        if leading:
            leading.open(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep what a skipped step would have to put back."""
        if leading := self._leading():
            leading.begin_batch(trainer, pl_module, batch, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Remember the loss until the step, to be looked at only if the step is bad."""
        if leading := self._leading():
            leading.before_backward(loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop a bad micro-batch, if the guard is told to."""
        if leading := self._leading():
            leading.after_backward(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Run the pass: the gradients are ready, the optimizer has not moved."""
        if leading := self._leading():
            leading.step(trainer, pl_module, optimizer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Publish what the batch's optimizer steps reported."""
        if leading := self._leading():
            leading.end_batch(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Publish the metrics of the epoch."""
        if leading := self._leading():
            leading.end_epoch(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum up."""
        if leading := self._leading():
            leading.summarize()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizers and their parameters; what a checkpoint needs stays."""
        if leading := self._leading():
            if not self._is_loaded:  # by a strategy that loads late, and nothing was left to train
                self._history = leading.history_state()
            leading.close()
        self._skipped_steps, self._pass = self.skipped_steps, None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Learn what is pending, before a checkpoint is made of it; leave no hook on an optimizer."""
        if leading := self._leading():
            leading.settle_at_last()
            leading.close()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if it had not stopped."""
        if self._pass:
            self._pass.settle()
        leading = self._leading()
        return {"history": leading.history_state() if leading else self._history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned.

        Raises:
            ValueError: If the state is not one of this callback.
        """
        missing = sorted(self.state_dict().keys() - state_dict.keys())
        if missing:
            got = f"got keys {sorted(state_dict)} without {missing}"
            raise ValueError(f"the checkpoint's state must be one of {type(self).__name__}, {got}.")
        self._history = {int(index): history for index, history in state_dict["history"].items()}
        self._is_loaded = True

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without the pass: it belongs to one Trainer's fit."""
        return self.__dict__ | {"_pass": None, "last_report": None}

    def _leading(self) -> Pass | None:
        return self._pass if self._pass is not None and self._pass.leader is self else None


def family(trainer: Trainer) -> list[Member]:
    """The members in a Trainer, in its order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, Member)]  # type: ignore[attr-defined]
