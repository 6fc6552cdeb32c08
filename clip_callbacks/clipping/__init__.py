"""Rules in force: bound to the optimizers of a fit, with what their limits remember."""
