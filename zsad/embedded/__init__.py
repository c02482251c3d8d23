"""Embedded model: small weights that are part of this package, and the code that made them."""
