"""Metrics for loggers and the progress bar, and the table at the end of a fit."""
