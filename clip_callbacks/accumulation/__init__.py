"""Accumulation windows, and the weights of micro-batches."""
