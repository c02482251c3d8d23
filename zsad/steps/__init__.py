"""File to file; the door for flows."""
