"""Run a bad step again from its bundle, and see which module began it; the only folder besides ``callbacks`` that imports Lightning."""
