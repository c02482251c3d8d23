"""Liver masks for scans that have none."""
