"""This machine and this process: folders, environment, terminal, stop signal."""
