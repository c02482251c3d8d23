"""The report of a liver run."""
