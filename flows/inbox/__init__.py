"""Segments each new scan of a folder once."""
