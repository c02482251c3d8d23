"""Frozen encoders (CLIP, DINOv2, DINO): weights, towers, the second attention path, prompts and stored features."""
