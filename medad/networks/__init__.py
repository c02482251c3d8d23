"""Build, train, predict, combine."""
