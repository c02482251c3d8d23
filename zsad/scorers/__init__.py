"""Zero-shot scorers: one module for each system, from features to scores."""
