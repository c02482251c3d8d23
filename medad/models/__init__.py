"""Models in the package, each with the layout of a run folder, and the program that packs them."""
