"""What a step costs: ``python -m benchmarks.step``, ``python -m benchmarks.trainer``, ``python -m benchmarks.growth``."""
