"""A bad step on disk, in a folder that cannot run code."""
