"""CT volumes between disk and memory, in LPS."""
