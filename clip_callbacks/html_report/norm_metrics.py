"""Find the metric that is the norm of all gradients: ours, or else a metric of other code that is known by its name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from clip_callbacks.core.metric_names import BLOCK_NORM, RULE_TOTAL_NORM, SKIPPED_STEPS, TOTAL_NORM, UPDATE_RATIO, WEIGHT_NORM
from clip_callbacks.core.wording import listed
from clip_callbacks.stats.advice import EUCLIDEAN

OWN_TOTAL_NORM = re.compile(rf"(?:.+-)?{TOTAL_NORM}(?P<suffix>-.*)?$")
"""Our norm of all gradients, with the prefix of its logger and the suffix of its optimizer."""
OWN_SKIPPED_STEPS = re.compile(rf"(?P<prefix>(?:.+-)?){SKIPPED_STEPS}(?P<suffix>-.*)?$")
"""Our count of skipped steps, which is logged for every optimizer, also if none of its norms is finite."""
OWN_PREFIXES = ("grad/", "grad_", UPDATE_RATIO, WEIGHT_NORM)
"""Prefixes of the metrics that clip_callbacks logs."""
OWN_METRIC = re.compile(rf"grad(_[^/]*)?/|{UPDATE_RATIO}|{WEIGHT_NORM}")
"""The beginning of our metrics; grad_penalty_loss is none of them."""
OWN_PARTIAL_NORM = re.compile(rf"(?:.+-)?(?:{BLOCK_NORM}|{RULE_TOTAL_NORM.format('.+')})")
"""Our norms of blocks and rules, whose names the user may have chosen."""
LIGHTNING_TOTAL_NORM = re.compile(
    r"(?:.*[^A-Za-z0-9])?grad_(?P<order>inf|[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)_norm_total(?:_step)?$"
)
"""The name that Lightning's ``grad_norm(module, norm_type)`` gives to the norm of all gradients."""
GRADIENT_WORDS, NORM_WORDS, GRADIENT_NORM_WORDS = (
    {"grad", "grads", "gradient", "gradients"},
    {"norm", "norms"},
    {"gnorm", "gradnorm"},
)
TOTAL_WORDS = {"total", "global", "overall", "l2", "train", "training", "step"}
"""Further words that the name of a norm of all gradients may have beside those for gradient and norm."""
EVALUATION_WORDS = {"val", "valid", "validation", "dev", "eval", "evaluation", "test"}
"""Words for held-out data; a norm with one of them is used only if there is no other."""
STEP_SUFFIX, EPOCH_SUFFIX = "_step", "_epoch"
"""Suffixes that Lightning adds to the name of a metric logged for steps and for epochs."""
TOTAL_ENDING = re.compile(r"[_./-](total|global|overall)$")
"""Ending of a norm of all gradients that the norms of its blocks do not have."""
MAX_LISTED_METRICS = 8
"""The number of metrics that a message lists."""


@dataclass(frozen=True)
class NormMetric:
    """A metric that is the norm of all gradients of one optimizer.

    Args:
        name: Name of the metric in the log.
        suffix: Suffix of the other metrics of that optimizer; empty if there is one optimizer.
        is_ours: If True, a callback of clip_callbacks logged it.
        norm_type: Order p of the norm; None if the name does not tell it.
    """

    name: str
    suffix: str = ""
    is_ours: bool = True
    norm_type: float | None = None

    @property
    def title(self) -> str:
        """Name for texts and plots."""
        return "total_norm" if self.is_ours else self.name

    def block(self, name: str) -> str | None:
        """Return the block whose norm another metric is; None if that metric is something else."""
        if self.is_ours:
            if not (name.startswith(BLOCK_NORM) and name.endswith(self.suffix)):
                return None
            return name.removeprefix(BLOCK_NORM).removesuffix(self.suffix)
        fork = ""
        if self.name.endswith(STEP_SUFFIX):
            fork = STEP_SUFFIX
        alone = self.name.removesuffix(fork)
        head = TOTAL_ENDING.sub("", alone)
        if name in {alone, alone + STEP_SUFFIX, alone + EPOCH_SUFFIX} or not (name.startswith(head) and name.endswith(fork)):
            return None
        rest = name.removeprefix(head).removesuffix(fork)
        separators = "/"
        if self.norm_type is not None:  # Lightning's grad_norm lets the user choose the separator
            separators = "/._-:|"
        if not rest[1:] or rest[0] not in separators:
            return None
        return rest[1:]


def find_norms(names: Collection[str], wanted: Sequence[str] = (), journalled: Iterable[str] = ()) -> tuple[NormMetric, ...]:
    """Find the norms of all gradients in a log, one for each optimizer.

    Our norms take precedence over those of other code. Of the latter only the first is taken, since several may be the same norm:
    Lightning's ``grad_2.0_norm_total``, then its norms of other orders, then the name with the fewest further words, then the
    shortest. Norms of a validation or a test come last. A norm that is not finite is not logged: an optimizer all of whose steps
    were bad has a norm of ours that the log does not hold.

    Args:
        names: Names of all metrics in the log.
        wanted: Names of the metrics to use instead, if any.
        journalled: Suffixes of the metrics of those optimizers that are in the guard's journal.
    """
    if wanted:
        found = [name for name in dict.fromkeys(wanted) if name in names]
        if len(found) == 1:
            return (_wanted(found[0], suffix=""),)
        return tuple(_wanted(name, suffix=f"-{name}") for name in found)
    own = [NormMetric(name, match["suffix"] or "") for name in names if (match := OWN_TOTAL_NORM.match(name))]
    others = norms_of_others(names)
    if others and not own:
        return (others[0],)
    counts = [match for name in names if (match := OWN_SKIPPED_STEPS.match(name))]
    own += _without(own, {match["suffix"] or "": match["prefix"] for match in counts})
    # a journal may be older than the log beside it: one with names of optimizers is of another run than a log without
    are_named = any(norm.suffix for norm in own)
    own += _without(own, {suffix: "" for suffix in journalled if not own or bool(suffix) == are_named})
    return tuple(sorted(own, key=lambda norm: (norm.suffix, norm.name)))


def _without(known: Collection[NormMetric], prefixes: Mapping[str, str]) -> list[NormMetric]:
    """Return norms of ours that the log does not hold, by the prefixes of their names for each suffix, but for suffixes known."""
    suffixes = {norm.suffix for norm in known}
    return [NormMetric(prefix + TOTAL_NORM + suffix, suffix) for suffix, prefix in prefixes.items() if suffix not in suffixes]


def norms_of_others(names: Collection[str]) -> list[NormMetric]:
    """List the norms of all gradients that other code logged, in the order of preference."""
    has_own = any(OWN_TOTAL_NORM.match(name) for name in names)
    theirs = [name for name in names if not (OWN_TOTAL_NORM.match(name) or (has_own and OWN_PARTIAL_NORM.match(name)))]
    found = [_of_others(name, match) for name in theirs if (match := LIGHTNING_TOTAL_NORM.match(name)) or _tells_all(name)]
    return sorted(found, key=_preference)


def _preference(norm: NormMetric) -> tuple[bool, bool, bool, float, int, int, str]:
    order, words = norm.norm_type, words_of(norm.name)
    others = len(words - GRADIENT_WORDS - NORM_WORDS - GRADIENT_NORM_WORDS - TOTAL_WORDS)
    return bool(words & EVALUATION_WORDS), order is None, order != EUCLIDEAN, order or 0.0, others, len(norm.name), norm.name


def _wanted(name: str, suffix: str) -> NormMetric:
    if match := OWN_TOTAL_NORM.match(name):
        return NormMetric(name, match["suffix"] or "")
    return _of_others(name, LIGHTNING_TOTAL_NORM.match(name), suffix)


def _of_others(name: str, match: re.Match[str] | None, suffix: str = "") -> NormMetric:
    norm_type = None
    if match:
        norm_type = float(match["order"])
    return NormMetric(name, suffix, is_ours=False, norm_type=norm_type)


def _tells_all(name: str) -> bool:
    """Return whether a name, or its end behind folders or a prefix, has only words for gradient, norm and total."""
    ends = [name, *(name[at.end() :] for at in re.finditer("[/-]", name))]
    return any(
        _says_norm(words := words_of(end)) and words <= GRADIENT_WORDS | NORM_WORDS | GRADIENT_NORM_WORDS | TOTAL_WORDS
        for end in ends
    )


def words_of(name: str) -> set[str]:
    """Return the words and numbers in the name of a metric, in lower case; trainBCELoss has three words."""
    return set(re.findall("[a-z0-9]+", re.sub("(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()))


def _says_norm(words: set[str]) -> bool:
    """Return whether words name a norm of gradients."""
    return bool(words & GRADIENT_NORM_WORDS or (words & GRADIENT_WORDS and words & NORM_WORDS))


def norm_candidates(names: Collection[str]) -> list[str]:
    """List the metrics whose names mention gradients or norms; norms of all gradients first, then names that mention both.

    Where clip_callbacks logged, its other metrics are no candidates.
    """
    known = {norm.name for norm in norms_of_others(names)} | {name for name in names if OWN_TOTAL_NORM.match(name)}
    has_own = any(OWN_TOTAL_NORM.match(name) or OWN_SKIPPED_STEPS.match(name) for name in names)
    others = [name for name in names if not (has_own and name.startswith(OWN_PREFIXES))]
    hints = {name: words_of(name) for name in [*known, *others] if re.search("grad|norm", name, re.IGNORECASE)}
    return sorted(hints, key=lambda name: (name not in known, not _says_norm(hints[name]), len(name), name))


def missing_norm_message(source: str, names: Collection[str], wanted: Sequence[str] = ()) -> str:
    """Say that a log has no norm of all gradients, and what the user can do."""
    if wanted:
        missing = f"{source} holds no metric {' or '.join(map(repr, wanted))}."
    else:
        missing = f"{source} holds neither {TOTAL_NORM} nor another metric that is known by its name as the norm of all gradients."
    if candidates := norm_candidates(names):
        return f"{missing} These metrics look like norms: {listed(candidates, MAX_LISTED_METRICS)}. Choose one with --norm METRIC."
    advice = f"GradientClipping(None) in the Trainer logs {TOTAL_NORM} and does not clip."
    if not names:
        return f"{missing} {advice}"
    return f"{missing} It holds {listed(sorted(names), MAX_LISTED_METRICS)}: choose one with --norm METRIC. {advice}"
