"""Run a bad step again from its bundle, and name the module in which it began. The only package that imports Lightning itself."""
