"""Settings; values only."""
