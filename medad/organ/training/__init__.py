"""Training of the built-in network on deformed and recoloured torsos."""
