"""Bad steps: detect them, report them, restore the state before them."""
