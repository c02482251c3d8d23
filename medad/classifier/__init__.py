"""The voxel classifier: features of the HU around a voxel, and boosted trees."""
