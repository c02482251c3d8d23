"""Kit of all reports: page, tables, charts, pictures, statistical tests."""
