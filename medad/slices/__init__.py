"""Volume -> slices -> volume."""
