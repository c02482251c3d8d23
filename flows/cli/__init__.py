"""The command line; imports nothing heavy."""
