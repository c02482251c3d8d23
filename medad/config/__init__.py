"""Settings of the liver flows. They contain only values."""
