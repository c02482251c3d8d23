"""The deployments of a Prefect server, and the commands that set up and run a server."""
