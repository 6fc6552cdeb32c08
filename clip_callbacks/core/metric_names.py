"""Names of metrics on a dashboard, which the suffix of the optimizer may follow."""

from __future__ import annotations

# In one place, because the report page and `suggest` find norms in logs by the names that publishers gave them.
TOTAL_NORM = "grad/total_norm"
CLIPPED_NORM = "grad/clipped_norm"
CLIP_COEF = "grad/clip_coef"
MAX_NORM = "grad/max_norm"
CLIP_FRACTION = "grad/clip_fraction"
CLIP_FRACTION_EPOCH = "grad/clip_fraction_epoch"
RULE_TOTAL_NORM = "grad/{}/total_norm"
RULE_MAX_NORM = "grad/{}/max_norm"
RULE_CLIP_COEF = "grad/{}/clip_coef"
RULE_CLIP_FRACTION = "grad/{}/clip_fraction"
RULE_CLIP_FRACTION_EPOCH = "grad/{}/clip_fraction_epoch"
SHADOW_CLIP_FRACTION = "grad/shadow_clip_fraction/{}"
SHADOW_CLIP_FRACTION_EPOCH = "grad/shadow_clip_fraction_epoch/{}"
SKIPPED_STEPS = "grad/skipped_steps"
SPIKES = "grad/spikes"
LOSS = "grad/loss"
LOSS_LIMIT = "grad/loss_limit"
OVERFLOWED_STEPS = "grad/overflowed_steps"
ZEROED_STEPS = "grad/zeroed_steps"
DROPPED_MICRO_BATCHES = "grad/dropped_micro_batches"
ROLLBACKS = "grad/rollbacks"
AMP_SCALE = "grad/amp_scale"
ACCUMULATION_SCALE = "grad/accumulation_scale"
NOISE_SCALE = "grad/noise_scale"
BLOCK_NORM = "grad_norm/"
"""Prefix of a monitor's metrics, which the name of the block follows."""
CONTRIBUTION = "grad_contribution/"
SPILL_OVER = "grad_spill_over/"
BLOCK_PERCENTILES = {50: "grad_norm_p50/", 90: "grad_norm_p90/", 99: "grad_norm_p99/"}
BLOCK_CLIP_FRACTION = "grad_clip_fraction/"
UPDATE_RATIO = "update_ratio/"
WEIGHT_NORM = "weight_norm/"
GRADIENT_MEAN = "grad_mean/"
GRADIENT_STD = "grad_std/"
GRADIENT_ZEROS = "grad_zeros/"
VANISHED = "grad_vanished/"
HISTOGRAM = "grad_histogram/"

JOURNAL = "nonfinite_steps.jsonl"
"""File in the log directory with one line of JSON for each bad step, the journal."""
BAD_TENSOR_KEYS = ("parameters", "buffers", "carried_before", "gradients", "largest")
"""Keys of a line of the journal that list bad tensors, likely causes first."""

PERCENTILES = {50: "grad/total_norm_p50", 90: "grad/total_norm_p90", 99: "grad/total_norm_p99"}
