"""Masks, lesions, metrics."""
