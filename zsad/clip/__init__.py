"""Frozen encoders: weights, image and text towers, the second attention path, prompts and stored features."""
