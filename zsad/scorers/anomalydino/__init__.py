"""AnomalyDINO (Damm et al., WACV 2025): patches of a vision encoder against a memory of normal images."""
