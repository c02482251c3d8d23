"""Prefect flows, tasks and the command line. Orchestrates; computes nothing."""
