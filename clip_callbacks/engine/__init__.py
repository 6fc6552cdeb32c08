"""The engine that all callbacks of a Trainer share: it processes the gradients of each optimizer step once."""
