"""Arithmetic over many steps: quantiles, histograms, the noise scale, advice."""
