"""The voxel classifier."""
