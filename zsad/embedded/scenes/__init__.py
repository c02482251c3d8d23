"""Images made by rule: textures, objects and defects with exact masks."""
