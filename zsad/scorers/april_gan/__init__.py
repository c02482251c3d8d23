"""APRIL-GAN (Chen et al., 2023): trained linear layers project patches to the space of the text."""
