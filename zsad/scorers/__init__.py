"""Zero-shot scorers: one module per system. Each turns features into scores."""
