"""Anomaly detection with pre-trained segmentation models (003): CLIPSeg, SAM, tiles."""
