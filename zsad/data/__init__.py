"""Image sets on disk."""
