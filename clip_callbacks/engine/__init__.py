"""The one pass of all callbacks over the gradients of each optimizer step."""
