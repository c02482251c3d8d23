"""The report of a run of one method, and the output files of `adflows zsad score`."""
