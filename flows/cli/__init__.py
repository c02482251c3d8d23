"""The command line. It imports nothing heavy."""
