"""The callback GradientClipping."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, Literal

from clip_callbacks.clipping.clipper import Clipper, names_of
from clip_callbacks.clipping.limit_memory import LimitMemory
from clip_callbacks.core.arguments import as_flag, as_max_norm, as_norm_type
from clip_callbacks.core.blocks import Scope
from clip_callbacks.core.limits import Limit, as_limit
from clip_callbacks.core.nonfinite import Policy, as_policy
from clip_callbacks.core.rules import ClipRule, check_names, check_rules, check_shadow
from clip_callbacks.engine.base import GradientCallback
from clip_callbacks.engine.components import Parts
from clip_callbacks.engine.resume import State, bad_step_counts
from clip_callbacks.guard.guard import Guard, check_saved
from clip_callbacks.guard.options import GuardOptions
from clip_callbacks.trainer.checks import CallbackFacts

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class GradientClipping(GradientCallback):
    r"""Keeps gradients from exploding: clips their norm, skips steps with NaN or Inf gradients, and logs the norms.

    .. math::
        g \leftarrow g \cdot \min\Bigl(1, \frac{\text{max\_norm}}{n + 10^{-6}}\Bigr),
        \qquad n = \Bigl(\sum_j |g_j|^p\Bigr)^{1/p}

    with one norm :math:`n` for each block of ``scope``. With a fixed ``max_norm`` and the scope "global", training in float32 has
    the same bits as with ``Trainer(gradient_clip_val=max_norm)``, as long as gradients are finite.

    If all gradients get one factor and the optimizer is a fused one of ``torch.optim``, the optimizer's kernel applies the
    factor, by dividing the gradients by ``optimizer.grad_scale``; the result differs by rounding only. So fused optimizers can be
    clipped under 16-mixed precision, which Lightning's own clipping refuses. Between the clipping hook and the optimizer step
    such gradients are not clipped yet, and under 16-mixed still multiplied by the loss scale.

    Metrics: ``grad/total_norm`` and ``grad/clipped_norm`` (before and after clipping, in the unit of the gradients),
    ``grad/clip_coef``, ``grad/max_norm``, ``grad/clip_fraction``, ``grad/skipped_steps``; at the end of an epoch
    ``grad/total_norm_p50``, ``_p90``, ``_p99`` and ``grad/clip_fraction_epoch``.

    Source: Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", ICML 2013. Unlike there, the
    threshold itself is not scaled by the dimension, and 1e-6 is added to the norm, as in torch.

    Args:
        max_norm: Limit of the norm in the unit of the gradients: a number above 0, a Limit, or None (or inf) to measure and change
            nothing.
        scope: Gradient entries that share one norm: "global" (all that the optimizer holds), "group" (an optimizer's parameter
            group), "layer" (the parameters that one module owns directly), "parameter" (one tensor) or "unit" (one output row of a
            tensor; a tensor of one dimension is one unit). All but "global" are local norms.
        norm_type: Order p of the norm, above 0; "inf" is the maximum norm.
        rules: Several stages of clipping in order, from one read of the gradients, in place of ``max_norm`` and ``scope``. Each
            logs ``grad/<name>/total_norm``, ``max_norm``, ``clip_coef`` and ``clip_fraction``, with the rule's name or ``rule_1``
            and so on.
        clip_value: Largest absolute value of a gradient entry, above 0: entries are clamped to [-clip_value, clip_value] after norm
            clipping. None leaves them alone.
        nonfinite: Policy for a step whose gradients hold NaN or Inf: "skip" it, "raise" an error, "zero" those entries, or "ignore"
            them. Without a NonFiniteGuard this works like one with that policy; beside a NonFiniteGuard only "skip" is accepted.
        prog_bar: If True, the progress bar shows total_norm and clip_coef.
        shadow: Other limits, or numbers, to try on the same norms (of the scope, or of the first rule) without changing gradients:
            ``grad/shadow_clip_fraction/<limit>`` and the table at the end of the fit tell the share of steps that each would have
            clipped.
        summary: If False, the messages that sum up the run at the end of a fit are left out, those of the other callbacks of this
            package too. The table among them needs a fit of at least 100 optimizer steps.

    Raises:
        ValueError: If an argument is out of its range, or ``rules`` is given beside ``max_norm`` or ``scope``; at fit start, if
            ``nonfinite`` is not the default and the Trainer has a NonFiniteGuard.
        TypeError: If ``rules`` holds anything but rules, or ``shadow`` is not a list.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[GradientClipping(1.0)], logger=False, enable_checkpointing=False)
    """

    _kind = "clipping"

    def __init__(
        self,
        max_norm: float | Literal["inf"] | Limit | None = 1.0,
        *,
        scope: Scope = "global",
        norm_type: float | Literal["inf"] = 2.0,
        rules: list[ClipRule] | None = None,
        clip_value: float | None = None,
        nonfinite: Policy = "skip",
        shadow: list[float | Limit] | None = None,
        prog_bar: bool = False,
        summary: bool = True,
    ) -> None:
        super().__init__()
        self.rules = _as_rules(max_norm, scope, rules)
        check_shadow(shadow)
        self.shadow = [as_limit(limit, "shadow") for limit in shadow or ()]
        self.norm_type: float = as_norm_type(norm_type)
        self.clip_value = None if clip_value is None else as_max_norm(clip_value, "clip_value", " or None")
        self.prog_bar = as_flag(prog_bar, "prog_bar")
        self.summary = as_flag(summary, "summary")
        self._nonfinite = as_policy(nonfinite, "nonfinite")
        self._guard_options = GuardOptions(self._nonfinite)
        self._own_guard: Guard | None = None

    def _facts(self) -> CallbackFacts:
        return CallbackFacts(self._kind, self._stable_key, norm_type=self.norm_type, nonfinite=self._nonfinite)

    def _make_parts(self, trainer: Trainer, module: LightningModule, saved: dict[str, Any]) -> Parts:
        self._part = Clipper(self.rules, self.shadow, self.clip_value, saved)
        # The guard that `nonfinite` stands for. The engine takes it only if no NonFiniteGuard brings one.
        self._own_guard = Guard(trainer, self._guard_options, saved.get("guard", {}))
        return Parts(
            clipper=self._part,
            default_guard=self._own_guard,
            norm_type=self.norm_type,
            shows=self.prog_bar,
            summary=self.summary,
            histories=saved.get("history", {}),
        )

    def _parts_state(self) -> dict[str, Any]:
        assert self._own_guard is not None, "made together with the Clipper, in _make_parts"
        guard = {}
        if self._own_guard.is_in_use:
            guard = self._own_guard.state_dict()
        return {**super()._parts_state(), "guard": guard}

    def _empty_state(self) -> dict[str, Any]:
        return {"limits": {}, "shadows": {}, "guard": {}}

    def _check_state(self, state: State) -> None:
        LimitMemory(state)
        check_saved(state["guard"])

    def _carry_over(self, others: Sequence[State]) -> list[str]:
        reset = super()._carry_over(others)
        if not self._saved.get("guard"):
            guard = {"guard": bad_step_counts(others)}
            self._saved = {"history": {}, **self._empty_state(), **self._saved, **guard}
        return reset

    def _copy_for_search(self) -> GradientClipping:
        searching = copy(self)
        searching._guard_options = self._guard_options.for_search()
        return searching

    def _release_parts(self) -> None:
        super()._release_parts()
        self._own_guard = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave what belongs to one Trainer's fit out of pickles and copies."""
        return super().__getstate__() | {"_own_guard": None}


def _as_rules(max_norm: object, scope: Scope, rules: list[ClipRule] | None) -> list[ClipRule]:
    if rules is None:
        return [ClipRule(max_norm, scope)]  # type: ignore[arg-type]
    if max_norm != 1.0 or scope != "global":
        raise ValueError(
            f"`rules` must not be given beside `max_norm` or `scope`, got rules and max_norm={max_norm!r}, scope={scope!r}. "
            "Give each rule its own max_norm and scope."
        )
    check_rules(rules)
    if not rules:
        raise ValueError("`rules` must hold at least one ClipRule, got []. To measure without clipping, set max_norm=None.")
    check_names(names_of(rules))
    return list(rules)
