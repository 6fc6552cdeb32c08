"""What a run's log tells: reading logs, the report page, threshold advice."""
