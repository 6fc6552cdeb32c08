"""Which metric of a log is the norm of all gradients: ours, else one that others log and that its name tells."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from clip_callbacks.core.metric_names import BLOCK_NORM, RULE_TOTAL_NORM, TOTAL_NORM
from clip_callbacks.stats.advice import EUCLIDEAN

OWN_TOTAL_NORM = re.compile(rf"(?:.+-)?{TOTAL_NORM}(?P<suffix>-.*)?$")
"""Ours, with the prefix of its logger and the suffix of its optimizer."""
OWN_PARTIAL_NORM = re.compile(rf"(?:.+-)?(?:{BLOCK_NORM}|{RULE_TOTAL_NORM.format('.+')})")
"""Ours of a block or of a rule, whatever these are called."""
LIGHTNING_TOTAL_NORM = re.compile(
    r"(?:.*[^A-Za-z0-9])?grad_(?P<order>inf|[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)_norm_total(?:_step)?$"
)
"""What Lightning's ``grad_norm(module, norm_type)`` calls the norm of all gradients."""
GRADIENT_WORDS, NORM_WORDS, GRADIENT_NORM_WORDS = (
    {"grad", "grads", "gradient", "gradients"},
    {"norm", "norms"},
    {"gnorm", "gradnorm"},
)
TOTAL_WORDS = {"total", "global", "overall", "l2", "train", "training", "step"}
"""Words beside those for gradient and norm with which a name still tells the norm of all gradients at a step."""
EVALUATION_WORDS = {"val", "valid", "validation", "dev", "eval", "evaluation", "test"}
"""Words for data that nothing is trained on: a norm of theirs is no norm of a step."""
STEP_SUFFIX, EPOCH_SUFFIX = "_step", "_epoch"
"""What Lightning adds to a name that is logged for steps and for epochs."""
TOTAL_ENDING = re.compile(r"[_./-](total|global|overall)$")
MAX_LISTED_METRICS = 8
"""Metrics that a message names."""


@dataclass(frozen=True)
class NormMetric:
    """A metric that is the norm of all gradients of one optimizer.

    Args:
        name: As it is in the log.
        suffix: What the names of other metrics of that optimizer end with; empty if there is one optimizer.
        is_ours: Whether a callback of clip_callbacks logged it.
        norm_type: The order p, as far as the name tells it.
    """

    name: str
    suffix: str = ""
    is_ours: bool = True
    norm_type: float | None = None

    @property
    def title(self) -> str:
        """What it is called in texts and pictures."""
        return "total_norm" if self.is_ours else self.name

    def block(self, name: str) -> str | None:
        """The block whose norm another metric is; None if it is something else."""
        if self.is_ours:
            is_block = name.startswith(BLOCK_NORM) and name.endswith(self.suffix)
            return name.removeprefix(BLOCK_NORM).removesuffix(self.suffix) if is_block else None
        fork = STEP_SUFFIX if self.name.endswith(STEP_SUFFIX) else ""
        alone = self.name.removesuffix(fork)
        head = TOTAL_ENDING.sub("", alone)
        if name in {alone, alone + STEP_SUFFIX, alone + EPOCH_SUFFIX} or not (name.startswith(head) and name.endswith(fork)):
            return None
        rest = name.removeprefix(head).removesuffix(fork)
        separators = "/" if self.norm_type is None else "/._-:|"  # Lightning's utility takes any
        return rest[1:] if rest[1:] and rest[0] in separators else None


def find_norms(names: Collection[str], wanted: Sequence[str] = ()) -> tuple[NormMetric, ...]:
    """The norms of all gradients that a log holds, one for each optimizer.

    Those wanted, if any are. Else ours; else the first of the others by their names, since they may be the same norm: Lightning's
    ``grad_2.0_norm_total``, then those of other orders, then names of the fewest words beside those for gradient, norm and all, the
    shortest. Norms of a validation or a test come last.

    Args:
        names: The metrics of the log.
        wanted: Those that are to be read, whatever their names.
    """
    if wanted:
        found = [name for name in dict.fromkeys(wanted) if name in names]
        return tuple(_wanted(name, alone=len(found) == 1) for name in found)
    own = [NormMetric(name, match["suffix"] or "") for name in names if (match := OWN_TOTAL_NORM.match(name))]
    return tuple(sorted(own, key=lambda norm: norm.suffix)) or tuple(norms_of_others(names)[:1])


def norms_of_others(names: Collection[str]) -> list[NormMetric]:
    """The norms of all gradients that are not ours, in the order in which they are preferred."""
    has_own = any(OWN_TOTAL_NORM.match(name) for name in names)
    theirs = [name for name in names if not (OWN_TOTAL_NORM.match(name) or (has_own and OWN_PARTIAL_NORM.match(name)))]
    found = [_of_others(name, match) for name in theirs if (match := LIGHTNING_TOTAL_NORM.match(name)) or _tells_all(name)]
    return sorted(found, key=_preference)


def _preference(norm: NormMetric) -> tuple[bool, bool, bool, float, int, int, str]:
    order, words = norm.norm_type, _words(norm.name)
    others = len(words - GRADIENT_WORDS - NORM_WORDS - GRADIENT_NORM_WORDS - TOTAL_WORDS)
    return bool(words & EVALUATION_WORDS), order is None, order != EUCLIDEAN, order or 0.0, others, len(norm.name), norm.name


def _wanted(name: str, *, alone: bool) -> NormMetric:
    if match := OWN_TOTAL_NORM.match(name):
        return NormMetric(name, match["suffix"] or "")
    return _of_others(name, LIGHTNING_TOTAL_NORM.match(name), "" if alone else f"-{name}")


def _of_others(name: str, match: re.Match[str] | None, suffix: str = "") -> NormMetric:
    return NormMetric(name, suffix, is_ours=False, norm_type=float(match["order"]) if match else None)


def _tells_all(name: str) -> bool:
    """Whether a name, or its end behind folders or a logger's prefix, is words for gradient, norm and all, and nothing else."""
    ends = [name, *(name[at.end() :] for at in re.finditer("[/-]", name))]
    return any(
        _says_norm(words := _words(end)) and words <= GRADIENT_WORDS | NORM_WORDS | GRADIENT_NORM_WORDS | TOTAL_WORDS
        for end in ends
    )


def _words(name: str) -> set[str]:
    return set(re.findall("[a-z0-9]+", re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()))


def _says_norm(words: set[str]) -> bool:
    """Whether words are those of a norm of gradients."""
    return bool(words & GRADIENT_NORM_WORDS or (words & GRADIENT_WORDS and words & NORM_WORDS))


def norm_candidates(names: Collection[str]) -> list[str]:
    """The metrics whose names speak of gradients or of norms: norms of all gradients first, then those that speak of both."""
    hints = {name: _words(name) for name in names if re.search("grad|norm", name, re.IGNORECASE)}
    known = {norm.name for norm in norms_of_others(names)} | {name for name in names if OWN_TOTAL_NORM.match(name)}
    return sorted(hints, key=lambda name: (name not in known, not _says_norm(hints[name]), len(name), name))


def missing_norm_message(source: str, names: Collection[str], wanted: Sequence[str] = ()) -> str:
    """What to say of a log without a norm of all gradients, and what to do."""
    if wanted:
        missing = f"{source} holds no metric {' or '.join(map(repr, wanted))}."
    else:
        missing = f"{source} holds no {TOTAL_NORM}, nor another metric whose name tells that it is the norm of all gradients."
    if looks := norm_candidates(names):
        return f"{missing} These look like norms: {_listed(looks)}; --norm METRIC reads one of them."
    held = f" (it holds {_listed(sorted(names))}; --norm METRIC reads any of them)" if names else ""
    advice = f"GradientClipping(None) in the Trainer logs {TOTAL_NORM} and changes nothing."
    return f"{missing} No metric of it looks like one{held}: {advice}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_LISTED_METRICS} more" if len(names) > MAX_LISTED_METRICS else ""
    return ", ".join(names[:MAX_LISTED_METRICS]) + more
