"""Frozen encoders: weights, towers, attention paths, prompts, stored features."""
