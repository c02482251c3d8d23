"""AnoCLIP, also called AnoVL (Deng et al., 2023): V-V patches, adapted to each image at test time."""
