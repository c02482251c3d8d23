"""Prefect flows, tasks and the command line. This package orchestrates; medad and zsad compute."""
