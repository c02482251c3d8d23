"""Pseudo anomalies, augmentation and inserted lesions in healthy liver."""
