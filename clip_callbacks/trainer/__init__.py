"""Behaviour of Lightning, GradScaler, DDP and schedulers that the callbacks depend on: one trap a file."""
