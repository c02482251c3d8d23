"""Image flows: find, encode, score, evaluate and report; comparison of systems; training."""
