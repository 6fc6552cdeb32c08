"""Run a bad step again from its bundle, and see which module began it; beside ``callbacks`` the only folder with Lightning."""
