"""What a Prefect server runs and how it is set up."""
