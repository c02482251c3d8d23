"""Shared parts of all reports: page, tables, statistics over seeds, statistical tests."""
