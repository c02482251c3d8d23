"""A run: runners, dry runs, outcomes, run folders and artifacts in Prefect's UI."""
