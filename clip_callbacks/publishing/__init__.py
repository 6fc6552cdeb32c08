"""Metrics on their way to loggers, and the table at the end of a fit."""
