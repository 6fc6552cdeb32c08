"""Arithmetic over many steps: quantiles, histograms, the gradient noise scale, suggestions."""
