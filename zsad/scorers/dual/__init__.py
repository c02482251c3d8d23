"""Dual-image enhanced CLIP (Zhang et al., 2024): text and visual scores, their fusion, test-time adaptation."""
