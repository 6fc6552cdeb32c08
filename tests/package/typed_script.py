"""What a user writes, for ``mypy --strict`` (``make types``): wrong lines are errors, or their ignore would be one."""

from lightning.pytorch import Trainer

from clip_callbacks import (
    Bundles,
    ClipRule,
    GradientClipping,
    GradientNormMonitor,
    NonFiniteGuard,
    QuantileLimit,
    Rollback,
    StepReport,
)

clipping = GradientClipping(rules=[ClipRule(QuantileLimit(0.1)), ClipRule(0.1, "parameter", include="^decoder")])
guard = NonFiniteGuard("skip", max_consecutive=5, bundles=Bundles("bad_steps", weights="full"), rollback=Rollback(lr_factor=0.5))
trainer = Trainer(callbacks=[clipping, guard, GradientNormMonitor()])
report: StepReport | None = clipping.last_report
total: float = float(report.total_norm) if report else 0.0
skipped: int = guard.skipped_steps

NonFiniteGuard("skip", max_consecutive="5")  # type: ignore[arg-type]
NonFiniteGuard("leave out")  # type: ignore[arg-type]
GradientClipping(1.0, scope="module")  # type: ignore[arg-type]
guard.skipped_stepps  # type: ignore[attr-defined]  # noqa: B018
