"""Steps and their cached artifacts: keys, digests, verification, pruning. Knows no method."""
