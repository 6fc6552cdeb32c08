"""With DeepSpeed itself, which only the environment of ``make deepspeed-tests`` has."""
