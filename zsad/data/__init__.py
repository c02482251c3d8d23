"""Image sets on disk: finding, reading and resizing images and masks."""
