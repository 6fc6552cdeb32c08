"""The options of the part that GradientNormMonitor makes."""

from __future__ import annotations

from dataclasses import dataclass

from clip_callbacks.core.blocks import Scope, Selection


@dataclass(frozen=True)
class MonitorOptions:
    """The arguments of :class:`~clip_callbacks.GradientNormMonitor`, which documents them."""

    scope: Scope
    selection: Selection
    norm_type: float
    every_n_steps: int | None
    top_k: int | None
    log_update_ratio: bool
    log_weight_norm: bool
    log_statistics: bool
    log_contributions: bool
    log_histograms: bool

    @property
    def read_before_write(self) -> bool:
        """Whether an option needs the gradients or the weights of a step before they are changed."""
        return self.log_update_ratio or self.log_weight_norm or self.log_statistics or self.log_histograms
