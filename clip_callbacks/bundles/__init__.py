"""Bundles: folders that hold a bad step on disk, in formats that cannot run code."""
