"""What every method stands on: errors, settings, files, devices. zsad imports this and `reporting`, nothing else."""
