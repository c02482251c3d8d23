"""The report of a study of inserted lesions."""
