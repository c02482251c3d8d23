"""Report of an ablation."""
