"""Report of a liver run."""
