"""What the limits do to training, in small: ``python -m benchmarks.limits``."""
