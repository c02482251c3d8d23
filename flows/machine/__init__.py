"""This machine and this process: folders, environment variables, terminal and stop signal."""
