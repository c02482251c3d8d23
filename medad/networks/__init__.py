"""The two networks: building, training, prediction, and combining their outputs."""
