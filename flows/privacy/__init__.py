"""Keeps patient data out of logs, states and parameters."""
