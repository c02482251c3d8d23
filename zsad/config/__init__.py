"""Settings and layouts of data sets. Importing this package does not load torch."""
