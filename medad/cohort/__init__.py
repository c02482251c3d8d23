"""Cases of a run: data set layouts, folds, sample data, phantoms."""
