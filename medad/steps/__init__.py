"""File to file: one function per cached step; the door for flows."""
