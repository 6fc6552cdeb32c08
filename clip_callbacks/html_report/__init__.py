"""Read the logs of runs, write the HTML report, and suggest a max_norm."""
