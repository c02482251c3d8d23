"""Image flows: find, encode, score, evaluate, report; comparison; training."""
