"""What is painted into healthy liver."""
