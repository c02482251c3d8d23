"""Code that removes patient data from logs, states and parameters."""
