"""The report of a run of one method, and what scoring people's own images leaves."""
