"""Anomaly detection with pre-trained segmentation models (Baugh et al., 2023): CLIPSeg, SAM, tiles."""
