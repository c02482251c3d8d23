"""Steps from file to file: one function per cached step. Flows call medad through this package."""
