"""Generated images: textures, objects and defects with exact masks."""
