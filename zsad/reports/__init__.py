"""Reports of runs and comparisons: HTML, JSON, CSV and LaTeX."""
