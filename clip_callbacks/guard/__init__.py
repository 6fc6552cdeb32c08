"""Bad steps: found, reported, put back."""
