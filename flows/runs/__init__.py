"""A run: submit steps, count, dry run, outcome, run folder, Prefect artifacts."""
