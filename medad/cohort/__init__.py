"""Which cases there are: layouts, folds, samples, phantoms."""
