"""MuSc (Li et al., ICLR 2024) and MuSc-2: images of a category are compared with each other."""
