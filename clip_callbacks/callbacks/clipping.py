"""GradientClipping."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_warn

from clip_callbacks.blocks import Scope, no_match
from clip_callbacks.callbacks._lane import Lane
from clip_callbacks.callbacks._member import Member
from clip_callbacks.callbacks.guard import NonFiniteGuard
from clip_callbacks.limits import Limit, LimitState, as_max_norm
from clip_callbacks.nonfinite import Policy, as_policy
from clip_callbacks.norms import as_norm_type
from clip_callbacks.rules import ClipRule, ClipState


class GradientClipping(Member):
    r"""Clips gradient norms, globally or locally, guards against NaN and Inf, and logs what it does.

    .. math::
        g \leftarrow g \cdot \min\Bigl(1, \frac{\text{max\_norm}}{n + 10^{-6}}\Bigr),
        \qquad n = \Bigl(\sum_j |g_j|^p\Bigr)^{1/p}

    with one norm :math:`n` for each block of ``scope``. With a fixed ``max_norm`` and the scope "global", training in float32
    has the same bits as under ``Trainer(gradient_clip_val=max_norm)``, as long as gradients are finite.

    Where all gradients get one factor and the optimizer is a fused one of ``torch.optim``, they are not multiplied here: the
    optimizer's kernel divides them by ``optimizer.grad_scale`` on its way, which gives the same but for rounding. That is also how
    16-mixed precision works with fused optimizers, which Lightning's own clipping refuses. Between this hook and the step such
    gradients are not clipped yet, and under 16-mixed not unscaled.

    Metrics: ``grad/total_norm`` and ``grad/clipped_norm`` (before and after, in the unit of the gradients), ``grad/clip_coef``,
    ``grad/max_norm``, ``grad/clip_fraction``, ``grad/skipped_steps``; at the end of an epoch ``grad/total_norm_p50``, ``_p90``,
    ``_p99`` and ``grad/clip_fraction_epoch``.

    Source: Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", ICML 2013. Unlike there, the
    threshold itself is not scaled by the dimension, and 1e-6 is added to the norm, as in torch.

    Args:
        max_norm: The limit: a number above 0, a Limit, or None (or inf) to measure and change nothing.
        scope: Which entries share one norm: "global" (all that the optimizer holds), "group" (an optimizer's parameter group),
            "layer" (the parameters that one module owns directly) or "parameter" (one tensor). All but "global" are local norms.
        norm_type: The order p of the norm, above 0; "inf" is the maximum norm.
        rules: Several stages in order, all from one read of the gradients; ``max_norm`` and ``scope`` are left at their defaults.
        clip_value: Afterwards every entry is clamped to [-clip_value, clip_value].
        nonfinite: What to do with a step whose gradients hold NaN or inf: "skip" it, "raise" an error, "zero" those entries,
            or "ignore" them. Short for a NonFiniteGuard with its defaults; one in the same Trainer takes its place.
        prog_bar: Whether the progress bar shows total_norm and clip_coef.

    Raises:
        ValueError: If an argument is out of its range, or both ``rules`` and ``max_norm`` or ``scope`` are given.
        TypeError: If ``rules`` holds anything but rules.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[GradientClipping(1.0)], logger=False, enable_checkpointing=False)
    """

    kind = "clipping"

    def __init__(
        self,
        max_norm: float | Literal["inf"] | Limit | None = 1.0,
        *,
        scope: Scope = "global",
        norm_type: float | Literal["inf"] = 2.0,
        rules: list[ClipRule] | None = None,
        clip_value: float | None = None,
        nonfinite: Policy = "skip",
        prog_bar: bool = False,
    ) -> None:
        super().__init__()
        self.rules = _as_rules(max_norm, scope, rules)
        self.norm_type: float = as_norm_type(norm_type)
        self.clip_value = None if clip_value is None else as_max_norm(clip_value, "clip_value")
        self.guard = NonFiniteGuard(as_policy(nonfinite, "nonfinite"))
        self.prog_bar = prog_bar
        self._rules: dict[int, list[ClipRule]] = {}
        self._states: dict[int, ClipState] = {}

    def bind(self, lanes: Sequence[Lane], names: Sequence[str], *, renew: bool = False) -> None:
        """Find the rules that hold for each optimizer, and their states.

        Raises:
            ValueError: If a rule's pattern matches no parameter, or a restored state is that of other rules.
        """
        super().bind(lanes, names, renew=renew)
        for rule in () if renew else self.rules:
            if not _matches(rule, [*names, *(name for lane in lanes for name in lane.table.names)]):
                raise ValueError(no_match(str(rule.params), names))
            if not any(_matches(rule, lane.table.names) for lane in lanes):
                rank_zero_warn(f"The rule for {rule.params!r} holds for no parameter that an optimizer holds now.", stacklevel=2)
        for lane in lanes:
            rules = [rule for rule in self.rules if _matches(rule, lane.table.names)]
            fresh = tuple(rule.stage(lane.table).init() for rule in rules)
            state = self._states.get(lane.index, fresh)
            if not _shapes(state) and not _shapes(fresh):
                state = fresh  # rules that remember nothing may change between runs
            if not _fits(state, fresh):
                if not renew:
                    raise ValueError(
                        f"the checkpoint's state of GradientClipping must fit its rules and optimizer {lane.index}, got limits of "
                        f"shapes {_shapes(state)} for {_shapes(fresh)}. Resume with the rules it was saved with."
                    )
                state = fresh
            self._rules[lane.index], self._states[lane.index] = rules, state
        self.guard.bind(lanes, names, renew=renew)

    def forget(self) -> None:
        """Begin a new run."""
        super().forget()
        self._states = {}
        self.guard.forget()

    def rules_of(self, index: int) -> list[ClipRule]:
        """The rules that hold for an optimizer."""
        return self._rules[index]

    def state_of(self, index: int) -> ClipState:
        """Their states."""
        return self._states[index]

    def keep(self, index: int, state: ClipState) -> None:
        """Remember their states until the next step."""
        self._states[index] = state

    def state_dict(self) -> dict[str, Any]:
        """Limits' states and the guard's counters."""
        return super().state_dict() | {"limits": self._states, "guard": self.guard.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned.

        Raises:
            ValueError: If the state is not one of this callback.
        """
        super().load_state_dict(state_dict)
        self._states = {int(index): tuple(states) for index, states in state_dict["limits"].items()}
        self.guard.load_state_dict(state_dict["guard"])


def _as_rules(max_norm: object, scope: Scope, rules: list[ClipRule] | None) -> list[ClipRule]:
    if rules is None:
        return [ClipRule(max_norm, scope)]  # type: ignore[arg-type]
    if max_norm != 1.0 or scope != "global":
        raise ValueError(
            f"`rules` must not be given beside `max_norm` or `scope`, got rules and max_norm={max_norm!r}, scope={scope!r}. "
            "Each rule has its own max_norm and scope."
        )
    if not all(isinstance(rule, ClipRule) for rule in rules):
        raise TypeError(f"`rules` must be a list of ClipRule, got {rules!r}.")
    if not rules:
        raise ValueError("`rules` must hold at least one ClipRule, got []. To measure without clipping, set max_norm=None.")
    return list(rules)


def _matches(rule: ClipRule, names: Sequence[str]) -> bool:
    return rule.params is None or any(re.search(rule.params, name) for name in names)


def _shapes(state: Sequence[LimitState]) -> list[dict[str, tuple[int, ...]]]:
    return [{key: tuple(value.shape) for key, value in limit.items()} for limit in state if limit]


def _fits(state: ClipState, fresh: ClipState) -> bool:
    """Whether a restored state is one of these rules."""
    return len(state) == len(fresh) and _shapes(state) == _shapes(fresh)
