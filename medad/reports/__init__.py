"""HTML, JSON, CSV, LaTeX."""
