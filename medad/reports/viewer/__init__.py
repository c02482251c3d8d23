"""The page of one case: the whole scan to scroll through, with overlays and the table of lesions."""
