"""Settings of the liver flows. They hold values only."""
