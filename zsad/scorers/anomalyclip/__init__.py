"""AnomalyCLIP (Zhou et al., ICLR 2024): learned prompts, and further learned tokens in the text tower."""
