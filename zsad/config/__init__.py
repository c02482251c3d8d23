"""Settings and data-set declarations; loads no torch."""
