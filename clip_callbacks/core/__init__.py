"""One optimizer step: norms, limits, coefficients, the write and the report. Needs torch only."""
