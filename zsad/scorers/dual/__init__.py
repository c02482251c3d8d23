"""Dual-image enhanced CLIP (002): text and visual scores, their fusion, test-time adaptation."""
