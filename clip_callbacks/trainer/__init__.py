"""What Lightning, the GradScaler, DDP and schedulers really do: one trap a file."""
