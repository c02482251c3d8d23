"""CLIP and CLIP-AC (Radford et al., 2021): class token and patches of the original attention path."""
