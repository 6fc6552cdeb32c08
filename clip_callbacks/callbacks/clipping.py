"""GradientClipping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_warn

from clip_callbacks.callbacks.guard import NonFiniteGuard
from clip_callbacks.core.arguments import as_max_norm, as_norm_type
from clip_callbacks.core.blocks import Scope
from clip_callbacks.core.limit_state import Held, adopt
from clip_callbacks.core.limits import Limit, as_limit, labels
from clip_callbacks.core.nonfinite import Policy, as_policy
from clip_callbacks.core.rules import ClipRule, ClipState
from clip_callbacks.engine.base import Member
from clip_callbacks.trainer.optimizer_context import Lane


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
            "layer" (the parameters that one module owns directly), "parameter" (one tensor) or "unit" (one output row of a tensor;
            tensors of one dimension are one unit). All but "global" are local norms.
        norm_type: The order p of the norm, above 0; "inf" is the maximum norm.
        rules: Several stages in order, from one read of the gradients; ``max_norm`` and ``scope`` are left at their defaults.
            Each logs ``grad/<name>/total_norm``, ``max_norm``, ``clip_coef``, ``clip_fraction``; ``name`` may be ``rule_1``.
        clip_value: Afterwards every entry is clamped to [-clip_value, clip_value].
        nonfinite: What to do with a step whose gradients hold NaN or inf: "skip" it, "raise" an error, "zero" those entries,
            or "ignore" them. Short for a NonFiniteGuard with its defaults; one in the same Trainer takes its place.
        prog_bar: Whether the progress bar shows total_norm and clip_coef.
        shadow: Other limits, or numbers, to try on the same norms (of the scope, or of the first rule) without touching gradients:
            ``grad/shadow_clip_fraction/<limit>`` and the table at the end of fit tell how many steps each would have clipped.

    Raises:
        ValueError: If an argument is out of its range, or both ``rules`` and ``max_norm`` or ``scope`` are given.
        TypeError: If ``rules`` holds anything but rules, or ``shadow`` is no list.

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
        shadow: list[float | Limit] | None = None,
    ) -> None:
        super().__init__()
        self.rules = _as_rules(max_norm, scope, rules)
        if shadow is not None and not isinstance(shadow, (list, tuple)):
            raise TypeError(f"`shadow` must be a list of limits and numbers, got {shadow!r}.")
        self.shadow = [as_limit(limit, "shadow") for limit in shadow or ()]
        self.norm_type: float = as_norm_type(norm_type)
        self.clip_value = None if clip_value is None else as_max_norm(clip_value, "clip_value")
        self.guard = NonFiniteGuard(as_policy(nonfinite, "nonfinite"))
        self.prog_bar = prog_bar
        self._rules: dict[int, list[ClipRule]] = {}
        self._shadows: dict[int, list[ClipRule]] = {}
        self._held: dict[int, dict[str, Held]] = {}
        self._held_by_shadows: dict[int, dict[str, Held]] = {}
        self._restored: tuple[dict[int, dict[str, Held]], dict[int, dict[str, Held]]] = {}, {}

    def bind(self, lanes: Sequence[Lane], names: Sequence[str], *, renew: bool = False) -> None:
        """Find the rules that hold for each optimizer, and their states.

        Raises:
            ValueError: If a rule's pattern matches no parameter, or a restored state is that of other rules.
        """
        super().bind(lanes, names, renew=renew)
        for rule in () if renew else self.rules:
            rule.selection.check(list(dict.fromkeys([*names, *(name for lane in lanes for name in lane.table.names)])))
            if not any(_holds(rule, lane) for lane in lanes):
                which = f"all but {rule.exclude!r}" if rule.params is None else repr(rule.params)
                rank_zero_warn(f"The rule for {which} holds for no parameter that an optimizer holds now.", stacklevel=2)
        for lane in lanes:
            rules = {key: _narrowed(rule, lane) for key, rule in self._named_rules().items() if _holds(rule, lane)}
            self._rules[lane.index] = list(rules.values())
            whose = f"GradientClipping for optimizer {lane.index}"
            self._held[lane.index] = self._adopted(rules, lane, self._held, self._restored[0], whose, strict=not renew)
            self._bind_shadows(lane)
        self.guard.bind(lanes, names, renew=renew)

    def _bind_shadows(self, lane: Lane) -> None:
        """Shadows may change between runs: they decide nothing."""
        first = self.rules[0]
        each = zip(self.shadow, labels(self.shadow), strict=True)
        shadows = {name: _narrowed(replace(first, max_norm=limit, name=name), lane) for limit, name in each if _holds(first, lane)}
        self._shadows[lane.index] = list(shadows.values())
        held, restored = self._held_by_shadows, self._restored[1]
        self._held_by_shadows[lane.index] = self._adopted(shadows, lane, held, restored, "shadow", strict=False)
        lane.history.keep_only([rule.name for rule in self._rules[lane.index] if rule.name], list(shadows))

    @staticmethod
    def _adopted(
        rules: dict[str, ClipRule],
        lane: Lane,
        held: dict[int, dict[str, Held]],
        restored: dict[int, dict[str, Held]],
        whose: str,
        *,
        strict: bool,
    ) -> dict[str, Held]:
        known = [source.get(lane.index, {}) for source in (held, restored)]
        return {
            key: adopt(Held.fresh(rule, lane.table), [source.get(key) for source in known], whose, strict=strict)
            for key, rule in rules.items()
        }

    def _named_rules(self) -> dict[str, ClipRule]:
        """By their names, which each of several rules needs for its metrics."""
        named = zip(_names(self.rules), self.rules, strict=True)
        return {name: replace(rule, name=name) if len(self.rules) > 1 else rule for name, rule in named}

    def forget(self) -> None:
        """Begin a new run."""
        super().forget()
        self._held, self._held_by_shadows, self._restored = {}, {}, ({}, {})
        self.guard.forget()

    def rules_of(self, index: int) -> list[ClipRule]:
        """The rules that hold for an optimizer."""
        return self._rules[index]

    def shadows_of(self, index: int) -> list[ClipRule]:
        """The limits that are tried on it, as rules."""
        return self._shadows[index]

    def state_of(self, index: int) -> ClipState:
        """The states of both."""
        return tuple(held.state for held in self._each_held(index))

    def keep(self, index: int, state: ClipState) -> None:
        """Keep them for the next step."""
        for held, after in zip(self._each_held(index), state, strict=True):
            held.state = after

    def _each_held(self, index: int) -> list[Held]:
        return [*self._held[index].values(), *self._held_by_shadows[index].values()]

    def state_dict(self) -> dict[str, Any]:
        """Limits' states and the guard's counters."""
        return super().state_dict() | {
            "limits": _dumped(self._held or self._restored[0]),
            "shadows": _dumped(self._held_by_shadows or self._restored[1]),
            "guard": self.guard.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned.

        Raises:
            ValueError: If the state is not one of this callback.
        """
        super().load_state_dict(state_dict)
        self._restored = _loaded(state_dict["limits"]), _loaded(state_dict["shadows"])
        self._held, self._held_by_shadows = {}, {}
        self.guard.load_state_dict(state_dict["guard"])


def _as_rules(max_norm: object, scope: Scope, rules: list[ClipRule] | None) -> list[ClipRule]:
    if rules is None:
        return [ClipRule(max_norm, scope)]  # type: ignore[arg-type]
    if max_norm != 1.0 or scope != "global":
        raise ValueError(
            f"`rules` must not be given beside `max_norm` or `scope`, got rules and max_norm={max_norm!r}, scope={scope!r}. "
            "Each rule has its own max_norm and scope."
        )
    if not isinstance(rules, (list, tuple)) or not all(isinstance(rule, ClipRule) for rule in rules):
        raise TypeError(f"`rules` must be a list of ClipRule, got {rules!r}.")
    if not rules:
        raise ValueError("`rules` must hold at least one ClipRule, got []. To measure without clipping, set max_norm=None.")
    _check_names(rules)
    return list(rules)


def _names(rules: Sequence[ClipRule]) -> list[str]:
    return [rule.name or f"rule_{number}" for number, rule in enumerate(rules, 1)]


def _check_names(rules: Sequence[ClipRule]) -> None:
    names = _names(rules)
    if len(set(names)) < len(names):
        raise ValueError(f"`name` must be another one for each rule, got {', '.join(names)}: metrics are called by it.")


def _dumped(held: dict[int, dict[str, Held]]) -> dict[int, dict[str, Any]]:
    return {index: {key: each.dump() for key, each in by_rule.items()} for index, by_rule in held.items()}


def _loaded(saved: dict[int, dict[str, Any]]) -> dict[int, dict[str, Held]]:
    return {int(index): {key: Held.load(each) for key, each in by_rule.items()} for index, by_rule in saved.items()}


def _holds(rule: ClipRule, lane: Lane) -> bool:
    return rule.selection.among(lane.table.names) is not None


def _narrowed(rule: ClipRule, lane: Lane) -> ClipRule:
    """The rule for an optimizer that may hold none of what is excluded."""
    selection = rule.selection.among(lane.table.names)
    return rule if selection is None or selection.exclude == rule.exclude else replace(rule, exclude=None)
