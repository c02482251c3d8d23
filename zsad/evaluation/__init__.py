"""Exact metrics of image scores and anomaly maps."""
