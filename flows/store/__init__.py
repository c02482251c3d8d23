"""Steps and their cached artifacts: keys, digests, verification and pruning. Independent of any method."""
